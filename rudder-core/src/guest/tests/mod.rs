//! Tests against a real OpenSSH server, one `sshd -i` per dial, and against small servers that misbehave.

#![allow(clippy::unwrap_used)]

mod openssh;
mod shells;
mod slow_servers;
pub(crate) mod sshd;
mod unusual_servers;
