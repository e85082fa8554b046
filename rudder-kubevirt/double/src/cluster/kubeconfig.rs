//! Files of configuration for clients, as kubectl reads them.

use super::{
    error::{Context, Result},
    pki,
};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use std::path::Path;

/// Who a client is.
pub(super) enum User<'a> {
    /// The owner of a certificate and its key.
    Certificate { certificate: &'a Path, key: &'a Path },
    /// The bearer of a token.
    Token(&'a str),
}

/// Writes a kubeconfig with one context.
pub(super) fn write(path: &Path, server: &str, ca: &Path, user: &User<'_>, namespace: &str) -> Result<()> {
    let user = match user {
        User::Certificate { certificate, key } => {
            json!({ "client-certificate": certificate, "client-key": key })
        }
        User::Token(token) => json!({ "token": token }),
    };
    // JSON is YAML.
    let config: Value = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test", "namespace": namespace } }],
        "clusters": [{ "name": "test", "cluster": { "server": server, "certificate-authority": ca } }],
        "users": [{ "name": "test", "user": user }],
    });
    pki::write(path, &config.to_string())
}

/// Reads a kubeconfig.
pub(super) async fn read(path: &Path) -> Result<Config> {
    let failed = || format!("cannot use {}", path.display());
    let config = Kubeconfig::read_from(path).context(failed)?;
    Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.context(failed)
}

/// Creates a client that uses a kubeconfig.
///
/// # Errors
///
/// The file cannot be read, or what it refers to.
pub async fn client_of(kubeconfig: &Path) -> Result<Client> {
    client(read(kubeconfig).await?)
}

pub(super) fn client(config: Config) -> Result<Client> {
    Client::try_from(config).context(|| "cannot create a client of the cluster".into())
}
