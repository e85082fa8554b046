//! The answers of the API server, as errors that say what to do.

use kube::core::Status;
use rudder_core::{Error, ErrorKind};
use std::error::Error as StdError;

/// Converts an error of a request that was made to do `what` ("create a volume").
pub(crate) fn request_failed(error: kube::Error, what: &str) -> Error {
    match error {
        kube::Error::Api(status) => refused(&status, what),
        kube::Error::Auth(error) => {
            Error::new(ErrorKind::HostMissing, format!("cannot {what}: the credentials are unusable"))
                .with_help("check the user of the current context: kubectl auth whoami")
                .with_source(error)
        }
        error => {
            let message = format!("cannot {what}: the cluster does not answer");
            let found = Error::new(ErrorKind::HostMissing, message).with_retryable(true);
            let found = match innermost(&error) {
                Some(cause) => found.with_context("cause", cause),
                None => found,
            };
            found
                .with_help("check that the cluster is up and can be reached from here: kubectl cluster-info")
                .with_source(error)
        }
    }
}

/// Converts a refusal of the API server.
pub(crate) fn refused(status: &Status, what: &str) -> Error {
    let message = |found: &str| format!("cannot {what}: {found}");
    let said = || Error::new(kind(status), message(&status.message));
    match (status.code, status.reason.as_str()) {
        (401, _) => {
            Error::new(ErrorKind::HostMissing, message("the cluster does not accept the credentials"))
                .with_help("log in again, or renew the token of the current context: kubectl auth whoami")
        }
        (403, _) if status.message.contains("exceeded quota") => said()
            .with_help("free resources of the namespace, or raise its quota: kubectl describe resourcequota"),
        (403, _) => match missing_right(&status.message) {
            Some(rule) => said().with_help(format!("add this rule to a Role of the user: {rule}")),
            None => {
                said().with_help("see the documentation of the KubeVirt backend for the rights that it needs")
            }
        },
        (404, _) if is_missing_api(status) => {
            Error::new(ErrorKind::HostMissing, message("the cluster does not have this API"))
                .with_context("answer", &status.message)
                .with_help("install KubeVirt and CDI in the cluster, or use another context")
        }
        _ => said(),
    }
}

/// Returns whether an object, not the API itself, is what a request did not find.
pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404 && !is_missing_api(status))
}

/// Returns whether an object already exists, or has changed meanwhile.
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn kind(status: &Status) -> ErrorKind {
    match status.code {
        400 | 422 => ErrorKind::InvalidInput,
        401 | 403 => ErrorKind::HostMissing,
        404 => ErrorKind::NotFound,
        409 => ErrorKind::Conflict,
        408 | 429 | 503 | 504 => ErrorKind::TimedOut,
        _ => ErrorKind::Protocol,
    }
}

/// A resource that no API of the cluster has: the details of the answer name no object.
fn is_missing_api(status: &Status) -> bool {
    let names_an_object = status.details.as_ref().is_some_and(|details| !details.name.is_empty());
    !names_an_object
        && (status.message.contains("could not find the requested resource")
            || status.message == "404 page not found\n")
}

/// Reads the rule that would allow a request from the API server's refusal: `… cannot create resource "leases" in API group
/// "coordination.k8s.io" in the namespace "lab"`.
pub(crate) fn missing_right(message: &str) -> Option<String> {
    let (_, rest) = message.split_once(" cannot ")?;
    let (verb, rest) = rest.split_once(" resource \"")?;
    let (resource, rest) = rest.split_once('"')?;
    let group = rest
        .split_once("in API group \"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .map_or("", |(group, _)| group);
    Some(format!("{{apiGroups: [{group:?}], resources: [{resource:?}], verbs: [{verb:?}]}}"))
}

fn innermost(error: &kube::Error) -> Option<String> {
    let mut cause = error.source()?;
    while let Some(next) = cause.source() {
        cause = next;
    }
    Some(cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16, reason: &str, message: &str) -> Status {
        Status::failure(message, reason).with_code(code)
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let forbidden = status(
            403,
            "Forbidden",
            "leases.coordination.k8s.io is forbidden: User \"u\" cannot create resource \"leases\" in API group \
             \"coordination.k8s.io\" in the namespace \"lab\"",
        );
        let error = refused(&forbidden, "open a lab");
        assert_eq!(error.kind(), ErrorKind::HostMissing);
        let rule = "{apiGroups: [\"coordination.k8s.io\"], resources: [\"leases\"], verbs: [\"create\"]}";
        assert!(error.report().contains(rule), "{}", error.report());

        let quota = "pods \"x\" is forbidden: exceeded quota: q, requested: memory=2Gi, used: memory=1Gi, limited: memory=2Gi";
        assert!(
            refused(&status(403, "Forbidden", quota), "start")
                .report()
                .contains("kubectl describe resourcequota")
        );
        assert!(
            refused(&status(401, "Unauthorized", "Unauthorized"), "start").report().contains("log in again")
        );
        let missing =
            refused(&status(404, "NotFound", "the server could not find the requested resource"), "list");
        assert_eq!(missing.kind(), ErrorKind::HostMissing);
        let absent = status(404, "NotFound", "virtualmachines.kubevirt.io \"x\" not found");
        assert_eq!(refused(&absent, "stop").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_missing_right_of_the_core_group_has_no_group() {
        let message = "secrets is forbidden: User \"u\" cannot get resource \"secrets\" in API group \"\" in the namespace \"lab\"";
        assert_eq!(
            missing_right(message).as_deref(),
            Some("{apiGroups: [\"\"], resources: [\"secrets\"], verbs: [\"get\"]}")
        );
        assert_eq!(missing_right("no"), None);
    }
}
