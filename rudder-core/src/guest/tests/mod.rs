//! Tests against a real OpenSSH server, one `sshd -i` per dial, and against small servers that misbehave.

#![allow(clippy::unwrap_used)]

mod odd;
mod openssh;
mod patience;
mod shells;
pub(crate) mod sshd;
