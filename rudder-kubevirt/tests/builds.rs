//! Whole builds on a real control plane, with a double of KubeVirt and CDI whose machines are those of the memory backend: what a
//! build needs of the cluster, and what its author reads when the cluster fails it.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use common::{LEASE, backend, create_namespace, images::Images, start_double};
use futures::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use k8s_openapi::api::{
    core::v1::{Namespace, ResourceQuota},
    rbac::v1::PolicyRule,
};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use rudder_core::{
    ErrorKind, Result,
    backend::{Backend, Death},
    build::Build,
    memory::{MemoryBackend, Response},
    module::Module,
    plan::{PlanContext, prepare},
};
use rudder_kubevirt::KubevirtBackend;
use rudder_kubevirt_double::{
    cluster::{Cluster, Options},
    double::{self, Double, Fault},
};
use serde_json::{Value, from_value, json};
use std::{collections::BTreeSet, panic::AssertUnwindSafe, path::Path, sync::Arc, time::Duration};

/// How long a build in these tests may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What the tests share: one cluster, because starting it takes longer than they do.
struct Bench {
    cluster: Cluster,
    double: Double,
    images: Images,
}

impl Bench {
    async fn start() -> Self {
        let node = MemoryBackend::new()
            .every_machine(|guest| guest.on("crash now", Response::ok("").dies(Death::GuestPanic)));
        let cluster = Cluster::start(Options::default()).await.unwrap();
        let double = start_double(&cluster, Arc::new(node), double::Options::default()).await;
        let images = Images::serve([("debian.qcow2", empty_image())]).await;
        Self { cluster, double, images }
    }

    async fn namespace(&self, name: &str) {
        create_namespace(&self.cluster, name).await;
    }

    /// Returns a backend in a new namespace, as the administrator of the cluster.
    async fn backend(&self, namespace: &str) -> Arc<KubevirtBackend> {
        self.namespace(namespace).await;
        Arc::new(backend(&self.cluster.kubeconfig(), namespace).build())
    }

    /// Returns a manifest of one VM from a source.
    fn manifest(&self, module: &str, vm: &str, source: &str) -> String {
        let url = self.images.url("debian.qcow2");
        let source = source.replace("IMAGE", url.as_str());
        // The disks of a VM of a module are inherited.
        let disks = if source.contains("buildRef") { "[]" } else { "[{name: root, size: 4Gi}]" };
        format!(
            "name: {module}\nvms:\n- name: {vm}\n  source: {source}\n  resources: {{cpu: 1, memory: 64Mi}}\n  disks: {disks}\n  cloudInit: {{}}\n  \
             communicator: {{sshUsername: debian}}\n  provisioners:\n  - {{type: shell, shell: {{inline: 'echo from {module}'}}}}\n"
        )
    }

    fn image_manifest(&self, module: &str) -> String {
        self.manifest(module, "web", "{url: 'IMAGE'}")
    }
}

/// Returns the header of a qcow2 image (QEMU, docs/interop/qcow2.txt) of 4 GiB: machines in memory do not read more of it.
fn empty_image() -> Vec<u8> {
    let mut image = vec![0; 512];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    image[24..32].copy_from_slice(&(4_u64 << 30).to_be_bytes());
    image
}

async fn build(backend: &Arc<KubevirtBackend>, manifest: &str) -> Result<Module> {
    let context = PlanContext::new(backend.capabilities()).modules(backend.modules().await?);
    let mut plans = prepare("test.yaml", manifest.as_bytes(), &context).into_plans()?;
    let build = Build::new(plans.remove(0), Arc::clone(backend) as Arc<dyn Backend>).start();
    let mut events = build.events();
    let mut last = Vec::new();
    let ended = async {
        while let Some(event) = events.next().await {
            last.push(event.to_string());
        }
        build.outcome().await
    };
    match tokio::time::timeout(LIMIT, ended).await {
        Ok(outcome) => outcome,
        Err(_) => panic!("the build did not end within {LIMIT:?}; its events: {last:#?}"),
    }
}

