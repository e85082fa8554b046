//! The double of KubeVirt and CDI does what their documentation says, as far as the KubeVirt backend depends on it. Its node is
//! the memory backend; the cluster is real.
#![allow(clippy::unwrap_used, missing_docs)]

use futures::{SinkExt, StreamExt};
use http::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Event, Namespace, PersistentVolumeClaim, Pod, ResourceQuota, Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, PostParams},
    client::Body,
    runtime::wait::await_condition,
};
use rudder_core::{
    ErrorKind,
    backend::Death,
    memory::{self, MemoryBackend},
};
use rudder_kubevirt_double::{
    cluster::{Cluster, Options},
    double::{self, Double, Fault, ServingTls},
};
use serde_json::{Value, from_value, json};
use std::{sync::Arc, time::Duration};
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::client::generate_key, protocol::Role},
};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);
const GROUP: &str = "subresources.kubevirt.io";
const IMAGE: &str = "http://images.example/debian.qcow2";
const MISSING: &str = "http://images.example/missing.qcow2";
const CHANGED: &str = "http://images.example/changed.qcow2";

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

// One cluster for everything: starting it takes longer than the rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_double_of_kubevirt_and_cdi() {
    let cluster = Cluster::start(Options::default()).await.unwrap();
    let node = MemoryBackend::new()
        .source(MISSING, |source| source.fails(memory::Fault::new(ErrorKind::NotFound, "it is not there")))
        .source(CHANGED, memory::Source::wrong_checksum)
        .machine("crashes", |guest| guest.dies_after_power_on(Death::GuestPanic, Duration::from_millis(200)));
    let (identity, client) = (cluster.serving(), cluster.client().unwrap());
    let tls = ServingTls::new(&identity.certificate, &identity.key, cluster.front_proxy_ca());
    let double = Double::start(client.clone(), tls, Arc::new(node.clone()), double::Options::default());
    let double = double.await.unwrap();
    cluster.register_api_service(GROUP, "v1", double.port(), cluster.ca()).await.unwrap();

    let test = |name: &'static str| Tester { client: client.clone(), namespace: name };
    tokio::join!(
        volumes_are_filled(test("volumes")),
        failed_imports_are_reported(test("imports"), &double),
        a_machine_starts_and_stops(test("machine")),
        a_machine_that_panics_fails(test("panic")),
        a_second_display_evicts_the_first(test("display")),
        a_disk_is_copied_when_nothing_uses_it(test("copies")),
        an_unschedulable_machine_starts_once_there_is_room(test("room"), &double),
        quotas_hold_up_volumes_and_machines(test("quota")),
        a_lost_node_fails_its_machines(test("node"), &double),
    );
    everything_goes_on_after_a_restart_of_the_api_server(test("restart"), &cluster, &double).await;

    double.stop().await.unwrap();
    assert_eq!(node.leftovers().await, Vec::<String>::new());
}

/// A namespace of the cluster.
struct Tester {
    client: Client,
    namespace: &'static str,
}

impl Tester {
    async fn create_namespace(&self) {
        let namespace: Namespace = from_value(json!({"metadata": {"name": self.namespace}})).unwrap();
        Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    }

