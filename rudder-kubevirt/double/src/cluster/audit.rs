//! The audit log: which requests the API server has answered, of whom, and how.

use super::{
    Cluster,
    deadline::Deadline,
    error::{Context, Result},
};
use serde::Deserialize;
use std::{collections::HashMap, fs, path::Path};

/// The policy: every request, without bodies, once it is answered. A watch is logged when it starts, too.
pub(super) const POLICY: &str = r#"{
  "apiVersion": "audit.k8s.io/v1",
  "kind": "Policy",
  "omitStages": ["RequestReceived"],
  "rules": [
    { "level": "None", "users": ["system:apiserver", "system:kube-controller-manager"] },
    { "level": "Metadata" }
  ]
}
"#;

/// A request to the API server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct AuditEntry {
    /// The name of the user, such as `system:serviceaccount:default:builder`.
    pub user: String,
    /// The verb of the API (`get`, `list`, `watch`, `create`, `patch`, …), or the HTTP method of a request for
    /// another URL.
    pub verb: String,
    /// The API group: empty for the core group, and for a URL that is no resource.
    pub group: String,
    /// The resource, in the plural: empty for a URL that is no resource.
    pub resource: String,
    /// The subresource: empty for the resource itself.
    pub subresource: String,
    /// The namespace: empty if the resource has none.
    pub namespace: String,
    /// The name of the object: empty for a list, and for the creation of an object.
    pub name: String,
    /// The HTTP status code of the answer. 0 if the connection broke before.
    pub code: u16,
    /// Path and query of the request.
    pub uri: String,
    /// What the client calls itself.
    pub user_agent: String,
}

/// An event of the log, as audit.k8s.io/v1 defines it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(rename = "auditID")]
    audit_id: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    user: User,
    #[serde(default)]
    user_agent: String,
    #[serde(default)]
    object_ref: ObjectRef,
    #[serde(default)]
    response_status: ResponseStatus,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ObjectRef {
    api_group: String,
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ResponseStatus {
    code: u16,
}

impl From<Event> for AuditEntry {
    fn from(event: Event) -> Self {
        let object = event.object_ref;
        Self {
            user: event.user.username,
            verb: event.verb,
            group: object.api_group,
            resource: object.resource,
            subresource: object.subresource,
            namespace: object.namespace,
            name: object.name,
            code: event.response_status.code,
            uri: event.request_uri,
            user_agent: event.user_agent,
        }
    }
}

/// Reads a log: a request once, however many of its stages are logged, in the order of its first one.
pub(super) fn read(log: &Path) -> Result<Vec<AuditEntry>> {
    let bytes = fs::read(log).context(|| format!("cannot read {}", log.display()))?;
    let mut entries: Vec<AuditEntry> = Vec::new();
    let mut known = HashMap::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        // A line that is being written.
        if !line.ends_with(b"\n") {
            break;
        }
        let event: Event = serde_json::from_slice(line).context(|| {
            format!(
                "expected an audit event in {}, but found {}",
                log.display(),
                String::from_utf8_lossy(line)
            )
        })?;
        let index = *known.entry(event.audit_id.clone()).or_insert(entries.len());
        match entries.get_mut(index) {
            Some(entry) => *entry = event.into(),
            None => entries.push(event.into()),
        }
    }
    Ok(entries)
}

impl Cluster {
    /// Returns the requests that the API server has answered so far, except for those of the control plane itself.
    ///
    /// A request is logged when its answer is complete, which may be a moment after the client has received it:
    /// [`audited`](Self::audited) waits for one.
    ///
    /// # Errors
    ///
    /// The log cannot be read.
    pub fn audit(&self) -> Result<Vec<AuditEntry>> {
        read(&self.audit_log())
    }

    /// Waits until a request is logged, and returns it.
    ///
    /// # Errors
    ///
    /// The log cannot be read, or there is no such request in two minutes.
    pub async fn audited(&self, is_wanted: impl Fn(&AuditEntry) -> bool) -> Result<AuditEntry> {
        let deadline = Deadline::new("the audit log has a certain request");
        loop {
            let entries = self.audit()?;
            match entries.into_iter().find(&is_wanted) {
                Some(entry) => return Ok(entry),
                None => deadline.pause("none").await?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_request_is_one_entry_with_its_last_stage() {
        let line = |id: &str, stage: &str, code: u16| {
            let event = json!({
                "kind": "Event",
                "apiVersion": "audit.k8s.io/v1",
                "level": "Metadata",
                "auditID": id,
                "stage": stage,
                "requestURI": format!("/api/v1/namespaces/a/pods/{id}/log?follow=true"),
                "verb": "get",
                "user": { "username": "u", "groups": ["g"] },
                "sourceIPs": ["127.0.0.1"],
                "userAgent": "test/1",
                "objectRef": {
                    "resource": "pods", "namespace": "a", "name": id, "apiVersion": "v1", "subresource": "log"
                },
                "responseStatus": { "metadata": {}, "code": code },
            });
            format!("{event}\n")
        };
        let mut text = line("1", "ResponseStarted", 200);
        text += &line("2", "ResponseComplete", 403);
        text += &line("1", "ResponseComplete", 500);
        // A line that is being written.
        text += r#"{"auditID":"3","verb":"ge"#;
        let log = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(log.path(), text).expect("a log");
        let entries = read(log.path()).expect("entries");
        let found: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.code)).collect();
        assert_eq!(found, [("1", 500), ("2", 403)]);
        assert_eq!(entries[0].subresource, "log");
        assert_eq!(entries[0].group, "");
    }
}
