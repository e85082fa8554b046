//! Answers of the aggregated API: statuses as `k8s.io/apimachinery` makes them, and JSON documents.

use super::objects::KUBEVIRT;
use http::{Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Bytes;
use serde_json::{Value, json};

/// The body of every answer.
pub(super) type Body = Full<Bytes>;

/// A refused request: the code, reason and message of its `Status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    code: StatusCode,
    reason: &'static str,
    message: String,
    /// The kind and the name of the object.
    about: Option<(&'static str, String)>,
}

impl Refusal {
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code: StatusCode::BAD_REQUEST, reason: "BadRequest", message, about: None }
    }

    /// The object of this kind is in another state than the request needs.
    pub(super) fn conflict(kind: &'static str, name: &str, why: &str) -> Self {
        Self {
            code: StatusCode::CONFLICT,
            reason: "Conflict",
            message: format!("Operation cannot be fulfilled on {kind}.{KUBEVIRT} \"{name}\": {why}"),
            about: Some((kind, name.to_owned())),
        }
    }

    pub(super) fn not_found(kind: &'static str, name: &str) -> Self {
        Self {
            code: StatusCode::NOT_FOUND,
            reason: "NotFound",
            message: format!("{kind}.{KUBEVIRT} \"{name}\" not found"),
            about: Some((kind, name.to_owned())),
        }
    }

    pub(super) fn no_such_path(path: &str) -> Self {
        let message = format!("the server could not find the requested resource: {path}");
        Self { code: StatusCode::NOT_FOUND, reason: "NotFound", message, about: None }
    }

    pub(super) fn internal(why: impl std::fmt::Display) -> Self {
        let message = format!("Internal error occurred: {why}");
        Self { code: StatusCode::INTERNAL_SERVER_ERROR, reason: "InternalError", message, about: None }
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code.as_u16(),
        });
        if let Some((kind, name)) = self.about {
            status["details"] = json!({"name": name, "group": KUBEVIRT, "kind": kind});
        }
        json_response(self.code, &status)
    }
}

/// Returns a JSON document as an answer.
pub(super) fn json_response(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// Returns an answer without a body.
pub(super) fn empty(code: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = code;
    response
}