    fn dynamic(&self, kind: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), self.namespace, kind)
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), self.namespace)
    }

    async fn create(&self, kind: &ApiResource, name: &str, spec: Value) {
        let object = DynamicObject::new(name, kind).data(json!({"spec": spec}));
        self.dynamic(kind).create(&PostParams::default(), &object).await.unwrap();
    }

    /// Waits until an object is as wanted.
    async fn wait(
        &self,
        kind: &ApiResource,
        name: &str,
        is_wanted: impl Fn(&Value) -> bool + Send + 'static,
    ) -> Value {
        let wanted =
            move |object: Option<&DynamicObject>| object.is_some_and(|object| is_wanted(&object.data));
        let waiting = timeout(LIMIT, await_condition(self.dynamic(kind), name, wanted)).await;
        if let Ok(object) = waiting {
            return object.unwrap().unwrap().data;
        }
        let found = self.dynamic(kind).get_opt(name).await.unwrap();
        panic!("{} {}/{name} is not as wanted: {found:#?}", kind.kind, self.namespace);
    }

    /// Waits until an object does not exist.
    async fn gone(&self, kind: &ApiResource, name: &str) {
        let gone = |object: Option<&DynamicObject>| object.is_none();
        timeout(LIMIT, await_condition(self.dynamic(kind), name, gone)).await.expect(name).unwrap();
    }

    async fn delete(&self, kind: &ApiResource, name: &str) {
        self.dynamic(kind).delete(name, &DeleteParams::default()).await.unwrap();
    }

    /// Creates a DataVolume of 3 GiB.
    async fn create_volume(&self, name: &str, source: Value) {
        let claim = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "3Gi"}}});
        self.create(&volumes(), name, json!({"source": source, "pvc": claim})).await;
    }

    async fn volume_is(&self, name: &str, phase: &'static str) -> Value {
        self.wait(&volumes(), name, move |volume| volume["status"]["phase"] == phase).await
    }

    /// Creates a machine with one disk and a seed.
    async fn create_machine(&self, name: &str) {
        let disk = format!("{name}-disk");
        self.create_volume(&disk, json!({"http": {"url": IMAGE}})).await;
        let secret = json!({"metadata": {"name": name}, "stringData": {"userdata": "#cloud-config\n{}\n"}});
        let secrets: Api<Secret> = self.api();
        secrets.create(&PostParams::default(), &from_value(secret).unwrap()).await.unwrap();
        self.create(&machines(), name, machine(name, &disk)).await;
        self.wait(&machines(), name, |machine| machine["status"]["printableStatus"] == "Stopped").await;
    }

    fn path(&self, kind: &str, name: &str, subresource: &str) -> String {
        format!("/apis/{GROUP}/v1/namespaces/{}/{kind}/{name}/{subresource}", self.namespace)
    }

    async fn put(&self, name: &str, verb: &str, body: Value) -> Result<(), kube::Error> {
        loop {
            let request = Request::put(self.path("virtualmachines", name, verb));
            let request = request.header(header::CONTENT_TYPE, "application/json");
            let request = request.body(body.to_string().into_bytes()).unwrap();
            match self.client.request_text(request).await {
                // The API server has restarted, and does not know yet that the double answers.
                Err(kube::Error::Api(status)) if status.code == 503 => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                answer => return answer.map(drop),
            }
        }
    }

    /// Starts a machine.
    async fn start(&self, name: &str) {
        self.put(name, "start", json!({})).await.unwrap();
        self.instance_is(name, "Running").await;
    }

    async fn instance_is(&self, name: &str, phase: &'static str) -> Value {
        self.wait(&instances(), name, move |instance| instance["status"]["phase"] == phase).await
    }

    /// Opens a stream of an instance; the error is the code and text of the answer.
    async fn open(&self, name: &str, stream: &str) -> Result<Socket, (StatusCode, String)> {
        let request = Request::get(self.path("virtualmachineinstances", name, stream))
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::SEC_WEBSOCKET_PROTOCOL, "plain.kubevirt.io")
            .body(Body::empty())
            .unwrap();
        let response = self.client.send(request).await.unwrap();
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let status = response.status();
            let body = response.into_body().collect_bytes().await.unwrap();
            return Err((status, String::from_utf8_lossy(&body).into_owned()));
        }
        assert_eq!(response.headers()[header::SEC_WEBSOCKET_PROTOCOL], "plain.kubevirt.io");
        let upgraded = hyper::upgrade::on(response).await.unwrap();
        Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await)
    }

    /// Waits for an event with this reason, and returns its message.
    async fn event(&self, reason: &str) -> String {
        let events: Api<Event> = self.api();
        for _ in 0..200 {
            let list = events.list(&ListParams::default()).await.unwrap();
            if let Some(event) = list.items.into_iter().find(|event| event.reason.as_deref() == Some(reason))
            {
                return event.message.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("there is no event {reason} in {}", self.namespace);
    }
}

fn resource(group: &str, version: &str, kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}

fn machines() -> ApiResource {
    resource("kubevirt.io", "v1", "VirtualMachine")
}

fn instances() -> ApiResource {
    resource("kubevirt.io", "v1", "VirtualMachineInstance")
}

fn volumes() -> ApiResource {
    resource("cdi.kubevirt.io", "v1beta1", "DataVolume")
}

fn machine(secret: &str, disk: &str) -> Value {
    json!({
        "runStrategy": "Manual",
        "template": {"spec": {
            "domain": {
                "cpu": {"cores": 1},
                "memory": {"guest": "64Mi"},
                "devices": {
                    "disks": [
                        {"name": "root", "bootOrder": 1, "disk": {"bus": "virtio"}},
                        {"name": "seed", "disk": {"bus": "virtio"}},
                    ],
                    "interfaces": [{"name": "default", "masquerade": {}, "macAddress": "02:00:00:00:00:01"}],
                },
            },
            "networks": [{"name": "default", "pod": {}}],
            "volumes": [
                {"name": "root", "dataVolume": {"name": disk}},
                {"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": secret}}},
            ],
        }},
    })
}

