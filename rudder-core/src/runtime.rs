//! What Rudder needs of the Tokio runtime that it is called on.

use crate::{Error, ErrorKind, Result, platform::use_io_driver};
use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook},
    sync::Once,
};
use tokio::{runtime::Handle, time};

thread_local! {
    /// Whether this thread is probing its runtime, so that a panic is the answer.
    static PROBING: Cell<bool> = const { Cell::new(false) };
}

/// Checks that the caller is on a Tokio runtime that drives I/O and time. Backends call it at the beginning of their
/// work.
///
/// # Errors
/// `InvalidInput` when there is no runtime, or when the runtime was built without one of the two; the message says what
/// is missing.
pub fn check() -> Result<()> {
    if Handle::try_current().is_err() {
        let message = "expected to be called on a Tokio runtime, but found none";
        return Err(Error::new(ErrorKind::InvalidInput, message).with_help(
            "call Rudder from `#[tokio::main]`, or from within `Runtime::block_on` or `Handle::enter` of a runtime that was built with `enable_all`",
        ).with_retryable(false));
    }
    // Tokio reports a missing driver only by a panic. If panics abort, Tokio's own message must suffice.
    if cfg!(panic = "abort") {
        return Ok(());
    }
    let io = drives(use_io_driver);
    let time = drives(|| drop(time::sleep(time::Duration::ZERO)));
    let missing = match (io, time) {
        (true, true) => return Ok(()),
        (false, true) => "I/O",
        (true, false) => "time",
        (false, false) => "I/O and time",
    };
    let message =
        format!("expected a Tokio runtime that drives I/O and time, but found one without {missing}");
    Err(Error::new(ErrorKind::InvalidInput, message)
        .with_help("call `enable_all` on the `tokio::runtime::Builder`")
        .with_retryable(false))
}

/// Whether something that needs a driver of the runtime succeeds without a panic. The panic is not reported elsewhere.
fn drives(need: impl FnOnce()) -> bool {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !PROBING.get() {
                report(panic);
            }
        }));
    });
    PROBING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(need));
    PROBING.set(false);
    outcome.is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tokio::runtime::Builder;

    #[test]
    fn features_missing_from_a_runtime_are_named() {
        let message = || check().unwrap_err().to_string();
        assert!(message().contains("found none"), "{}", message());
        for (runtime, missing) in [
            (Builder::new_current_thread().build(), Some("without I/O and time")),
            (Builder::new_current_thread().enable_io().build(), Some("without time")),
            (Builder::new_current_thread().enable_time().build(), Some("without I/O")),
            (Builder::new_multi_thread().worker_threads(1).build(), Some("without I/O and time")),
            (Builder::new_current_thread().enable_all().build(), None),
            (Builder::new_multi_thread().worker_threads(1).enable_all().build(), None),
        ] {
            let runtime = runtime.unwrap();
            match (runtime.block_on(async { check() }), missing) {
                (Ok(()), None) => {}
                (Err(error), Some(missing)) => {
                    assert!(error.to_string().ends_with(missing), "{error}");
                    assert!(error.help().unwrap().contains("`enable_all`"));
                }
                (found, expected) => panic!("expected {expected:?}, but found {found:?}"),
            }
        }
    }
}
