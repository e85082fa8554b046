//! Reasons and messages as KubeVirt and CDI word them, where clients show or compare them.

use rudder_core::{Error, ErrorKind};
use std::error::Error as _;

/// The node that all instances run on.
pub(super) const NODE: &str = "double";
/// The finalizer of an instance whose machine may exist on the node.
pub(super) const INSTANCE_FINALIZER: &str = "foregroundDeleteVirtualMachine";
/// The finalizer of a VirtualMachine whose instance may exist.
pub(super) const MACHINE_FINALIZER: &str = "kubevirt.io/virtualMachineControllerFinalize";
/// The label of the claim with the TPM and firmware state of a VirtualMachine; its value is the name of that machine.
pub(super) const STATE_LABEL: &str = "persistent-state-for";

/// Describes why an import of this URL into a volume of this size failed.
pub(super) fn import_failure(error: &Error, url: &str, size: u64) -> String {
    let text = error.to_string();
    let answered = text.split_once("answered ").map(|(_, status)| status.trim());
    match error.kind() {
        ErrorKind::NotFound => wrong_status(answered.unwrap_or("404 Not Found")),
        ErrorKind::Download => match answered {
            Some(status) => wrong_status(status),
            None => format!(
                "Unable to connect to http data source: HTTP request errored: Get \"{url}\": {}",
                innermost(error)
            ),
        },
        ErrorKind::InvalidInput => format!(
            "Unable to process data: Virtual image size is larger than the reported available storage {size}. A larger PVC is required."
        ),
        _ => format!("Unable to process data: {}", innermost(error)),
    }
}

/// Describes that a server answered with this status code and reason.
pub(super) fn wrong_status(status: &str) -> String {
    let code = status.split(' ').next().unwrap_or_default();
    format!("Unable to connect to http data source: expected status code 200, got {code}. Status: {status}")
}

/// Returns the message of an error with that of its last cause.
pub(super) fn innermost(error: &Error) -> String {
    let mut cause = error.source();
    let mut text = error.to_string();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_import_is_described_as_cdi_does() {
        let missing =
            Error::new(ErrorKind::NotFound, "expected the file, but the server answered 404 Not Found");
        let busy = Error::new(
            ErrorKind::Download,
            "expected the file, but the server answered 503 Service Unavailable",
        );
        let dead = Error::new(ErrorKind::Download, "cannot connect to the server")
            .with_source(Error::new(ErrorKind::Io, "connection refused"));
        let describe = |error| import_failure(&error, "http://images.example/a", 10);
        assert_eq!(
            describe(missing),
            "Unable to connect to http data source: expected status code 200, got 404. Status: 404 Not Found"
        );
        assert_eq!(
            describe(busy),
            "Unable to connect to http data source: expected status code 200, got 503. Status: 503 Service Unavailable"
        );
        assert_eq!(
            describe(dead),
            "Unable to connect to http data source: HTTP request errored: Get \"http://images.example/a\": connection refused"
        );
    }
}
