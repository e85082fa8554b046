//! Any bytes, read as a manifest: parsed, checked, planned, rendered, written back. Nothing may panic, hang or grow without bound,
//! and what is written must be read as the same manifest.
//!
//! ```sh
//! cargo install cargo-fuzz --locked
//! cd rudder-core
//! cargo +nightly fuzz run manifest --sanitizer none -- -dict=fuzz/manifest.dict -rss_limit_mb=512 -timeout=5 -max_total_time=620
//! ```
//!
//! Without a sanitizer, because the workspace forbids `unsafe`: the search is for panics, time and memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rudder_core::{
    capability::Capabilities,
    diagnostic::render,
    manifest::parse,
    plan::{PlanContext, prepare},
};

fuzz_target!(|bytes: &[u8]| {
    let parsed = parse(bytes);
    let text = String::from_utf8_lossy(bytes);
    for diagnostic in &parsed.diagnostics {
        if let Some(span) = diagnostic.span {
            assert!(span.line >= 1 && span.column >= 1, "{diagnostic:?}");
            assert!(span.start <= span.end && span.end <= bytes.len(), "{diagnostic:?}");
        }
    }
    let shown = render(&parsed.diagnostics, "fuzz.yaml", &text);
    assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");

    for document in &parsed.documents {
        let written = document.manifest().to_yaml().expect("what was parsed can be written");
        let again = parse(written.as_bytes());
        // What makes sense only as a whole (a `kind` that was refused, say) is refused again; types and syntax are not.
        let broken = |code: &str| code.starts_with("yaml") || matches!(code, "duplicate-key" | "wrong-type" | "encoding");
        assert!(!again.diagnostics.iter().any(|finding| broken(&finding.code)), "{:#?}\n{written}", again.diagnostics);
        for document in &again.documents {
            assert_eq!(document.manifest().to_yaml().expect("the same manifest"), written);
        }
    }

    let prepared = prepare("fuzz.yaml", bytes, &PlanContext::new(&Capabilities::engine()));
    let shown = prepared.render();
    assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
    assert!(prepared.diagnostics.iter().all(|finding| !finding.code.is_empty() && !finding.message.is_empty()));
});
