//! `Debug` of manifests, without anything that is secret or may hold secrets.
//!
//! Values are masked if the name of their key marks them as secret, even if Rudder does not know the key, and so are
//! passwords and tokens in URLs. Free text (scripts, user data, environments, instructions, boot commands) is shown by
//! its length.

use super::*;
use crate::{diagnostic::is_secret_key, secret::redact_urls};
use serde_yaml::Value;
use std::fmt;

/// Fields whose text may contain anything.
const FREE: [&str; 9] = [
    "inline",
    "userData",
    "networkData",
    "env",
    "executeCommand",
    "command",
    "instructions",
    "bootCommand",
    "searchCriteria",
];

macro_rules! redacted {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                show(stringify!($name), self, f)
            }
        }
    )*};
}

redacted! { Metadata BareBuild BuildSpec File CloneSpec EgressGateway Network Vpc Subnet BuildOverrides VpcOverride SubnetOverride VmOverride Provisioner ShellStep FileStep RebootStep WindowsUpdateStep HandbuildStep ValueFrom KeyRef ScriptLines Vm Source BuildRef SourcePvc Resources Disk Communicator CloudInit Nic EfiFirmware Iso FileNames FileRef Manifest YamlValue YamlMapping }

impl<S: Serialize> fmt::Debug for Resource<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show("Resource", self, f)
    }
}

fn show(name: &str, value: &impl Serialize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str(name)?;
    match serde_yaml::to_value(value) {
        Ok(mut value) => {
            if name == "ScriptLines" {
                elide(&mut value);
            }
            redact(&mut value);
            f.write_str(" ")?;
            fmt::Debug::fmt(&value, f)
        }
        Err(_) => Ok(()),
    }
}

fn redact(value: &mut Value) {
    match value {
        Value::String(text) => *text = redact_urls(text).into_owned(),
        Value::Sequence(items) => items.iter_mut().for_each(redact),
        Value::Mapping(entries) => {
            for (key, value) in entries.iter_mut() {
                match key.as_str() {
                    Some(key) if FREE.contains(&key) => elide(value),
                    Some(key) if is_secret_key(key) => *value = "***".into(),
                    _ => redact(value),
                }
            }
        }
        Value::Tagged(tagged) => redact(&mut tagged.value),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Replaces every text by its length.
fn elide(value: &mut Value) {
    match value {
        Value::String(text) => *text = format!("{} bytes", text.len()),
        Value::Sequence(items) => items.iter_mut().for_each(elide),
        Value::Mapping(entries) => entries.iter_mut().for_each(|(_, value)| elide(value)),
        other => *other = "…".into(),
    }
}
