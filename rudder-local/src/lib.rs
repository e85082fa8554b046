//! What the backends for hypervisors on this host share. Today this is the [`network`] of a lab: a switch and a router in
//! user space that need no privileges; and the [`helper`] process that runs it for a lab that outlives its owner.
//!
//! Outside of semantic versioning: for backends, not for programs that embed Rudder. What such a program needs is
//! re-exported by the crate `rudder`.

pub mod helper;
pub mod network;
