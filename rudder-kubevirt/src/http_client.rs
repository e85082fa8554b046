//! The HTTP client of this crate: for files of the manifest, and for the first bytes of images.

use reqwest::{Client, redirect};
use rudder_core::{Error, ErrorKind, Result};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use std::{sync::Arc, time::Duration};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);
const MAX_REDIRECTS: usize = 10;

/// Returns a client that trusts the certificates of this host. It has its own TLS configuration, and changes no global state.
pub(crate) fn http_client() -> Result<Client> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(ErrorKind::Internal, "cannot set up an HTTP client").with_source(error)
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.into()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("rudder/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_LIMIT)
        .redirect(redirect::Policy::limited(MAX_REDIRECTS))
        // Downloads are few and long. A pooled connection would outlive the runtime that made it.
        .pool_max_idle_per_host(0)
        .build()
        .map_err(|error| failed(error.without_url().into()))
}
