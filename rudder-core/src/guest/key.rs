//! The key of a build: a new ed25519 pair, or one that the author provided.

use crate::{Error, ErrorKind, Result, platform::create_private, secret::Secret};
use russh::keys::{
    Algorithm, PrivateKey, decode_secret_key,
    key::safe_rng,
    ssh_key::{LineEnding, private::Ed25519Keypair},
};
use std::{fmt, io::Write as _, path::Path, sync::Arc};

/// The private key that a build logs in with.
#[derive(Clone)]
pub struct BuildKey {
    key: Arc<PrivateKey>,
}

impl BuildKey {
    /// Generates an ed25519 pair (RFC 8709) from the operating system's randomness.
    #[must_use]
    pub fn generate() -> Self {
        use rand::Rng as _;
        let mut seed = [0u8; 32];
        safe_rng().fill_bytes(&mut seed);
        let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&seed));
        key.set_comment("rudder");
        seed.fill(0);
        Self { key: Arc::new(key) }
    }

    /// Reads a key in a form that OpenSSH or OpenSSL writes: `BEGIN OPENSSH PRIVATE KEY`, or PEM of PKCS#8, PKCS#1
    /// (RSA) or SEC1.
    ///
    /// # Errors
    /// `InvalidInput` when the text is not a private key, or is one that is protected by a passphrase.
    pub fn import(text: &Secret) -> Result<Self> {
        let invalid = |what: &'static str| Error::new(ErrorKind::InvalidInput, what);
        let protected = || {
            invalid("the SSH private key is protected by a passphrase").with_help(
                "use a key without a passphrase: `ssh-keygen -p -N '' -f COPY_OF_KEY` removes it from a copy",
            )
        };
        let text = text.expose().replace("\r\n", "\n");
        let text = text.trim_start();
        if text.starts_with("ssh-") || text.starts_with("ecdsa-") {
            return Err(invalid("expected an SSH private key, but found a public key"));
        }
        if text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
            return Err(protected());
        }
        match decode_secret_key(text, None) {
            Ok(key) if key.is_encrypted() => Err(protected()),
            Ok(key) => Ok(Self { key: Arc::new(key) }),
            Err(russh::keys::Error::KeyIsEncrypted) => Err(protected()),
            // The cause is left out, since it may quote parts of the key.
            Err(_) => {
                Err(invalid("expected an SSH private key in OpenSSH or PEM form, but it could not be parsed")
                    .with_help("provide the whole file, including its BEGIN and END lines"))
            }
        }
    }

    /// Returns the public key as a line of `authorized_keys`: algorithm, base64, comment; no newline.
    #[must_use]
    pub fn authorized_key(&self) -> String {
        let mut public = self.key.public_key().clone();
        // A comment of the author's may contain anything; this one is a plain word that scripts can rely on.
        public.set_comment("rudder");
        public.to_openssh().unwrap_or_default()
    }

    /// Returns the private key in OpenSSH form, as `ssh -i` reads it.
    ///
    /// # Errors
    /// `Internal` when the key cannot be encoded.
    pub fn to_openssh(&self) -> Result<Secret> {
        let text = self.key.to_openssh(LineEnding::LF).map_err(|error| {
            Error::new(ErrorKind::Internal, "cannot encode the build's key").with_source(error)
        })?;
        Ok(Secret::new(text.to_string()))
    }

    /// Writes the private key in OpenSSH form, readable by its owner only (mode 0600 on Unix), for `ssh -i`.
    ///
    /// # Errors
    /// `Io` or `HostDiskFull` when the file cannot be written; `Conflict` when it already exists.
    pub async fn write(&self, path: &Path) -> Result<()> {
        let text = self.to_openssh()?;
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(ErrorKind::Conflict, format!("{} already exists", path.display()))
            }
            _ => Error::io(format_args!("write the build's key to {}", path.display()), error),
        };
        let to = path.to_owned();
        let write = move || {
            let mut file = create_private(&to)?;
            file.write_all(text.expose().as_bytes())?;
            file.sync_all()
        };
        let written = tokio::task::spawn_blocking(write).await;
        written.unwrap_or_else(|error| Err(error.into())).map_err(failed)
    }

    pub(super) fn private(&self) -> Arc<PrivateKey> {
        Arc::clone(&self.key)
    }

    pub(super) fn is_rsa(&self) -> bool {
        matches!(self.key.algorithm(), Algorithm::Rsa { .. })
    }
}

impl fmt::Debug for BuildKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildKey({})", self.authorized_key())
    }
}
