//! Fuzzes DHCP messages of a guest with arbitrary bytes: see `frames.rs` for how to run it. Nothing may panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| rudder_local::network::fuzz::dhcp(bytes));
