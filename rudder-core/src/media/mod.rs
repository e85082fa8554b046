//! Media that a machine finds when it boots.

pub mod cloud_init;
