//! Fuzzes frames of a guest with arbitrary bytes: as they are, and as the content of packets with valid headers. Nothing may panic.
//!
//! ```sh
//! cargo install cargo-fuzz --locked
//! cd rudder-local
//! cargo +nightly fuzz run frames --sanitizer none -- -rss_limit_mb=512 -timeout=5 -max_total_time=1800
//! ```
//!
//! Without a sanitizer, because the workspace forbids `unsafe`. No VPC has internet, so that nothing leaves the process.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rudder_local::network::fuzz;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _guard = runtime.enter();
    fuzz::frames(bytes);
    fuzz::packet(bytes);
    fuzz::ip(bytes);
    runtime.block_on(tokio::task::yield_now());
});
