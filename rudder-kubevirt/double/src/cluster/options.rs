//! The command lines of the components.

use super::{
    error::{Context, Error, Result},
    pki::Pki,
};
use std::{
    hash::{BuildHasher, RandomState},
    net::TcpListener,
    path::Path,
};

/// Ports below those that the kernel gives to outgoing connections, which could otherwise take a port between its
/// choice and its use, or while the API server is stopped.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// The controllers that run: those that remove what is deleted, that complete namespaces, and that count quotas.
/// The others, such as the one that removes the pods of missing nodes, would disturb what a double stands for.
const CONTROLLERS: [&str; 9] = [
    "clusterrole-aggregation-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
];

/// The ports of the components, on 127.0.0.1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    etcd: u16,
    etcd_peer: u16,
    pub(super) api_server: u16,
}

impl Ports {
    /// Chooses ports that are free.
    pub(super) fn choose() -> Result<Self> {
        // Each is held until all are chosen.
        let [etcd, etcd_peer, api_server] = [free()?, free()?, free()?];
        let port = |listener: &TcpListener| {
            listener.local_addr().map(|address| address.port()).context(|| "cannot choose a port".into())
        };
        Ok(Self { etcd: port(&etcd)?, etcd_peer: port(&etcd_peer)?, api_server: port(&api_server)? })
    }
}

fn free() -> Result<TcpListener> {
    let span = u64::from(PORTS.end - PORTS.start);
    for attempt in 0..100_u32 {
        let random = RandomState::new().hash_one(attempt) % span;
        let offset = u16::try_from(random).unwrap_or_default();
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", PORTS.start + offset)) {
            return Ok(listener);
        }
    }
    Err(Error::new(format!(
        "expected a free port from {} to {} on 127.0.0.1, but found none",
        PORTS.start, PORTS.end
    )))
}

/// Options of etcd. It never waits for the disk: its data is removed with the cluster.
pub(super) fn etcd(ports: Ports, data: &Path) -> Vec<String> {
    let client = format!("http://127.0.0.1:{}", ports.etcd);
    let peer = format!("http://127.0.0.1:{}", ports.etcd_peer);
    vec![
        "--unsafe-no-fsync".into(),
        "--log-level=warn".into(),
        format!("--data-dir={}", data.display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
    ]
}

/// Options of the API server: RBAC, an audit log, and the aggregation of other API servers.
pub(super) fn api_server(ports: Ports, pki: &Pki, audit_policy: &Path, audit_log: &Path) -> Vec<String> {
    let file = |name: &str| pki.path(name).display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{}", ports.etcd),
        "--bind-address=127.0.0.1".into(),
        "--advertise-address=127.0.0.1".into(),
        format!("--secure-port={}", ports.api_server),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        // There is no pod that could reach an endpoint on loopback.
        "--endpoint-reconciler-type=none".into(),
        "--allow-privileged=true".into(),
        "--authorization-mode=RBAC".into(),
        "--profiling=false".into(),
        format!("--tls-cert-file={}", file("api-server.crt")),
        format!("--tls-private-key-file={}", file("api-server.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--service-account-issuer=https://127.0.0.1:{}", ports.api_server),
        format!("--service-account-key-file={}", file("service-accounts.pub")),
        format!("--service-account-signing-key-file={}", file("service-accounts.key")),
        format!("--requestheader-client-ca-file={}", file("front-proxy-ca.crt")),
        "--requestheader-allowed-names=front-proxy-client".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        format!("--proxy-client-cert-file={}", file("front-proxy-client.crt")),
        format!("--proxy-client-key-file={}", file("front-proxy-client.key")),
        format!("--audit-policy-file={}", audit_policy.display()),
        format!("--audit-log-path={}", audit_log.display()),
    ]
}

/// Options of the controller manager. Without a port, a leader election, and the default limits of requests, which
/// would delay the garbage collection of many objects.
pub(super) fn controller_manager(pki: &Pki, kubeconfig: &Path) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--controllers={}", CONTROLLERS.join(",")),
        "--secure-port=0".into(),
        "--leader-elect=false".into(),
        "--kube-api-qps=1000".into(),
        "--kube-api-burst=2000".into(),
        format!("--root-ca-file={}", pki.path("ca.crt").display()),
        format!("--service-account-private-key-file={}", pki.path("service-accounts.key").display()),
    ]
}