fn condition<'v>(object: &'v Value, kind: &str) -> &'v Value {
    let conditions = object["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

fn has_condition(object: &Value, kind: &str, reason: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == kind && condition["reason"] == reason)
}

/// Returns the next bytes of a stream; `None` when it has ended.
async fn bytes(socket: &mut Socket) -> Option<Vec<u8>> {
    let next = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => return Some(bytes.to_vec()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    };
    timeout(LIMIT, next).await.expect("the stream neither continues nor ends")
}

async fn volumes_are_filled(test: Tester) {
    test.create_namespace().await;
    test.create_volume("blank", json!({"blank": {}})).await;
    test.create_volume("image", json!({"http": {"url": IMAGE}})).await;
    test.create_volume("again", json!({"pvc": {"namespace": "volumes", "name": "image"}})).await;
    for name in ["blank", "image", "again"] {
        let volume = test.volume_is(name, "Succeeded").await;
        assert_eq!(volume["status"]["progress"], "100.0%");
        assert_eq!(condition(&volume, "Ready")["status"], "True");
        assert_eq!(condition(&volume, "Bound")["message"], format!("PVC {name} Bound"));
        let claims: Api<PersistentVolumeClaim> = test.api();
        let claim = claims.get(name).await.unwrap();
        assert_eq!(claim.owner_references()[0].name, name);
        assert_eq!(claim.status.unwrap().phase.as_deref(), Some("Bound"));
    }
    // The garbage collector removes the claim.
    test.delete(&volumes(), "image").await;
    test.gone(&resource("", "v1", "PersistentVolumeClaim"), "image").await;
}

async fn failed_imports_are_reported(test: Tester, double: &Double) {
    test.create_namespace().await;
    let failed = |volume: &Value| has_condition(volume, "Running", "Error");
    test.create_volume("missing", json!({"http": {"url": MISSING}})).await;
    let volume = test.wait(&volumes(), "missing", failed).await;
    assert_eq!(volume["status"]["phase"], "ImportInProgress");
    assert_eq!(
        condition(&volume, "Running")["message"],
        "Unable to connect to http data source: expected status code 200, got 404. Status: 404 Not Found"
    );
    let checksum = format!("sha256:{}", "0".repeat(64));
    test.create_volume("changed", json!({"http": {"url": CHANGED, "checksum": checksum}})).await;
    let volume = test.wait(&volumes(), "changed", failed).await;
    let message = condition(&volume, "Running")["message"].as_str().unwrap();
    assert!(message.starts_with("Unable to process data: expected sha256 0000"), "{message}");
    double.order_in(test.namespace, Fault::ImportFails { status: 503 });
    test.create_volume("busy", json!({"http": {"url": IMAGE}})).await;
    let volume = test.wait(&volumes(), "busy", failed).await;
    assert!(condition(&volume, "Running")["message"].as_str().unwrap().ends_with("503 Service Unavailable"));
    assert!(test.event("Error").await.starts_with("Unable to"));
    test.create_volume("upload", json!({"upload": {}})).await;
    test.wait(&volumes(), "upload", failed).await;
}

