//! Reading a screen as text: consoles draw with fixed bitmap fonts, so their glyphs are matched exactly, never guessed.
//!
//! `font` contains the glyphs, `grid` locates the cells of a console on a screen, `overlay` finds what is in front of
//! an image, `window` speeds up that search, `read` combines them, and `screen` is the result. What no font contains,
//! such as the window of a graphical installer, is not text here.

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
