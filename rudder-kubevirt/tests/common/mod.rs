//! A cluster for the tests of this crate: a real control plane, the double of KubeVirt and CDI with real machines behind, and a web
//! server for images.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

pub mod images;

use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use rudder_core::backend::Backend;
use rudder_kubevirt::{KubevirtBackend, KubevirtBackendBuilder};
use rudder_kubevirt_double::{
    cluster::{Cluster, Options},
    double::{self, Double, ServingTls},
};
use rudder_local::store::Store;
use rudder_qemu::QemuBackend;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// How long the lab of a dead owner stays in tests: a living owner on a busy host renews its lease in time.
pub const LEASE: Duration = Duration::from_secs(10);

/// A cluster with KubeVirt's double, whose machines run on QEMU.
pub struct TestCluster {
    pub cluster: Cluster,
    pub double: Arc<Double>,
    _store: tempfile::TempDir,
}

impl TestCluster {
    pub async fn start() -> Self {
        let store = tempfile::Builder::new().prefix("rudder-node-").tempdir().unwrap();
        let node = QemuBackend::builder(Store::open(store.path()).unwrap()).build();
        let cluster = Cluster::start(Options::default()).await.unwrap();
        let options = double::Options::default().with_ports([22, 7, 9]);
        let double = start_double(&cluster, Arc::new(node), options).await;
        Self { cluster, double: Arc::new(double), _store: store }
    }
}

/// Creates a namespace for a test.
pub async fn create_namespace(cluster: &Cluster, name: &str) {
    let namespaces: Api<Namespace> = Api::all(cluster.client().unwrap());
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    namespaces.create(&PostParams::default(), &namespace).await.unwrap();
}

/// Starts the double on a node, and registers its API.
pub async fn start_double(cluster: &Cluster, node: Arc<dyn Backend>, options: double::Options) -> Double {
    let serving = cluster.serving();
    let tls = ServingTls::new(&serving.certificate, &serving.key, cluster.front_proxy_ca());
    let double = Double::start(cluster.client().unwrap(), tls, node, options).await.unwrap();
    cluster
        .register_api_service("subresources.kubevirt.io", "v1", double.port(), cluster.ca())
        .await
        .unwrap();
    double
}

/// Returns a builder of a backend on a cluster, for tests.
pub fn backend(kubeconfig: &Path, namespace: &str) -> KubevirtBackendBuilder {
    KubevirtBackend::builder()
        .kubeconfig(kubeconfig)
        .namespace(namespace)
        .lease_duration(LEASE)
        .start_limit(Duration::from_secs(120))
}

/// Returns the directory with the guests that `make guests` creates.
pub fn guests() -> PathBuf {
    let directory = std::env::var_os("RUDDER_GUESTS").expect("RUDDER_GUESTS: run make test-kubevirt");
    PathBuf::from(directory)
}
