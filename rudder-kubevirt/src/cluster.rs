//! The connection to a cluster, as one namespace of it is seen.

use crate::{
    errors::{is_not_found, request_failed},
    names::MANAGER,
};
use futures::TryStreamExt as _;
use http::Request;
use k8s_openapi::{
    api::coordination::v1::Lease, apimachinery::pkg::apis::meta::v1::OwnerReference, jiff::Timestamp,
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::{
        DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, PropagationPolicy, WatchEvent,
        WatchParams,
    },
    config::{KubeConfigOptions, Kubeconfig},
    core::{NamespaceResourceScope, Resource},
};
use rudder_core::{Error, ErrorKind, Result};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

/// How long a request may take before the connection counts as broken.
const READ_LIMIT: Duration = Duration::from_secs(300);
/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Where the cluster is, and as whom it is used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Access {
    /// A kubeconfig; `None` for what kubectl would use.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig; `None` for its current one.
    pub(crate) context: Option<String>,
    /// The namespace to work in; `None` for that of the context.
    pub(crate) namespace: Option<String>,
}

/// A namespace of a cluster. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    namespace: Arc<str>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads the configuration, as kubectl finds it, and prepares a client. Sends nothing.
    pub(crate) async fn connect(access: &Access) -> Result<Self> {
        let unusable = |error: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::HostMissing, "cannot find out how to reach a cluster")
                .with_help("set KUBECONFIG or the backend's kubeconfig, and check it: kubectl config view")
                .with_source(error)
        };
        let options = KubeConfigOptions { context: access.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match &access.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path).map_err(|error| unusable(error.into()))?;
                let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
                config.map_err(|error| unusable(error.into()))?
            }
            None if access.context.is_some() => {
                Config::from_kubeconfig(&options).await.map_err(|error| unusable(error.into()))?
            }
            None => Config::infer().await.map_err(|error| unusable(error.into()))?,
        };
        config.connect_timeout = Some(CONNECT_LIMIT);
        config.read_timeout = Some(READ_LIMIT);
        // A busy or restarting API server is reported, or waited for where that makes sense, instead of requests that hang.
        config.default_retry = false;
        let namespace = access.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| unusable(error.into()))?;
        Ok(Self { client, namespace: namespace.into() })
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the objects of a kind.
    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates an object. `what` names it in an error: "a volume".
    pub(crate) async fn create<K>(&self, object: &K, what: &str) -> Result<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + fmt::Debug
            + Serialize
            + DeserializeOwned,
    {
        let created = self.api().create(&post(), object).await;
        created.map_err(|error| request_failed(error, &format!("create {what}")))
    }

    /// Returns an object, if it exists.
    pub(crate) async fn find<K>(&self, name: &str, what: &str) -> Result<Option<K>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let found = self.api().get_opt(name).await;
        found.map_err(|error| request_failed(error, &format!("read {what}")))
    }

    /// Returns the objects that a label selector matches.
    pub(crate) async fn list<K>(&self, selector: &str, what: &str) -> Result<Vec<K>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let listed = self.api().list(&ListParams::default().labels(selector)).await;
        listed.map(|list| list.items).map_err(|error| request_failed(error, &format!("list {what}")))
    }

    /// Changes an object by a merge patch (RFC 7396).
    pub(crate) async fn patch<K>(&self, name: &str, patch: &Value, what: &str) -> Result<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patched = self.api().patch(name, &parameters, &Patch::Merge(patch)).await;
        patched.map_err(|error| request_failed(error, &format!("change {what}")))
    }

    /// Deletes an object. An object that does not exist is not an error. Returns whether it existed.
    pub(crate) async fn delete<K>(&self, name: &str, what: &str) -> Result<bool>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        match self.api::<K>().delete(name, &background()).await {
            Ok(_) => Ok(true),
            Err(error) if is_not_found(&error) => Ok(false),
            Err(error) => Err(request_failed(error, &format!("delete {what}"))),
        }
    }

    /// Deletes the objects that a label selector matches, and waits until they are gone.
    pub(crate) async fn delete_all<K>(&self, selector: &str, what: &str) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let matching = ListParams::default().labels(selector);
        let deleted = self.api::<K>().delete_collection(&background(), &matching).await;
        deleted.map_err(|error| request_failed(error, &format!("delete {what}")))?;
        self.gone::<K>(selector, what).await
    }

    /// Waits until no object matches a label selector.
    pub(crate) async fn gone<K>(&self, selector: &str, what: &str) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + fmt::Debug + DeserializeOwned,
    {
        let doing = || format!("wait for the end of {what}");
        loop {
            let list = ListParams::default().labels(selector);
            let watch = WatchParams::default().labels(selector);
            let listed = self.api::<K>().list(&list).await;
            let listed = listed.map_err(|error| request_failed(error, &doing()))?;
            if listed.items.is_empty() {
                return Ok(());
            }
            let version = listed.metadata.resource_version.unwrap_or_default();
            let mut left: Vec<String> = listed.items.iter().map(kube::ResourceExt::name_any).collect();
            let watch = watch.timeout(60);
            let api = self.api::<K>();
            let events = api.watch(&watch, &version).await;
            let events = events.map_err(|error| request_failed(error, &doing()))?;
            let mut events = std::pin::pin!(events);
            // A watch that ends or breaks is begun again with a new list.
            while let Ok(Some(event)) = events.try_next().await {
                match event {
                    WatchEvent::Deleted(object) => left.retain(|name| *name != object.name_any()),
                    WatchEvent::Error(_) => break,
                    _ => {}
                }
                if left.is_empty() {
                    break;
                }
            }
        }
    }

    /// Sends a request without an answer to a subresource of KubeVirt's own API, such as `virtualmachines/NAME/start`.
    pub(crate) async fn put(&self, path: &str, body: &Value) -> Result<(), kube::Error> {
        let url = self.subresource(path);
        let request = Request::put(url)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(body.to_string().into_bytes());
        let request = request.map_err(kube::Error::HttpError)?;
        self.client.request_text(request).await.map(drop)
    }

    /// Returns the path of a subresource of KubeVirt's own API.
    pub(crate) fn subresource(&self, path: &str) -> String {
        format!("/apis/subresources.kubevirt.io/v1/namespaces/{}/{path}", self.namespace)
    }

    /// Returns the time of the API server, in whole seconds: with it, hosts with different clocks agree on what has expired. It
    /// comes from the metadata of an object that is not really created.
    pub(crate) async fn now(&self) -> Result<Timestamp> {
        let dry_run = PostParams { dry_run: true, ..post() };
        let lease = Lease {
            metadata: ObjectMeta { generate_name: Some("rudder-time-".to_owned()), ..ObjectMeta::default() },
            ..Lease::default()
        };
        let answer = self.api::<Lease>().create(&dry_run, &lease).await;
        let answer = answer.map_err(|error| request_failed(error, "read the time of the cluster"))?;
        created_at(&answer.metadata)
    }
}

/// Returns when an object was created, as the API server says.
pub(crate) fn created_at(metadata: &ObjectMeta) -> Result<Timestamp> {
    let created = metadata.creation_timestamp.as_ref().map(|time| time.0);
    created.ok_or_else(|| {
        Error::new(ErrorKind::Protocol, "the cluster returned an object without the time of its creation")
    })
}

/// Returns the metadata of a new object.
pub(crate) fn metadata(
    name: impl Into<String>,
    labels: BTreeMap<String, String>,
    annotations: impl IntoIterator<Item = (&'static str, String)>,
    owner: Option<&OwnerReference>,
) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        labels: Some(labels),
        annotations: Some(annotations.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        owner_references: owner.map(|owner| vec![owner.clone()]),
        ..ObjectMeta::default()
    }
}

/// Returns an annotation of an object.
pub(crate) fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn post() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}

/// Dependents of a deleted object are deleted after it.
pub(crate) fn background() -> DeleteParams {
    DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() }
}
