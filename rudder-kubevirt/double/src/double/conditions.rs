//! The conditions in the status of an object.

use k8s_openapi::jiff::Timestamp;
use kube::core::DynamicObject;
use serde_json::{Value, json};

/// Returns the current time as Kubernetes writes it: in whole seconds.
pub(super) fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The conditions of an object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conditions(Vec<Value>);

impl Conditions {
    pub(super) fn of(object: &DynamicObject) -> Self {
        Self(object.data.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default())
    }

    /// Sets a condition. Its time of transition stays unless its status changes.
    pub(super) fn set(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
        let index = self.0.iter().position(|condition| condition["type"] == kind);
        let since = index.map(|index| &self.0[index]).filter(|old| old["status"] == status);
        let since = since.and_then(|old| old["lastTransitionTime"].as_str()).map_or_else(now, str::to_owned);
        let mut condition = json!({"type": kind, "status": status, "lastTransitionTime": since});
        for (field, text) in [("reason", reason), ("message", message)] {
            if !text.is_empty() {
                condition[field] = text.into();
            }
        }
        match index {
            Some(index) => self.0[index] = condition,
            None => self.0.push(condition),
        }
    }

    pub(super) fn remove(&mut self, kind: &str) {
        self.0.retain(|condition| condition["type"] != kind);
    }

    pub(super) fn get(&self, kind: &str) -> Option<&Value> {
        self.0.iter().find(|condition| condition["type"] == kind)
    }

    /// Returns whether a condition has the status `True`.
    pub(super) fn holds(&self, kind: &str) -> bool {
        self.get(kind).is_some_and(|condition| condition["status"] == "True")
    }

    pub(super) fn into_value(self) -> Value {
        Value::Array(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::ApiResource;

    fn object(conditions: &Value) -> DynamicObject {
        let kind: ApiResource = crate::double::objects::instances();
        DynamicObject::new("web", &kind).data(json!({"status": {"conditions": conditions}}))
    }

    #[test]
    fn the_time_of_a_condition_changes_with_its_status_only() {
        let old = "2020-01-01T00:00:00Z";
        let mut conditions = Conditions::of(&object(&json!([
            {"type": "Ready", "status": "False", "reason": "Old", "lastTransitionTime": old},
        ])));
        conditions.set("Ready", "False", "New", "why");
        let expected = json!({
            "type": "Ready", "status": "False", "reason": "New", "message": "why", "lastTransitionTime": old,
        });
        assert_eq!(conditions.get("Ready"), Some(&expected));
        conditions.set("Ready", "True", "", "");
        assert!(conditions.holds("Ready"));
        assert_ne!(conditions.get("Ready").map(|ready| &ready["lastTransitionTime"]), Some(&json!(old)));
    }
}
