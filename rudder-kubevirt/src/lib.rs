//! The KubeVirt backend of Rudder: machines are VirtualMachines of a Kubernetes cluster, their disks are volumes that CDI fills, and
//! modules are halted machines with their volumes.
//!
//! A cluster shares neither a file system nor processes with the builder. A lab is owned through a Lease that the builder renews, and
//! that owns every object of the lab; streams of machines are web sockets through the API server.

mod backend;
mod cluster;
mod data_volume;
mod diagnose;
mod errors;
mod fetcher;
mod http_client;
mod import;
mod lab;
mod lab_context;
mod lease;
mod life;
mod machine;
mod modules;
mod names;
mod objects;
mod probe;
mod specification;
mod streams;

pub use backend::{KubevirtBackend, KubevirtBackendBuilder};