/// Waits until a build has opened its lab.
async fn lab_exists(backend: &KubevirtBackend) {
    while backend.labs().await.unwrap_or_default().is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns what a person reads about a build that must fail.
async fn failure(backend: &Arc<KubevirtBackend>, manifest: &str) -> String {
    match build(backend, manifest).await {
        Ok(module) => panic!("expected a failed build, but it made {}", module.name),
        Err(error) => error.report(),
    }
}

#[track_caller]
fn says(report: &str, texts: &[&str]) {
    for text in texts {
        assert!(report.contains(text), "expected {text:?} in:\n{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_on_a_cluster() {
    let bench = Bench::start().await;
    macro_rules! concurrently {
        ($($test:ident),+ $(,)?) => {
            [$((stringify!($test), $test(&bench).boxed())),+]
        };
    }
    let tests = concurrently![
        a_module_is_built_upon_another,
        a_build_needs_the_documented_rights_and_no_others,
        a_missing_right_is_named,
        an_expired_token_is_reported,
        an_image_that_does_not_exist_is_reported,
        a_machine_that_no_node_can_run_is_reported,
        a_quota_is_reported,
        a_machine_that_panics_is_reported,
        a_namespace_that_is_deleted_ends_the_build,
        what_a_killed_builder_leaves_is_reaped,
    ];
    let mut failed: Vec<_> = run(tests).await;
    // They stop the API server, which all others need.
    failed.extend(run(concurrently![a_build_goes_on_when_the_api_server_restarts]).await);
    failed.extend(run(concurrently![a_cluster_that_does_not_answer_is_reported]).await);
    assert!(failed.is_empty(), "failed: {failed:?}");
    bench.double.stop().await.unwrap();
}

/// Runs tests at once, and returns the names of those that failed.
async fn run<const COUNT: usize>(tests: [(&'static str, BoxFuture<'_, ()>); COUNT]) -> Vec<&'static str> {
    let run = tests.map(|(name, test)| async move {
        let passed = AssertUnwindSafe(test).catch_unwind().await.is_ok();
        println!("{name}: {}", if passed { "passed" } else { "FAILED" });
        (!passed).then_some(name)
    });
    join_all(run).await.into_iter().flatten().collect()
}

async fn a_module_is_built_upon_another(bench: &Bench) {
    let backend = bench.backend("layers").await;
    let base = build(&backend, &bench.image_manifest("base")).await.unwrap();
    assert_eq!(base.machines[0].disks[0].format, "raw");
    let top = build(&backend, &bench.manifest("top", "web", "{buildRef: {name: base}}")).await.unwrap();
    let names: Vec<String> = backend.modules().await.unwrap().into_iter().map(|module| module.name).collect();
    assert_eq!(names, ["base", "top"]);
    assert_eq!(top.provenance.inputs[0].content, base.machines[0].disks[0].content);
    backend.remove_module("top").await.unwrap();
    backend.remove_module("base").await.unwrap();
    assert!(backend.labs().await.unwrap().is_empty());
}

/// Returns the rules of the documented Role.
fn documented_rules() -> Vec<PolicyRule> {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kubevirt-role.yaml"))
            .unwrap();
    let documents = serde_yaml::Deserializer::from_str(&text);
    let mut documents = documents.map(|document| serde::Deserialize::deserialize(document).unwrap());
    let role: Value = documents.find(|document: &Value| document["kind"] == "Role").unwrap();
    from_value(role["rules"].clone()).unwrap()
}

async fn a_build_needs_the_documented_rights_and_no_others(bench: &Bench) {
    const USER: &str = "system:serviceaccount:rights:builder";
    bench.namespace("rights").await;
    let rules = documented_rules();
    let kubeconfig = bench.cluster.service_account("builder", "rights", rules.clone()).await.unwrap();
    let backend = Arc::new(backend(&kubeconfig, "rights").build());
    assert!(backend.diagnose().await.unwrap().is_ready());
    build(&backend, &bench.image_manifest("base")).await.unwrap();
    build(&backend, &bench.manifest("top", "web", "{buildRef: {name: base}}")).await.unwrap();
    backend.reap().await.unwrap();
    backend.collect().await.unwrap();
    backend.remove_module("top").await.unwrap();

    let allowed: BTreeSet<(String, String)> = rules
        .iter()
        .flat_map(|rule| {
            let resources = rule.resources.clone().unwrap_or_default();
            resources
                .into_iter()
                .flat_map(|resource| rule.verbs.iter().map(move |verb| (resource.clone(), verb.clone())))
        })
        .collect();
    let mut used = BTreeSet::new();
    for entry in bench.cluster.audit().unwrap().into_iter().filter(|entry| entry.user == USER) {
        // What every user may ask: the version of KubeVirt, the resources of the API, and what it may do.
        if entry.resource.is_empty()
            || entry.resource.starts_with("selfsubject")
            || entry.resource == "version"
        {
            continue;
        }
        if entry.resource == "storageclasses" {
            assert_eq!(entry.code, 403, "storage classes belong to the cluster");
            continue;
        }
        let subresource = entry.subresource.split('/').next().filter(|subresource| !subresource.is_empty());
        let resource = subresource
            .map_or(entry.resource.clone(), |subresource| format!("{}/{subresource}", entry.resource));
        used.insert((resource, entry.verb));
    }
    let beyond: Vec<_> = used.difference(&allowed).collect();
    assert!(beyond.is_empty(), "used without being documented: {beyond:?}");
}

async fn a_missing_right_is_named(bench: &Bench) {
    bench.namespace("forbidden").await;
    let rules = documented_rules();
    let rules =
        rules.into_iter().filter(|rule| rule.resources.as_deref() != Some(&["datavolumes".to_owned()]));
    let kubeconfig = bench.cluster.service_account("builder", "forbidden", rules.collect()).await.unwrap();
    let backend = Arc::new(backend(&kubeconfig, "forbidden").build());
    let report = failure(&backend, &bench.image_manifest("base")).await;
    says(
        &report,
        &[
            "add this rule to a Role",
            "{apiGroups: [\"cdi.kubevirt.io\"], resources: [\"datavolumes\"], verbs: [\"create\"]}",
        ],
    );
    let found = backend.diagnose().await.unwrap();
    assert!(!found.is_ready());
    assert!(
        found.findings.iter().any(|finding| finding.detail.contains("may not create datavolumes")),
        "{found:?}"
    );
}

async fn an_expired_token_is_reported(bench: &Bench) {
    bench.namespace("expired").await;
    let kubeconfig = bench.cluster.kubeconfig_for_token("no-such-token", "expired").unwrap();
    let backend = Arc::new(backend(&kubeconfig, "expired").build());
    let report = failure(&backend, &bench.image_manifest("base")).await;
    says(&report, &["the cluster does not accept the credentials", "log in again"]);
}

async fn an_image_that_does_not_exist_is_reported(bench: &Bench) {
    let backend = bench.backend("missing-image").await;
    let manifest = bench.image_manifest("base").replace("debian.qcow2", "absent.qcow2");
    says(&failure(&backend, &manifest).await, &["404", "absent.qcow2", "check the URL"]);
}

async fn a_machine_that_no_node_can_run_is_reported(bench: &Bench) {
    const WHY: &str = "0/3 nodes are available: 3 Insufficient memory.";
    bench.namespace("full").await;
    bench.double.order_in("full", Fault::Unschedulable { message: WHY.to_owned() });
    let limit = Duration::from_secs(5);
    let backend = Arc::new(backend(&bench.cluster.kubeconfig(), "full").start_limit(limit).build());
    says(&failure(&backend, &bench.image_manifest("base")).await, &["does not run after 5s", WHY]);
    bench.double.relieve_in("full");
}

async fn a_quota_is_reported(bench: &Bench) {
    let backend = bench.backend("quota").await;
    let quotas: Api<ResourceQuota> = Api::namespaced(bench.cluster.client().unwrap(), "quota");
    let quota = json!({"metadata": {"name": "small"}, "spec": {"hard": {"persistentvolumeclaims": "0"}}});
    quotas.create(&PostParams::default(), &from_value(quota).unwrap()).await.unwrap();
    says(&failure(&backend, &bench.image_manifest("base")).await, &["exceeded quota", "raise its quota"]);
}

async fn a_machine_that_panics_is_reported(bench: &Bench) {
    let backend = bench.backend("panic").await;
    let report =
        failure(&backend, &bench.image_manifest("base").replace("echo from base", "crash now")).await;
    says(&report, &["panic"]);
}

async fn a_namespace_that_is_deleted_ends_the_build(bench: &Bench) {
    let backend = bench.backend("deleted").await;
    bench.double.order_in("deleted", Fault::SlowStorage);
    let manifest = bench.image_manifest("base");
    let building = failure(&backend, &manifest);
    let namespaces: Api<Namespace> = Api::all(bench.cluster.client().unwrap());
    let deleting = async {
        lab_exists(&backend).await;
        namespaces.delete("deleted", &DeleteParams::default()).await.unwrap();
    };
    let (report, ()) = tokio::join!(building, deleting);
    assert!(!report.is_empty());
    bench.double.relieve_in("deleted");
}

async fn what_a_killed_builder_leaves_is_reaped(bench: &Bench) {
    let backend = bench.backend("killed").await;
    bench.double.order_in("killed", Fault::SlowStorage);
    let manifest = bench.image_manifest("base");
    // A builder that is dropped in the middle renews its lease no longer, as one that was killed.
    tokio::select! {
        built = build(&backend, &manifest) => panic!("expected the build to wait for its storage, but found {built:?}"),
        () = lab_exists(&backend) => {}
    }
    bench.double.relieve_in("killed");
    let gone = async {
        while !backend.labs().await.unwrap().is_empty() {
            backend.reap().await.unwrap();
            tokio::time::sleep(LEASE / 4).await;
        }
    };
    tokio::time::timeout(LIMIT, gone).await.expect("the lab of a dead builder is reaped");
    // The next build on the same cluster is not disturbed by what was interrupted.
    build(&backend, &manifest).await.unwrap();
}

async fn a_build_goes_on_when_the_api_server_restarts(bench: &Bench) {
    let backend = bench.backend("restart").await;
    bench.double.order_in("restart", Fault::SlowStorage);
    let manifest = bench.image_manifest("base");
    let restarting = async {
        lab_exists(&backend).await;
        bench.cluster.restart_api_server().await.unwrap();
        bench.double.relieve_in("restart");
    };
    let (built, ()) = tokio::join!(build(&backend, &manifest).boxed(), restarting);
    match built {
        Ok(module) => assert_eq!(module.name, "base"),
        // The lease of the tests is so short that a restart may outlast it.
        Err(error) => {
            let clear = matches!(error.kind(), ErrorKind::Conflict | ErrorKind::HostMissing);
            assert!(clear, "{}", error.report());
        }
    }
}

async fn a_cluster_that_does_not_answer_is_reported(bench: &Bench) {
    let backend = bench.backend("unreachable").await;
    let manifest = bench.image_manifest("base");
    backend.labs().await.unwrap();
    bench.cluster.stop_api_server();
    says(&failure(&backend, &manifest).await, &["the cluster does not answer", "kubectl cluster-info"]);
    bench.cluster.start_api_server().await.unwrap();
}
