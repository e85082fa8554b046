//! A real Kubernetes control plane for tests: etcd, kube-apiserver (RBAC, aggregation, an audit log) and
//! kube-controller-manager, unmodified, on free ports of 127.0.0.1, with all of its files in a temporary directory.
//! It ends with the value, or with the process that started it.
//!
//! There is no node: pods are objects that nothing runs, volume claims are not bound, and no garbage of pods is
//! collected. What a double writes stays as it is. Garbage collection by owner references, the removal of
//! namespaces, service accounts with tokens, and quotas work.
//!
//! `make test-kubevirt` builds the program with the three components, and names it in `RUDDER_KUBE`.

mod access;
mod aggregation;
mod audit;
mod crds;
mod deadline;
mod error;
mod kubeconfig;
mod options;
mod pki;
mod process;

pub use audit::AuditEntry;
pub use crds::{MACHINES, names as crd_names};
pub use error::{Error, Result};
pub use kubeconfig::client_of;
pub use pki::Identity;

use deadline::Deadline;
use error::Context;
use http::Request;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{
    Api, Client, Config, Resource,
    api::{Patch, PatchParams},
};
use kubeconfig::User;
use options::Ports;
use pki::Pki;
use process::Component;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    env,
    fmt::{self, Debug},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};
use tempfile::TempDir;

/// The variable that names the program with the components.
const KUBE: &str = "RUDDER_KUBE";

/// What a cluster has when it starts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// The CRDs of KubeVirt and CDI that it serves, by name. By default [`MACHINES`].
    pub crds: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { crds: MACHINES.map(str::to_owned).into() }
    }
}

impl Options {
    /// Sets [`crds`](Self::crds).
    #[must_use]
    pub fn with_crds<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.crds = names.into_iter().map(str::to_owned).collect();
        self
    }
}

/// A running control plane.
pub struct Cluster {
    kube: PathBuf,
    ports: Ports,
    pki: Pki,
    /// The administrator's.
    config: Config,
    kubeconfigs: AtomicU32,
    components: Mutex<Components>,
    /// Last, because it is removed when the components have ended.
    directory: TempDir,
}

/// In the order in which they end.
#[derive(Debug)]
struct Components {
    controller_manager: Option<Component>,
    api_server: Option<Component>,
    etcd: Component,
}

impl Components {
    fn running(&mut self) -> impl Iterator<Item = &mut Component> {
        [Some(&mut self.etcd), self.api_server.as_mut(), self.controller_manager.as_mut()]
            .into_iter()
            .flatten()
    }
}

impl Drop for Components {
    /// Prints the logs if a test fails: they are removed with the cluster.
    #[expect(clippy::print_stderr, reason = "a test's output")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            for component in self.running() {
                eprintln!("{}", component.last_lines());
            }
        }
    }
}

