//! What the tests of the KubeVirt backend run on: a real Kubernetes control plane on loopback ([`cluster`]), and a double of KubeVirt
//! and CDI that runs their machines on another backend of Rudder ([`double`]).

pub mod cluster;
pub mod double;
