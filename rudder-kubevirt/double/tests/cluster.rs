//! The control plane does what the tests of the KubeVirt backend, and the double of KubeVirt, rely on.
#![allow(clippy::print_stderr, clippy::unwrap_used, missing_docs)]

use futures::{StreamExt, pin_mut};
use k8s_openapi::{
    api::{
        core::v1::{ConfigMap, Namespace},
        rbac::v1::PolicyRule,
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, Error, Resource, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, ObjectMeta, PostParams},
    runtime::{
        WatchStreamExt,
        wait::{await_condition, conditions},
        watcher,
    },
};
use rudder_kubevirt_double::cluster::{Cluster, Options, client_of};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long the cluster may take for what it does by itself.
const LIMIT: Duration = Duration::from_secs(60);

// One cluster for everything: starting it takes longer than the rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_for_tests() {
    let started = Instant::now();
    let cluster = Cluster::start(Options::default()).await.unwrap();
    eprintln!("the cluster started in {:.1} s", started.elapsed().as_secs_f64());
    let client = cluster.client().unwrap();

    crds_are_served_and_check_types(&client).await;
    garbage_collection_removes_what_a_machine_owns(&client).await;
    a_service_account_may_do_what_it_was_granted(&cluster).await;
    a_watch_survives_a_restart_of_the_api_server(&cluster).await;
    other_crds_are_collected_once_they_are_installed(&cluster).await;
    a_namespace_is_removed_with_its_objects(&client).await;
}

fn resource(group: &str, version: &str, kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}

fn machines(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &resource("kubevirt.io", "v1", "VirtualMachine"))
}

fn machine(name: &str, strategy: &Value) -> DynamicObject {
    let spec = json!({ "runStrategy": strategy, "template": { "spec": { "domain": { "devices": {} } } } });
    DynamicObject::new(name, &resource("kubevirt.io", "v1", "VirtualMachine")).data(json!({ "spec": spec }))
}

fn config_map(name: &str) -> ConfigMap {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    ConfigMap { metadata, ..ConfigMap::default() }
}

async fn crds_are_served_and_check_types(client: &Client) {
    let machines = machines(client, "default");
    let created = machines.create(&PostParams::default(), &machine("typed", &json!("Manual"))).await.unwrap();
    assert_eq!(created.data["spec"]["runStrategy"], "Manual");
    let refused = machines.create(&PostParams::default(), &machine("untyped", &json!(7))).await.unwrap_err();
    let Error::Api(status) = refused else { panic!("expected a refusal, but found {refused:?}") };
    assert_eq!(status.code, 422, "{status:?}");
    assert!(status.message.contains("spec.runStrategy"), "{status:?}");

    // A machine's status is a subresource, an instance's is not.
    let mut changed = created.clone();
    changed.data["status"] = json!({ "printableStatus": "Stopped" });
    let changed = machines.replace("typed", &PostParams::default(), &changed).await.unwrap();
    assert_eq!(changed.data.get("status"), None);
    let volumes = resource("cdi.kubevirt.io", "v1beta1", "DataVolume");
    let volumes: Api<DynamicObject> = Api::all_with(client.clone(), &volumes);
    assert!(volumes.list(&ListParams::default()).await.unwrap().items.is_empty());
}

async fn garbage_collection_removes_what_a_machine_owns(client: &Client) {
    let machine = machines(client, "default").get("typed").await.unwrap();
    owner_takes_its_config_map_along(client, &machines(client, "default"), &machine).await;
}

/// Creates a ConfigMap that this object owns, deletes the object, and waits until the ConfigMap is gone.
async fn owner_takes_its_config_map_along(
    client: &Client,
    owners: &Api<DynamicObject>,
    owner: &DynamicObject,
) {
    let types = owner.types.clone().unwrap();
    let name = format!("of-{}", owner.name_any());
    let mut owned = config_map(&name);
    owned.owner_references_mut().push(OwnerReference {
        api_version: types.api_version,
        kind: types.kind,
        name: owner.name_any(),
        uid: owner.uid().unwrap(),
        ..OwnerReference::default()
    });
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let owned = maps.create(&PostParams::default(), &owned).await.unwrap();
    owners.delete(&owner.name_any(), &DeleteParams::default()).await.unwrap();
    let started = Instant::now();
    let uid = owned.uid().unwrap();
    let gone = await_condition(maps, &name, conditions::is_deleted(&uid));
    tokio::time::timeout(LIMIT, gone).await.expect("the owned object is removed").unwrap();
    eprintln!("{name} was removed after {:.1} s", started.elapsed().as_secs_f64());
}

