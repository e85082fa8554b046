//! The conversation with a machine's screen, keyboard and serial line.
//!
//! Everything here needs [`Machine::display`](crate::backend::Machine::display) and
//! [`Machine::serial`](crate::backend::Machine::serial) only, so that every backend has it.

mod framebuffer;
pub mod text;
mod viewer;

pub use framebuffer::Framebuffer;
pub use viewer::Viewer;
