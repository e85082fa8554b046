//! A store that is used without a runtime, or on one without I/O or time enabled, reports what is missing.
#![allow(clippy::unwrap_used)]

use rudder_core::{Error, ErrorKind, backend::Progress, plan::PlannedUrl};
use rudder_local::store::Store;
use tokio::runtime::Builder;

/// Runs something in every context where it cannot work.
fn everywhere<T, F: Future<Output = T>>(work: impl Fn() -> F, look: impl Fn(T, &str)) {
    look(futures::executor::block_on(work()), "found none");
    for (mut builder, missing) in [
        (Builder::new_current_thread(), "without I/O and time"),
        (Builder::new_multi_thread(), "without I/O and time"),
    ] {
        look(builder.worker_threads(1).build().unwrap().block_on(work()), missing);
        look(builder.enable_time().build().unwrap().block_on(work()), "without I/O");
    }
    let mut without_time = Builder::new_current_thread();
    look(without_time.enable_io().build().unwrap().block_on(work()), "without time");
}

fn says(error: &Error, missing: &str) {
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
    assert!(error.to_string().ends_with(missing), "expected {missing}, but found {error}");
    assert!(error.help().unwrap().contains("`enable_all`"), "{error:?}");
    assert!(!error.is_retryable());
}

#[test]
fn a_store_reports_what_its_runtime_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let url = serde_json::from_value::<PlannedUrl>(
        serde_json::json!({"url": "http://127.0.0.1:9/image", "sha256": null}),
    );
    let url = url.unwrap();
    let image = || async { store.image(&url, &Progress::none()).await.unwrap_err() };
    everywhere(image, |error, missing| assert!(error.to_string().ends_with(missing), "{error}"));
    let reap = || async { store.reap().await.unwrap_err() };
    everywhere(reap, |error, missing| says(&error, missing));
}
