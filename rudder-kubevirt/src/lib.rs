//! The KubeVirt backend of Rudder.
