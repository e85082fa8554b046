//! Keys and certificates of a cluster. They are valid from the day before to 30 days after their creation.

use super::error::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// The services that a double may stand for, through which the API server reaches it under these names.
const SERVICES: [&str; 3] = ["virt-api.kubevirt.svc", "cdi-api.cdi.svc", "cdi-uploadproxy.cdi.svc"];

/// First address of the range of services: the address of the API server for pods.
const API_SERVER_SERVICE: &str = "10.96.0.1";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A certificate and its key, both as PEM.
#[derive(Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// The private key in PKCS#8.
    pub key: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// What a cluster's components and clients identify themselves with.
pub(super) struct Pki {
    directory: PathBuf,
    /// The certificate of the authority that signs all but the front proxy's.
    pub(super) ca: String,
    /// The certificate of the authority that signs the API server's as a client of aggregated API servers.
    pub(super) front_proxy_ca: String,
    /// For servers that the API server connects to.
    pub(super) serving: Identity,
}

impl Pki {
    /// Creates everything, as files in this directory.
    pub(super) fn create(directory: PathBuf) -> Result<Self> {
        let failed = || "cannot create the certificates of the cluster".to_owned();
        fs::create_dir(&directory).context(failed)?;
        let ca = Authority::new("ca").context(failed)?;
        let front_proxy = Authority::new("front-proxy-ca").context(failed)?;
        let kubernetes = [
            "localhost",
            "127.0.0.1",
            API_SERVER_SERVICE,
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
        ];
        let local: Vec<_> = SERVICES.into_iter().chain(["localhost", "127.0.0.1"]).collect();
        let serving = ca.server("double", &local).context(failed)?;
        let identities = [
            ("api-server", ca.server("kube-apiserver", &kubernetes)),
            ("front-proxy-client", front_proxy.client("front-proxy-client", None)),
            ("admin", ca.client("admin", Some("system:masters"))),
            // Its controllers share its identity, instead of a service account each: fewer tokens to wait for.
            ("controller-manager", ca.client("system:kube-controller-manager", Some("system:masters"))),
        ];
        let pki = Self { directory, ca: ca.certificate, front_proxy_ca: front_proxy.certificate, serving };
        for (name, identity) in identities {
            let identity = identity.context(failed)?;
            pki.write(&format!("{name}.crt"), &identity.certificate)?;
            pki.write(&format!("{name}.key"), &identity.key)?;
        }
        pki.write("ca.crt", &pki.ca)?;
        pki.write("front-proxy-ca.crt", &pki.front_proxy_ca)?;
        let tokens = KeyPair::generate().context(failed)?;
        pki.write("service-accounts.key", &tokens.serialize_pem())?;
        pki.write("service-accounts.pub", &tokens.public_key_pem())?;
        Ok(pki)
    }

    /// Returns the path of a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        write(&self.path(name), text)
    }
}

/// Writes a file.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(|| format!("cannot write {}", path.display()))
}

/// A certificate authority.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = params(name, &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    fn server(&self, name: &str, hosts: &[&str]) -> Result<Identity, rcgen::Error> {
        let mut params = params(name, hosts)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(&params)
    }

    /// A client's certificate: Kubernetes takes the name of the user from the common name, and groups from
    /// organisations.
    fn client(&self, user: &str, group: Option<&str>) -> Result<Identity, rcgen::Error> {
        let mut params = params(user, &[])?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> Result<Identity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

fn params(name: &str, hosts: &[&str]) -> Result<CertificateParams, rcgen::Error> {
    let hosts: Vec<_> = hosts.iter().map(|&host| host.to_owned()).collect();
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.use_authority_key_identifier_extension = true;
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = date_time_ymd(1970, 1, 1) + since_epoch;
    params.not_before = now - DAY;
    params.not_after = now + 30 * DAY;
    Ok(params)
}
