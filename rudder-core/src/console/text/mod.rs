//! Reading a screen as text: consoles draw with fixed bitmap fonts, so their glyphs are matched exactly, never guessed.
//!
//! `font` knows the shapes, `grid` finds where on a screen the cells of a console are, `overlay` what stands in front of a
//! picture; `window` makes that search quick; `read` puts them together, and `screen` is what was read. What no font has, a graphical installer's window for
//! instance, is not text here.

mod font;
mod grid;
mod overlay;
mod read;
mod screen;
mod window;

#[cfg(test)]
mod property;

pub use font::draw;
pub use read::read;
pub use screen::{ScreenText, UNREAD};