async fn a_machine_starts_and_stops(test: Tester) {
    test.create_namespace().await;
    test.create_machine("web").await;
    let refused = test.open("web", "console").await.unwrap_err();
    assert_eq!(refused.0, StatusCode::NOT_FOUND, "{}", refused.1);
    assert!(refused.1.contains(r#"virtualmachineinstance.kubevirt.io \"web\" not found"#), "{}", refused.1);
    test.start("web").await;
    let running = |machine: &Value| machine["status"]["printableStatus"] == "Running";
    let machine = test.wait(&machines(), "web", running).await;
    assert_eq!((&machine["status"]["created"], &machine["status"]["ready"]), (&json!(true), &json!(true)));
    let refused = test.put("web", "start", json!({})).await.unwrap_err().to_string();
    assert!(refused.contains("VM is already running"), "{refused}");

    let mut ssh = test.open("web", "portforward/22/tcp").await.unwrap();
    let banner = bytes(&mut ssh).await.unwrap();
    assert!(banner.starts_with(b"SSH-2.0-"), "{}", String::from_utf8_lossy(&banner));
    let refused = test.open("web", "portforward/9").await.unwrap_err();
    assert_eq!(refused.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(refused.1.contains("dialing VM: dial tcp 10.244."), "{}", refused.1);
    assert!(refused.1.contains(":9: connect: connection refused"), "{}", refused.1);
    let mut console = test.open("web", "console").await.unwrap();
    console.send(Message::binary(b"\r".to_vec())).await.unwrap();

    test.put("web", "stop", json!({"gracePeriod": 20})).await.unwrap();
    test.gone(&instances(), "web").await;
    assert_eq!(bytes(&mut ssh).await, None);
    test.wait(&machines(), "web", |machine| machine["status"]["printableStatus"] == "Stopped").await;
    let refused = test.put("web", "stop", json!({})).await.unwrap_err().to_string();
    assert!(refused.contains("VM is not running"), "{refused}");
    let pods: Api<Pod> = test.api();
    assert!(pods.list(&ListParams::default()).await.unwrap().items.is_empty());

    // It starts again, and a deleted machine takes its instance along.
    test.start("web").await;
    test.delete(&machines(), "web").await;
    test.gone(&machines(), "web").await;
    test.gone(&instances(), "web").await;
}

async fn a_machine_that_panics_fails(test: Tester) {
    test.create_namespace().await;
    test.create_machine("crashes").await;
    test.put("crashes", "start", json!({})).await.unwrap();
    test.instance_is("crashes", "Failed").await;
    test.event("GuestPanicked").await;
    // It is kept until the machine is started again.
    let failed = test.dynamic(&instances()).get("crashes").await.unwrap().uid();
    test.put("crashes", "start", json!({})).await.unwrap();
    let replaced = move |object: Option<&DynamicObject>| object.is_some_and(|object| object.uid() != failed);
    timeout(LIMIT, await_condition(test.dynamic(&instances()), "crashes", replaced)).await.unwrap().unwrap();
}

async fn a_second_display_evicts_the_first(test: Tester) {
    test.create_namespace().await;
    test.create_machine("screen").await;
    test.start("screen").await;
    let mut first = test.open("screen", "vnc").await.unwrap();
    assert!(bytes(&mut first).await.unwrap().starts_with(b"RFB "));
    let refused = test.open("screen", "vnc?preserveSession=true").await.unwrap_err();
    assert_eq!(refused.0, StatusCode::INTERNAL_SERVER_ERROR, "{}", refused.1);
    let mut second = test.open("screen", "vnc").await.unwrap();
    assert!(bytes(&mut second).await.unwrap().starts_with(b"RFB "));
    while bytes(&mut first).await.is_some() {}
    second.send(Message::binary(b"RFB 003.008\n".to_vec())).await.unwrap();
    assert!(bytes(&mut second).await.is_some());
}

async fn a_disk_is_copied_when_nothing_uses_it(test: Tester) {
    test.create_namespace().await;
    test.create_machine("source").await;
    test.start("source").await;
    let from = json!({"pvc": {"namespace": test.namespace, "name": "source-disk"}});
    test.create_volume("copy", from).await;
    assert!(test.event("CloneSourceInUse").await.contains("using PersistentVolumeClaim source-disk"));
    test.volume_is("copy", "CloneScheduled").await;
    test.put("source", "stop", json!({})).await.unwrap();
    test.volume_is("copy", "Succeeded").await;
}

async fn an_unschedulable_machine_starts_once_there_is_room(test: Tester, double: &Double) {
    test.create_namespace().await;
    test.create_machine("big").await;
    let message = "0/3 nodes are available: 3 Insufficient memory.";
    double.order_in(test.namespace, Fault::Unschedulable { message: message.to_owned() });
    test.put("big", "start", json!({})).await.unwrap();
    let unschedulable = |machine: &Value| machine["status"]["printableStatus"] == "ErrorUnschedulable";
    test.wait(&machines(), "big", unschedulable).await;
    let instance = test.instance_is("big", "Scheduling").await;
    assert_eq!(condition(&instance, "PodScheduled")["message"], message);
    assert_eq!(test.event("FailedScheduling").await, message);
    double.relieve_in(test.namespace);
    test.instance_is("big", "Running").await;
}

async fn quotas_hold_up_volumes_and_machines(test: Tester) {
    test.create_namespace().await;
    test.create_machine("idle").await;
    test.volume_is("idle-disk", "Succeeded").await;
    let quotas: Api<ResourceQuota> = test.api();
    let hard = json!({"persistentvolumeclaims": "1", "pods": "0"});
    let quota = json!({"metadata": {"name": "small"}, "spec": {"hard": hard}});
    quotas.create(&PostParams::default(), &from_value(quota).unwrap()).await.unwrap();
    let counted = |quota: Option<&ResourceQuota>| {
        quota.and_then(|quota| quota.status.as_ref()?.used.as_ref()).is_some_and(|used| !used.is_empty())
    };
    timeout(LIMIT, await_condition(quotas, "small", counted)).await.unwrap().unwrap();
    test.create_volume("more", json!({"blank": {}})).await;
    let volume =
        test.wait(&volumes(), "more", |volume| has_condition(volume, "Bound", "ErrExceededQuota")).await;
    assert!(condition(&volume, "Bound")["message"].as_str().unwrap().contains("exceeded quota: small"));
    test.put("idle", "start", json!({})).await.unwrap();
    let instance = test
        .wait(&instances(), "idle", |instance| has_condition(instance, "Synchronized", "FailedCreate"))
        .await;
    assert!(
        condition(&instance, "Synchronized")["message"].as_str().unwrap().contains("exceeded quota: small")
    );
}

async fn a_lost_node_fails_its_machines(test: Tester, double: &Double) {
    test.create_namespace().await;
    test.create_machine("lost").await;
    test.start("lost").await;
    double.order_in(test.namespace, Fault::NodeLost);
    let instance = test.instance_is("lost", "Failed").await;
    assert_eq!(instance["status"]["reason"], "NodeUnresponsive");
}

async fn everything_goes_on_after_a_restart_of_the_api_server(
    test: Tester,
    cluster: &Cluster,
    double: &Double,
) {
    test.create_namespace().await;
    test.create_machine("steady").await;
    double.order_in(test.namespace, Fault::SlowStorage);
    test.create_volume("slow", json!({"http": {"url": IMAGE}})).await;
    test.volume_is("slow", "ImportInProgress").await;
    cluster.restart_api_server().await.unwrap();
    double.relieve_in(test.namespace);
    test.volume_is("slow", "Succeeded").await;
    test.start("steady").await;
    let mut ssh = test.open("steady", "portforward/22").await.unwrap();
    assert!(bytes(&mut ssh).await.is_some());
    assert!(double.open_streams() > 0);
    double.order_in(test.namespace, Fault::StreamsCut);
    while bytes(&mut ssh).await.is_some() {}
}
