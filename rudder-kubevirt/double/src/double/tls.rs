//! The certificates that the double serves its API with.

use rudder_core::{Error, ErrorKind, Result};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{fmt, sync::Arc};
use tokio_rustls::TlsAcceptor;

/// The certificate that the double serves its API with, and the authority of its clients.
#[derive(Clone)]
#[non_exhaustive]
pub struct ServingTls {
    /// The certificate for `localhost`, in PEM, followed by those of its authorities, if any.
    pub certificate: String,
    /// The private key of the certificate, in PEM.
    pub key: String,
    /// The certificate of the authority of the front proxy, in PEM: only its clients are served, as behind the API server's
    /// aggregation layer.
    pub client_authority: String,
}

impl fmt::Debug for ServingTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingTls").finish_non_exhaustive()
    }
}

impl ServingTls {
    /// Creates the certificates from PEM texts: the serving certificate, its key, and the authority of the front proxy.
    pub fn new(
        certificate: impl Into<String>,
        key: impl Into<String>,
        client_authority: impl Into<String>,
    ) -> Self {
        Self { certificate: certificate.into(), key: key.into(), client_authority: client_authority.into() }
    }

    /// Returns what accepts TLS connections with these certificates.
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor> {
        let invalid = |error: &dyn fmt::Display| {
            let message = format!("expected usable certificates to serve with, but found: {error}");
            Error::new(ErrorKind::InvalidInput, message)
        };
        let certificates = |pem: &str| {
            CertificateDer::pem_slice_iter(pem.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| invalid(&error))
        };
        let mut authorities = RootCertStore::empty();
        for authority in certificates(&self.client_authority)? {
            authorities.add(authority).map_err(|error| invalid(&error))?;
        }
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(|error| invalid(&error))?;
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(authorities.into(), provider.clone())
            .build()
            .map_err(|error| invalid(&error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&self.certificate)?, key)
            .map_err(|error| invalid(&error))?;
        // Web sockets need HTTP/1.1.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