impl Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("ports", &self.ports)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Starts a control plane, and waits until it serves its CRDs and has completed the namespace `default`.
    ///
    /// # Errors
    ///
    /// The program is missing, a component ends, with the last lines of its log, or it is not ready in two minutes.
    pub async fn start(options: Options) -> Result<Self> {
        let kube = program()?;
        let directory = tempfile::Builder::new().prefix("rudder-cluster-").tempdir();
        let directory = directory.context(|| "cannot create a temporary directory".into())?;
        let path = directory.path();
        let pki = Pki::create(path.join("pki"))?;
        let ports = Ports::choose()?;
        let server = server(ports);
        for name in ["admin", "controller-manager"] {
            let (certificate, key) = (pki.path(&format!("{name}.crt")), pki.path(&format!("{name}.key")));
            let user = User::Certificate { certificate: &certificate, key: &key };
            kubeconfig::write(
                &path.join(format!("{name}.kubeconfig")),
                &server,
                &pki.path("ca.crt"),
                &user,
                "default",
            )?;
        }
        pki::write(&path.join("audit-policy.json"), audit::POLICY)?;
        let config = kubeconfig::read(&path.join("admin.kubeconfig")).await?;
        let etcd = Component::start(&kube, "etcd", &options::etcd(ports, &path.join("etcd")), path)?;
        let components = Mutex::new(Components { controller_manager: None, api_server: None, etcd });
        let cluster =
            Self { kube, ports, pki, config, kubeconfigs: AtomicU32::new(0), components, directory };

        // The API server waits for etcd itself.
        cluster.start_api_server().await?;
        let crds: Vec<_> = options.crds.iter().map(String::as_str).collect();
        crds::install(&cluster.client()?, &crds).await?;
        cluster.start_controllers().await?;
        Ok(cluster)
    }

    /// Returns the path of the administrator's kubeconfig, which is valid until the cluster ends.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("admin.kubeconfig")
    }

    /// Writes a kubeconfig for the bearer of a token, valid or not, and returns its path.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn kubeconfig_for_token(&self, token: &str, namespace: &str) -> Result<PathBuf> {
        let number = self.kubeconfigs.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.path().join(format!("token-{number}.kubeconfig"));
        kubeconfig::write(
            &path,
            &server(self.ports),
            &self.pki.path("ca.crt"),
            &User::Token(token),
            namespace,
        )?;
        Ok(path)
    }

    /// Creates a client of the administrator. It belongs to the current Tokio runtime, and stops working when
    /// that ends.
    ///
    /// # Errors
    ///
    /// The cryptography library refuses the configuration.
    pub fn client(&self) -> Result<Client> {
        kubeconfig::client(self.config.clone())
    }

    /// The URL of the API server.
    pub fn url(&self) -> String {
        server(self.ports)
    }

    /// The certificate of the authority that has signed the API server's certificate and
    /// [`serving`](Self::serving), as PEM.
    pub fn ca(&self) -> &str {
        &self.pki.ca
    }

    /// The certificate of the authority that has signed the certificate with which the API server identifies
    /// itself to aggregated API servers, as PEM.
    pub fn front_proxy_ca(&self) -> &str {
        &self.pki.front_proxy_ca
    }

    /// A certificate for servers on this host: `localhost`, 127.0.0.1, and the names of KubeVirt's and CDI's services.
    pub fn serving(&self) -> &Identity {
        &self.pki.serving
    }

    /// Kills the API server, as a crash would. Nothing else is affected, and what clients send fails until it
    /// is started again.
    pub fn stop_api_server(&self) {
        self.components().api_server = None;
    }

    /// Starts the API server, on the same port and with the same objects as before, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// It ends, with the last lines of its log, or is not ready in two minutes.
    pub async fn start_api_server(&self) -> Result<()> {
        let directory = self.directory.path();
        let policy = directory.join("audit-policy.json");
        let options = options::api_server(self.ports, &self.pki, &policy, &self.audit_log());
        // First the end of the old one, then the start of the new one: they have the same port.
        self.stop_api_server();
        self.components().api_server =
            Some(Component::start(&self.kube, "kube-apiserver", &options, directory)?);
        let client = self.client()?;
        let deadline = Deadline::new("the API server is ready");
        loop {
            let request =
                Request::get("/readyz").body(Vec::new()).context(|| "cannot ask the API server".into())?;
            match client.request_text(request).await {
                Ok(_) => return Ok(()),
                Err(error) => self.pause(&deadline, error).await?,
            }
        }
    }

    /// Kills the API server and starts it again.
    ///
    /// # Errors
    ///
    /// As of [`start_api_server`](Self::start_api_server).
    pub async fn restart_api_server(&self) -> Result<()> {
        self.stop_api_server();
        self.start_api_server().await
    }

    /// Starts the controller manager, again if it runs, and waits until it has completed the namespace `default`.
    async fn start_controllers(&self) -> Result<()> {
        let directory = self.directory.path();
        let options =
            options::controller_manager(&self.pki, &directory.join("controller-manager.kubeconfig"));
        self.components().controller_manager = None;
        self.components().controller_manager =
            Some(Component::start(&self.kube, "kube-controller-manager", &options, directory)?);
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client()?, "default");
        let deadline = Deadline::new("the controllers are ready");
        loop {
            match accounts.get_opt("default").await {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => self.pause(&deadline, "no service account in the namespace default").await?,
                Err(error) => self.pause(&deadline, error).await?,
            }
        }
    }

    /// Waits until the next attempt, unless a component has ended.
    async fn pause(&self, deadline: &Deadline, found: impl fmt::Display) -> Result<()> {
        for component in self.components().running() {
            component.check()?;
        }
        match deadline.pause(found).await {
            Err(error) => {
                let logs: Vec<_> =
                    self.components().running().map(|component| component.last_lines()).collect();
                Err(error.with_lines(&logs.join("\n")))
            }
            waited => waited,
        }
    }

    fn components(&self) -> MutexGuard<'_, Components> {
        self.components.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn audit_log(&self) -> PathBuf {
        self.directory.path().join("audit.log")
    }
}

/// Returns the program with the components.
fn program() -> Result<PathBuf> {
    let help = "run `make test-kubevirt`, which builds it";
    let Some(path) = env::var_os(KUBE) else {
        return Err(Error::new(format!(
            "expected the program of the control plane in {KUBE}, but found none: {help}"
        )));
    };
    let path = Path::new(&path);
    path.canonicalize()
        .context(|| format!("expected the program of the control plane at {}: {help}", path.display()))
}

fn server(ports: Ports) -> String {
    format!("https://127.0.0.1:{}", ports.api_server)
}

/// Creates or replaces an object.
async fn apply<K>(api: &Api<K>, name: &str, object: &K) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
{
    let params = PatchParams::apply("rudder-kubevirt-double").force();
    let applied = api.patch(name, &params, &Patch::Apply(object)).await;
    applied.context(|| format!("cannot apply the {} {name}", K::kind(&())))?;
    Ok(())
}