async fn a_service_account_may_do_what_it_was_granted(cluster: &Cluster) {
    let rule = PolicyRule {
        api_groups: Some(vec![String::new()]),
        resources: Some(vec!["configmaps".to_owned()]),
        verbs: vec!["create".to_owned(), "get".to_owned()],
        ..PolicyRule::default()
    };
    let kubeconfig = cluster.service_account("builder", "default", vec![rule]).await.unwrap();
    let client = client_of(&kubeconfig).await.unwrap();
    assert_eq!(client.default_namespace(), "default");
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    maps.create(&PostParams::default(), &config_map("granted")).await.unwrap();
    let refused = machines(&client, "default").list(&ListParams::default()).await.unwrap_err();
    let Error::Api(status) = refused else { panic!("expected a refusal, but found {refused:?}") };
    assert_eq!(status.code, 403, "{status:?}");
    let expected = "cannot list resource \"virtualmachines\" in API group \"kubevirt.io\"";
    assert!(status.message.contains(expected), "{status:?}");

    // The log has what was granted and what was not, and nothing else of this user.
    let user = "system:serviceaccount:default:builder";
    cluster.audited(|entry| entry.user == user && entry.code == 403).await.unwrap();
    cluster.audited(|entry| entry.user == user && entry.code == 201).await.unwrap();
    let entries = cluster.audit().unwrap();
    let of_user = entries.iter().filter(|entry| entry.user == user);
    let found: Vec<_> = of_user
        .map(|entry| {
            (&*entry.verb, &*entry.group, &*entry.resource, &*entry.namespace, &*entry.name, entry.code)
        })
        .collect();
    assert_eq!(
        found,
        [
            ("create", "", "configmaps", "default", "granted", 201),
            ("list", "kubevirt.io", "virtualmachines", "default", "", 403),
        ]
    );

    let kubeconfig = cluster.kubeconfig_for_token("made-up", "default").unwrap();
    let stranger = client_of(&kubeconfig).await.unwrap();
    let refused = stranger.apiserver_version().await.unwrap_err();
    assert!(matches!(&refused, Error::Api(status) if status.code == 401), "{refused:?}");
}

async fn a_watch_survives_a_restart_of_the_api_server(cluster: &Cluster) {
    let client = cluster.client().unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let watch = watcher(maps.clone(), watcher::Config::default()).default_backoff().applied_objects();
    pin_mut!(watch);
    let mut seen = async |name: &str| {
        let found = async {
            loop {
                match watch.next().await.expect("a watch does not end") {
                    Ok(object) if object.name_any() == name => return,
                    // It says that the connection broke, and connects again.
                    Ok(_) | Err(_) => {}
                }
            }
        };
        tokio::time::timeout(LIMIT, found).await.unwrap_or_else(|_| panic!("no event of {name}"));
    };
    maps.create(&PostParams::default(), &config_map("before")).await.unwrap();
    seen("before").await;
    let started = Instant::now();
    cluster.stop_api_server();
    client.apiserver_version().await.expect_err("the API server is stopped");
    cluster.start_api_server().await.unwrap();
    eprintln!("the API server restarted in {:.1} s", started.elapsed().as_secs_f64());
    maps.create(&PostParams::default(), &config_map("after")).await.unwrap();
    seen("after").await;
}

async fn other_crds_are_collected_once_they_are_installed(cluster: &Cluster) {
    let unknown = cluster.install_crds(&["machines.example.org"]).await.unwrap_err().to_string();
    assert!(unknown.contains("but found machines.example.org"), "{unknown}");
    cluster.install_crds(&["virtualmachineexports.export.kubevirt.io"]).await.unwrap();
    let client = cluster.client().unwrap();
    let kind = resource("export.kubevirt.io", "v1", "VirtualMachineExport");
    let exports: Api<DynamicObject> = Api::namespaced_with(client.clone(), "default", &kind);
    let source = json!({ "apiGroup": "", "kind": "PersistentVolumeClaim", "name": "disk" });
    let export = DynamicObject::new("export", &kind).data(json!({ "spec": { "source": source } }));
    let export = exports.create(&PostParams::default(), &export).await.unwrap();
    owner_takes_its_config_map_along(&client, &exports, &export).await;
}

async fn a_namespace_is_removed_with_its_objects(client: &Client) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let metadata = ObjectMeta { name: Some("lab".to_owned()), ..ObjectMeta::default() };
    let namespace = Namespace { metadata, ..Namespace::default() };
    let created = namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    machines(client, "lab").create(&PostParams::default(), &machine("web", &json!("Manual"))).await.unwrap();
    namespaces.delete("lab", &DeleteParams::default()).await.unwrap();
    let gone =
        await_condition(namespaces, "lab", conditions::is_deleted(created.meta().uid.as_ref().unwrap()));
    tokio::time::timeout(LIMIT, gone).await.expect("the namespace is removed").unwrap();
}
