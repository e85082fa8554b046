//! Aggregated API servers: those to which the API server passes the requests of an API group.

use super::{
    Cluster, apply,
    deadline::Deadline,
    error::{Context, Result},
};
use http::Request;
use k8s_openapi::{
    ByteString,
    api::core::v1::{Namespace, Service, ServiceSpec},
    kube_aggregator::pkg::apis::apiregistration::v1::{APIService, APIServiceSpec, ServiceReference},
};
use kube::{
    Api,
    api::{DeleteParams, ObjectMeta},
};

/// Namespace and name of the service under which the API server reaches aggregated API servers.
const NAMESPACE: &str = "kubevirt";
const SERVICE: &str = "virt-api";

impl Cluster {
    /// Registers an API server that listens on `port` of 127.0.0.1, and waits until requests for its group
    /// reach it. It has to serve the discovery documents `/apis/GROUP/VERSION` already, with a certificate that
    /// `ca` (PEM) has signed for `virt-api.kubevirt.svc`, such as [`serving`](Self::serving).
    ///
    /// While a registered API server does not answer, namespaces are not removed:
    /// [`remove_api_service`](Self::remove_api_service).
    ///
    /// # Errors
    ///
    /// The API server refuses the registration, or does not reach the server in two minutes.
    pub async fn register_api_service(&self, group: &str, version: &str, port: u16, ca: &str) -> Result<()> {
        let client = self.client()?;
        let namespace = Namespace { metadata: named(NAMESPACE, None), ..Namespace::default() };
        apply(&Api::all(client.clone()), NAMESPACE, &namespace).await?;
        // The API server resolves the name of an external service itself, so that neither a network of pods
        // nor a proxy is needed.
        let spec = ServiceSpec {
            type_: Some("ExternalName".to_owned()),
            external_name: Some("localhost".to_owned()),
            ..ServiceSpec::default()
        };
        let service =
            Service { metadata: named(SERVICE, Some(NAMESPACE)), spec: Some(spec), ..Service::default() };
        apply(&Api::namespaced(client.clone(), NAMESPACE), SERVICE, &service).await?;
        let name = format!("{version}.{group}");
        let spec = APIServiceSpec {
            group: Some(group.to_owned()),
            version: Some(version.to_owned()),
            group_priority_minimum: 1000,
            version_priority: 15,
            ca_bundle: Some(ByteString(ca.as_bytes().to_vec())),
            service: Some(ServiceReference {
                namespace: Some(NAMESPACE.to_owned()),
                name: Some(SERVICE.to_owned()),
                port: Some(i32::from(port)),
            }),
            ..APIServiceSpec::default()
        };
        let registration =
            APIService { metadata: named(&name, None), spec: Some(spec), ..APIService::default() };
        let services: Api<APIService> = Api::all(client.clone());
        apply(&services, &name, &registration).await?;

        let deadline = Deadline::new(format!("{name} is available"));
        loop {
            let found = services.get_status(&name).await.context(|| format!("cannot read {name}"))?;
            match unavailable(&found) {
                None => {}
                Some(reason) => {
                    deadline.pause(reason).await?;
                    continue;
                }
            }
            let request = Request::get(format!("/apis/{group}/{version}")).body(Vec::new());
            match client.request_text(request.context(|| format!("cannot discover {name}"))?).await {
                Ok(_) => return Ok(()),
                Err(error) => deadline.pause(error).await?,
            }
        }
    }

    /// Removes a registration.
    ///
    /// # Errors
    ///
    /// There is none, or the API server does not answer.
    pub async fn remove_api_service(&self, group: &str, version: &str) -> Result<()> {
        let name = format!("{version}.{group}");
        let services: Api<APIService> = Api::all(self.client()?);
        services.delete(&name, &DeleteParams::default()).await.context(|| format!("cannot remove {name}"))?;
        Ok(())
    }
}

/// Returns why a registered API server is not available, or none if it is.
fn unavailable(service: &APIService) -> Option<String> {
    let conditions = service.status.as_ref().and_then(|status| status.conditions.as_deref());
    let available = conditions.unwrap_or_default().iter().find(|condition| condition.type_ == "Available");
    match available {
        Some(condition) if condition.status == "True" => None,
        Some(condition) => Some(condition.message.clone().unwrap_or_else(|| condition.status.clone())),
        None => Some("no condition".to_owned()),
    }
}

fn named(name: &str, namespace: Option<&str>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: namespace.map(str::to_owned),
        ..ObjectMeta::default()
    }
}
