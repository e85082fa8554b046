//! Any bytes, repeated: nothing may take time that grows faster than the length of the text. What the fuzzer gives is a beginning, a
//! piece and an end; the piece is repeated to two lengths, and the time of the longer is held against that of the shorter.
//!
//! ```sh
//! cd rudder-core
//! cargo +nightly fuzz run time --sanitizer none -- -dict=fuzz/manifest.dict -rss_limit_mb=2048 -timeout=60 -max_len=200 -max_total_time=620
//! ```

#![no_main]

use libfuzzer_sys::fuzz_target;
use rudder_core::{
    capability::Capabilities,
    keys::parse_boot_command,
    plan::{PlanContext, prepare},
    secret::{Masker, Secret, redact_urls},
    visible::visible,
};
use std::time::{Duration, Instant};

const SHORT: usize = 32 << 10;
/// How much longer the longer text is.
const FACTOR: usize = 8;
/// How much longer it may take: with caches and allocations, a little more than in proportion.
const SLACK: u32 = 3;
/// Less than this is noise.
const NOISE: Duration = Duration::from_millis(100);

fuzz_target!(|input: (&[u8], &[u8], &[u8], u8)| {
    let (head, piece, tail, subject) = input;
    if piece.is_empty() || head.len() > 64 || tail.len() > 64 {
        return;
    }
    let time = |length: usize| {
        let bytes = [head, piece.repeat(length / piece.len()).as_slice(), tail].concat();
        let text = String::from_utf8_lossy(&bytes);
        let start = Instant::now();
        match subject % 5 {
            0 => drop(prepare("fuzz.yaml", &bytes, &PlanContext::new(&Capabilities::engine())).render()),
            1 => drop(parse_boot_command([&*text])),
            2 => {
                let secret = Secret::new(String::from_utf8_lossy(piece));
                let masker = Masker::new([&secret, &Secret::new("hunter2"), &Secret::new("a\nlonger one\n")]);
                drop(masker.mask(&text));
                drop(masker.mask_lines(text.lines().map(str::to_owned).collect()));
            }
            3 => drop((redact_urls(&text), visible(&text))),
            _ => drop(Masker::new([&Secret::new(&*text)])),
        }
        start.elapsed()
    };
    let (short, long) = (time(SHORT), time(SHORT * FACTOR));
    let allowed = short * u32::try_from(FACTOR).unwrap_or(u32::MAX) * SLACK + NOISE;
    assert!(long <= allowed, "{SHORT} bytes took {short:?}, {FACTOR} times as many took {long:?}");
});
