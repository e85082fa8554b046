//! Reading a screen as text: consoles draw with fixed bitmap fonts, so their glyphs are matched exactly, never guessed.
//!
//! [`font`] knows the shapes, [`grid`] finds where on a screen the cells of a console are, [`read`] puts both together, and
//! [`screen`] is what was read. What no font has, a graphical installer's window for instance, is not text here.

mod font;
mod grid;
mod read;
mod screen;

pub use font::draw;
pub use read::read;
pub use screen::{ScreenText, UNREAD};
