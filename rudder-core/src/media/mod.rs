//! Media that a machine finds when it boots, and files that it fetches.

pub mod cloud_init;
pub mod floppy;
pub mod http;
