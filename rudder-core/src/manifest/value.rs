//! YAML that is passed through as written, or interpreted later. The types are our own, so that the underlying library
//! does not show in the API.

use super::Scalar;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Any YAML value, with the order of its keys and the kind of every scalar.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct YamlValue(serde_yaml::Value);

/// A YAML mapping, in the order in which it was written. Keys are strings, unless the author wrote other scalars.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct YamlMapping(serde_yaml::Mapping);

impl YamlValue {
    /// Converts the value to another type, such as `serde_json::Value` or a struct.
    ///
    /// # Errors
    /// `InvalidInput` when the value does not have that shape.
    pub fn to<T: DeserializeOwned>(&self) -> crate::Result<T> {
        serde_yaml::from_value(self.0.clone()).map_err(|error| {
            let message = format!("expected a value of another type: {error}");
            crate::Error::new(crate::ErrorKind::InvalidInput, message)
        })
    }
}

impl From<Scalar> for YamlValue {
    fn from(scalar: Scalar) -> Self {
        Self(match scalar {
            Scalar::Int(value) => value.into(),
            Scalar::Float(value) => value.into(),
            Scalar::Text(value) => value.into(),
        })
    }
}

impl From<bool> for YamlValue {
    fn from(value: bool) -> Self {
        Self(value.into())
    }
}

impl From<&str> for YamlValue {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl YamlMapping {
    /// Creates an empty mapping.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the mapping has no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the keys that are strings, in order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().filter_map(serde_yaml::Value::as_str)
    }

    /// Returns the value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<YamlValue> {
        self.0.get(key).cloned().map(YamlValue)
    }

    /// Sets the value of a key. An existing key keeps its position.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<YamlValue>) {
        self.0.insert(key.into().into(), value.into().0);
    }

    /// Returns all entries.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&serde_yaml::Value, &serde_yaml::Value)> {
        self.0.iter()
    }
}

impl<K: Into<String>, V: Into<YamlValue>> FromIterator<(K, V)> for YamlMapping {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self(entries.into_iter().map(|(key, value)| (key.into().into(), value.into().0)).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn values_are_built_and_read_without_serde_yaml() {
        let mut mapping: YamlMapping = [("A", "1"), ("B", "x")].into_iter().collect();
        mapping.insert("C", Scalar::Int(7));
        mapping.insert("A", true);
        assert_eq!(mapping.keys().collect::<Vec<_>>(), ["A", "B", "C"]);
        assert_eq!((mapping.len(), mapping.is_empty()), (3, false));
        assert!(mapping.get("A").unwrap().to::<bool>().unwrap());
        assert_eq!(mapping.get("C").unwrap().to::<serde_json::Value>().unwrap(), 7);
        assert!(mapping.get("B").unwrap().to::<u32>().is_err() && mapping.get("D").is_none());
        assert_eq!(serde_json::to_string(&mapping).unwrap(), r#"{"A":true,"B":"x","C":7}"#);
    }

    #[test]
    fn debug_shows_no_secret() {
        let mapping: YamlMapping =
            [("password", "s3cret"), ("url", "https://u:s3cret@host/")].into_iter().collect();
        let value: YamlValue = serde_yaml::from_str("{password: s3cret}").unwrap();
        assert!(!format!("{mapping:?}{value:?}").contains("s3cret"));
    }
}
