//! The objects of KubeVirt and CDI, as far as Rudder writes and reads them.
//!
//! They are picked by hand, not generated from the CustomResourceDefinitions: KubeVirt's has some 60,000 lines, of which a builder
//! needs a few dozen, and the fields that Rudder uses have been stable since version 1 of the API. The API server checks what is
//! written against the schema of the cluster's own version. Specifications are JSON, next to the code that knows what they mean;
//! what is read has types.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{NamespaceResourceScope, Resource};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{borrow::Cow, collections::BTreeMap};

/// Defines a namespaced object of an API.
macro_rules! object {
    ($(#[$meta:meta])* $name:ident, $group:literal, $version:literal, $plural:literal, $status:ty) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub(crate) struct $name {
            api_version: String,
            kind: String,
            pub(crate) metadata: ObjectMeta,
            #[serde(default)]
            pub(crate) spec: Value,
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub(crate) status: Option<$status>,
        }

        impl $name {
            /// Creates an object that is not in the cluster yet.
            #[allow(dead_code)]
            pub(crate) fn new(metadata: ObjectMeta, spec: Value) -> Self {
                let api_version = concat!($group, "/", $version).to_owned();
                Self { api_version, kind: stringify!($name).to_owned(), metadata, spec, status: None }
            }
        }

        impl Resource for $name {
            type DynamicType = ();
            type Scope = NamespaceResourceScope;

            fn kind((): &()) -> Cow<'_, str> {
                stringify!($name).into()
            }

            fn group((): &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> Cow<'_, str> {
                $version.into()
            }

            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

object! {
    /// A machine, running or not (`kubevirt.io/v1`).
    VirtualMachine, "kubevirt.io", "v1", "virtualmachines", VirtualMachineStatus
}

object! {
    /// A machine from power-on until it has ended (`kubevirt.io/v1`).
    VirtualMachineInstance, "kubevirt.io", "v1", "virtualmachineinstances", InstanceStatus
}

object! {
    /// A volume and how it is filled (`cdi.kubevirt.io/v1beta1`).
    DataVolume, "cdi.kubevirt.io", "v1beta1", "datavolumes", DataVolumeStatus
}

/// A condition of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// `True`, `False` or `Unknown`.
    pub(crate) status: String,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// Finds a condition by its type.
pub(crate) fn condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.kind == kind)
}

/// The status of a [`VirtualMachine`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct VirtualMachineStatus {
    /// `Stopped`, `Starting`, `ErrorUnschedulable`… for people.
    pub(crate) printable_status: String,
    pub(crate) conditions: Vec<Condition>,
}

/// The status of a [`VirtualMachineInstance`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct InstanceStatus {
    /// `Pending`, `Scheduling`, `Scheduled`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub(crate) phase: String,
    pub(crate) reason: String,
    pub(crate) node_name: String,
    pub(crate) conditions: Vec<Condition>,
    /// The pods that run the machine, by UID; the value is the node.
    pub(crate) active_pods: BTreeMap<String, String>,
}

/// The status of a [`DataVolume`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct DataVolumeStatus {
    /// `Pending`, `ImportInProgress`, `CloneInProgress`, `Succeeded`, `Failed`…
    pub(crate) phase: String,
    /// `42.00%` or `N/A`.
    pub(crate) progress: String,
    pub(crate) restart_count: u32,
    pub(crate) conditions: Vec<Condition>,
}
