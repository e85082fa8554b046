//! Calls without a runtime, or on one without I/O or time, fail with a single error that says what is missing.

use super::plans::*;
use rudder_core::{
    Error, ErrorKind,
    backend::{Backend, LabSpec},
    build::Build,
    event::{Event, EventKind, Outcome},
    guest::{BuildKey, Endpoint, Login, Session},
    memory::MemoryBackend,
};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::runtime::Builder;

/// Runs something on every kind of unsuitable runtime, and without one.
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
fn a_build_reports_what_its_runtime_lacks() {
    let build = || async {
        let backend = Arc::new(MemoryBackend::new());
        let handle = Build::new(read(plan(vec![vm("a", vec![])])), backend).start();
        let (mut reader, mut events) = (handle.events(), Vec::new());
        while let Some(event) = reader.next().await {
            events.push(event);
        }
        (events, handle.outcome().await.unwrap_err())
    };
    everywhere(build, |(events, error), missing| {
        says(&error, missing);
        let failure = error.build_failure().unwrap();
        assert!(failure.report.message.contains("`enable_all`"), "{}", failure.report);
        let is_failure =
            |event: &&Event| matches!(&event.kind, EventKind::Finished { outcome: Outcome::Failed(_), .. });
        assert_eq!(events.iter().filter(is_failure).count(), 1);
        assert!(is_failure(&events.last().unwrap()));
    });
}

#[test]
fn logins_and_labs_report_what_their_runtime_lacks() {
    let login = || async {
        let endpoint = Endpoint::new(|| unreachable!("the endpoint is not dialled"));
        let login = Login::new("root", BuildKey::generate());
        Session::open(endpoint, login, Duration::from_secs(1)).await.unwrap_err()
    };
    everywhere(login, |error, missing| says(&error, missing));

    let backend = MemoryBackend::new();
    let network = read(plan(vec![vm("a", vec![])])).network;
    let spec = LabSpec::new("web", network);
    let open = || async { backend.open_lab(&spec).await.unwrap_err() };
    everywhere(open, |error, missing| says(&error, missing));
}
