//! The conformance suite of `rudder_core::testing` on a real control plane, with a double of KubeVirt and CDI whose machines run on
//! QEMU. Needs what `make test-kubevirt` builds.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use async_trait::async_trait;
use common::{LEASE, TestCluster, backend, create_namespace, images::Images};
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Secret},
};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject, ListParams, ObjectMeta},
    core::NamespaceResourceScope,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Backend, LabId},
    digest::Digest,
    plan::PlannedUrl,
    testing::{self, Adapter, BadImages, Echo, GuestImage, Options, Owners},
};
use rudder_kubevirt::KubevirtBackend;
use rudder_kubevirt_double::{cluster::client_of, double::Double};
use serde::de::DeserializeOwned;
use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use url::Url;

/// Set in a process that plays an owner: the kubeconfig, and the URL of the guest's image.
const KUBECONFIG: &str = "RUDDER_TEST_KUBECONFIG";
const IMAGE: &str = "RUDDER_TEST_IMAGE";
const NAMESPACE: &str = "conformance";
const TEST: &str = "the_kubevirt_backend_fulfils_the_contract";
/// The port of the guest's echo service.
const ECHO: u16 = 7;

struct KubevirtAdapter {
    kubeconfig: PathBuf,
    image: Url,
    /// What only the process that runs the suite has.
    outside: Option<Outside>,
}

struct Outside {
    client: Client,
    double: Arc<Double>,
    images: Images,
}

impl fmt::Debug for KubevirtAdapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubevirtAdapter").field("kubeconfig", &self.kubeconfig).finish_non_exhaustive()
    }
}

impl KubevirtAdapter {
    fn outside(&self) -> &Outside {
        self.outside.as_ref().unwrap()
    }

    async fn list<K>(&self, kind: &'static str, found: &mut Vec<(&'static str, ObjectMeta)>) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.outside().client.clone(), NAMESPACE);
        let listed = api.list_metadata(&ListParams::default()).await.map_err(failed)?;
        found.extend(listed.items.into_iter().map(|object| (kind, object.metadata)));
        Ok(())
    }

    async fn list_custom(
        &self,
        group: &str,
        version: &str,
        kind: &'static str,
        plural: &str,
        found: &mut Vec<(&'static str, ObjectMeta)>,
    ) -> Result<()> {
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: format!("{group}/{version}"),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.outside().client.clone(), NAMESPACE, &resource);
        let listed = api.list(&ListParams::default()).await.map_err(failed)?;
        found.extend(listed.items.into_iter().map(|object| (kind, object.metadata)));
        Ok(())
    }
}

/// Describes an object, with the id of its lab; `None` for what belongs to the namespace, and for cached imports. An object of the
/// version of a module that counts is described by the module alone, so that the line stays when the module is published again.
fn line(kind: &str, metadata: &ObjectMeta, current: &BTreeSet<String>) -> Option<String> {
    let name = metadata.name.as_deref().unwrap_or_default();
    if matches!(name, "kube-root-ca.crt")
        || name.starts_with("rudder-cache-")
        || name.starts_with("importer-rudder-cache-")
    {
        return None;
    }
    if owner_or_self(metadata).any(|name| current.contains(name)) {
        return Some(format!("{kind} of a module"));
    }
    let lab = metadata.labels.as_ref().and_then(|labels| labels.get("rudder-vm.github.io/lab"));
    Some(format!("{kind} {name} {}", lab.map(String::as_str).unwrap_or_default()).trim_end().to_owned())
}

/// Returns the name of an object, and those of its owners.
fn owner_or_self(metadata: &ObjectMeta) -> impl Iterator<Item = &String> {
    metadata.name.iter().chain(metadata.owner_references.iter().flatten().map(|owner| &owner.name))
}

fn failed(error: kube::Error) -> Error {
    Error::new(ErrorKind::Protocol, "cannot list objects").with_source(error)
}

