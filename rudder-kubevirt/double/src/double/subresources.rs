//! The aggregated API `subresources.kubevirt.io/v1`: discovery, and the requests about one machine or instance.

use super::{
    answers::{Body, Refusal, json_response},
    objects::{Key, SUBRESOURCES, uid},
    requests,
    shared::Shared,
    streams::{self, Channel},
};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Time that a client may take for the handshake of TLS.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Maximum size of the body of a request.
const BODY_LIMIT: usize = 64 << 10;

/// The version that the double reports, which is none of KubeVirt's.
const VERSION: &str = "v0.0.0-double";
/// The subresources, with the verbs that RBAC knows them by.
const RESOURCES: [(&str, &str); 12] = [
    ("virtualmachineinstances/console", "get"),
    ("virtualmachineinstances/vnc", "get"),
    ("virtualmachineinstances/vnc/screenshot", "get"),
    ("virtualmachineinstances/portforward", "get"),
    ("virtualmachineinstances/pause", "update"),
    ("virtualmachineinstances/unpause", "update"),
    ("virtualmachineinstances/softreboot", "update"),
    ("virtualmachineinstances/reset", "update"),
    ("virtualmachines/start", "update"),
    ("virtualmachines/stop", "update"),
    ("virtualmachines/restart", "update"),
    ("virtualmachines/portforward", "get"),
];

/// Serves the API on a listener.
pub(super) async fn serve(shared: Arc<Shared>, listener: TcpListener, acceptor: TlsAcceptor) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = connection(shared.clone(), stream, acceptor.clone());
                shared.spawn(connection);
            }
            // Such as too many open files: others are closed meanwhile.
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, acceptor: TlsAcceptor) {
    // Small messages are not to wait for each other.
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await else { return };
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move {
            let path = request.uri().path().to_owned();
            let answer = route(&shared, &path, request).await;
            Ok::<_, Infallible>(answer.unwrap_or_else(Refusal::into_response))
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the double ended");
    }
}

async fn route(
    shared: &Arc<Shared>,
    path: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let [apis, group, rest @ ..] = &segments[..] else { return Err(Refusal::no_such_path(path)) };
    if (*apis, *group) != ("apis", SUBRESOURCES) {
        return Err(Refusal::no_such_path(path));
    }
    let method = request.method().clone();
    match (method, rest) {
        (Method::GET, []) => Ok(json_response(StatusCode::OK, &group_document())),
        (Method::GET, ["v1"]) => Ok(json_response(StatusCode::OK, &resource_documents())),
        (Method::GET, ["v1", "version"]) => {
            Ok(json_response(StatusCode::OK, &json!({"gitVersion": VERSION})))
        }
        (method, ["v1", "namespaces", namespace, kind, name, sub @ ..]) => {
            let key = Key::new(*namespace, *name);
            subresource(shared, &key, (&method, kind, sub), request)
                .await
                .unwrap_or_else(|| Err(Refusal::no_such_path(path)))
        }
        _ => Err(Refusal::no_such_path(path)),
    }
}

/// Handles a request about one object; `None` when there is no such subresource.
async fn subresource(
    shared: &Arc<Shared>,
    key: &Key,
    (method, kind, sub): (&Method, &str, &[&str]),
    request: Request<Incoming>,
) -> Option<Result<Response<Body>, Refusal>> {
    let is_get = method == Method::GET;
    let answer = match (kind, sub) {
        ("virtualmachineinstances", ["console"]) if is_get => {
            streams::connect(shared, key, Channel::Console, request).await
        }
        ("virtualmachineinstances", ["vnc"]) if is_get => {
            let query = request.uri().query().unwrap_or_default();
            let preserve_session = url::form_urlencoded::parse(query.as_bytes())
                .any(|(name, value)| name == "preserveSession" && matches!(&*value, "true" | "1" | "t"));
            streams::connect(shared, key, Channel::Display { preserve_session }, request).await
        }
        ("virtualmachineinstances", ["vnc", "screenshot"]) if is_get => screenshot(shared, key).await,
        // The instance of a machine has its name.
        ("virtualmachineinstances" | "virtualmachines", ["portforward", port, protocol @ ..]) if is_get => {
            match (port.parse(), protocol) {
                (Ok(port), [] | ["tcp"]) => streams::connect(shared, key, Channel::Port(port), request).await,
                _ => Err(Refusal::bad_request(format!("the double forwards TCP ports only, not {port}"))),
            }
        }
        _ if method != Method::PUT => return None,
        ("virtualmachineinstances", ["pause"]) => requests::pause(shared, key, true).await,
        ("virtualmachineinstances", ["unpause"]) => requests::pause(shared, key, false).await,
        ("virtualmachineinstances", ["softreboot" | "reset"]) => requests::soft_reboot(shared, key).await,
        ("virtualmachines", [verb @ ("start" | "stop" | "restart")]) => {
            match Limited::new(request.into_body(), BODY_LIMIT).collect().await {
                Ok(body) => requests::machine(shared, key, verb, &body.to_bytes()).await,
                Err(error) => Err(Refusal::bad_request(error.to_string())),
            }
        }
        _ => return None,
    };
    Some(answer)
}

async fn screenshot(shared: &Shared, key: &Key) -> Result<Response<Body>, Refusal> {
    let instance = requests::instance(shared, key).await?;
    let not_running = || Refusal::bad_request("VMI is not running");
    let run =
        shared.runs.get(uid(&instance)).filter(|run| run.exit.get().is_none()).ok_or_else(not_running)?;
    let png = run.machine.screenshot().await.map_err(Refusal::internal)?;
    let mut response = Response::new(Body::from(png));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("image/png"));
    Ok(response)
}

fn group_document() -> Value {
    let version = json!({"groupVersion": format!("{SUBRESOURCES}/v1"), "version": "v1"});
    json!({
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": SUBRESOURCES,
        "versions": [version],
        "preferredVersion": version,
    })
}

fn resource_documents() -> Value {
    let resources: Vec<Value> = RESOURCES
        .iter()
        .map(|(name, verb)| {
            json!({"name": name, "singularName": "", "namespaced": true, "kind": "", "verbs": [verb]})
        })
        .collect();
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": format!("{SUBRESOURCES}/v1"),
        "resources": resources,
    })
}