#[async_trait]
impl Adapter for KubevirtAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(backend(&self.kubeconfig, NAMESPACE).build())
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.backend())
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let configs: Api<ConfigMap> = Api::namespaced(self.outside().client.clone(), NAMESPACE);
        let configs = configs.list(&ListParams::default()).await.map_err(failed)?.items;
        let mut current: BTreeSet<String> =
            configs.into_iter().filter_map(|config| config.data?.remove("version")).collect();
        self.list::<Lease>("Lease", &mut found).await?;
        self.list::<Secret>("Secret", &mut found).await?;
        self.list::<ConfigMap>("ConfigMap", &mut found).await?;
        self.list::<PersistentVolumeClaim>("PersistentVolumeClaim", &mut found).await?;
        self.list::<Pod>("Pod", &mut found).await?;
        self.list_custom("kubevirt.io", "v1", "VirtualMachine", "virtualmachines", &mut found).await?;
        self.list_custom(
            "kubevirt.io",
            "v1",
            "VirtualMachineInstance",
            "virtualmachineinstances",
            &mut found,
        )
        .await?;
        self.list_custom("cdi.kubevirt.io", "v1beta1", "DataVolume", "datavolumes", &mut found).await?;
        // What a version owns, and the claims that its DataVolumes own.
        let owned: Vec<String> = found
            .iter()
            .filter(|(_, metadata)| owner_or_self(metadata).any(|name| current.contains(name)))
            .filter_map(|(_, metadata)| metadata.name.clone())
            .collect();
        current.extend(owned);
        let lines = found.iter().filter_map(|(kind, metadata)| line(kind, metadata, &current));
        let mut lines: Vec<String> = lines.collect();
        lines.sort();
        Ok(lines)
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        self.outside().double.kill(NAMESPACE, &KubevirtBackend::virtual_machine_name(lab, machine)).await
    }

    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool> {
        Ok(self.outside().double.is_running(NAMESPACE, &KubevirtBackend::virtual_machine_name(lab, machine)))
    }

    fn guest(&self) -> Option<GuestImage> {
        let mut guest = GuestImage::new(PlannedUrl::new(self.image.clone()));
        guest.echo = Some(Echo::new(ECHO, Some(format!("nc -ll -p {ECHO} -e cat >/dev/null 2>&1 &"))));
        let command = [
            "<waitText 'login:' 3m>tester<enter>",
            "<waitText 'assword:' 1m>tester<enter>",
            "<waitText '$' 1m>echo typed on the screen >/tmp/typed<enter>",
        ];
        guest.boot_command = Some(command.map(str::to_owned).to_vec());
        // The guest is emulated.
        guest.large = 4 << 20;
        guest.serial_says = Some("login:".to_owned());
        Some(guest)
    }

    fn bad_images(&self) -> Option<BadImages> {
        let images = &self.outside.as_ref()?.images;
        Some(BadImages::new(images.url("missing.qcow2"), images.url("broken.qcow2")))
    }

    fn published(&self, bytes: &[u8]) -> Option<Url> {
        let images = &self.outside.as_ref()?.images;
        Some(images.add(&format!("published-{}", Digest::of(bytes)), bytes.to_owned()))
    }

    fn owners(&self) -> Owners {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", TEST, "--nocapture"]);
        command.env(KUBECONFIG, &self.kubeconfig).env(IMAGE, self.image.as_str());
        Owners::Process(command)
    }
}

/// Plays an owner, if this process was started for that.
async fn owner() {
    if let (Some(kubeconfig), Ok(image)) = (std::env::var_os(KUBECONFIG), std::env::var(IMAGE)) {
        let adapter =
            KubevirtAdapter { kubeconfig: kubeconfig.into(), image: image.parse().unwrap(), outside: None };
        panic!("{:?}", testing::own(Arc::new(adapter)).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubevirt_backend_fulfils_the_contract() {
    owner().await;
    let tiny = fs::read(common::guests().join("tiny.qcow2")).unwrap();
    // The magic number of qcow2 (docs/interop/qcow2.txt), followed by nothing valid.
    let broken = [b"QFI\xfb".as_slice(), &[0xff; 4096]].concat();
    let images = Images::serve([("tiny.qcow2", tiny), ("broken.qcow2", broken)]).await;
    let cluster = TestCluster::start().await;
    create_namespace(&cluster.cluster, NAMESPACE).await;
    let kubeconfig = cluster.cluster.kubeconfig();
    let client = client_of(&kubeconfig).await.unwrap();
    let image = images.url("tiny.qcow2");
    let outside = Outside { client, double: Arc::clone(&cluster.double), images };
    let adapter = KubevirtAdapter { kubeconfig, image, outside: Some(outside) };
    let mut options = Options::new();
    // A dead owner is noticed when its lease has expired.
    options.settle = 4 * LEASE;
    options.only = std::env::var("RUDDER_SUITE_ONLY").ok();
    let report = testing::run(Arc::new(adapter), &options).await;
    println!("{report}");
    report.assert_passed();
    report.assert_documented(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backends.md"));
}
