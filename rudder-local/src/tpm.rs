//! The TPM 2.0 of a machine: an swtpm process beside its QEMU, and its state in the lab.
//!
//! swtpm inherits a listening socket as its standard input, so QEMU never connects too early; it ends when QEMU disconnects.

use crate::{
    host::TpmPrograms,
    lab_storage::LabStorage,
    log_tail::last_lines,
    process::{Invocation, OwnedChild, describe},
    store::LAB_VARIABLE,
};
use rudder_core::{Error, ErrorKind, Result};
use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};
use tokio::time::timeout;

/// The file in which swtpm keeps the permanent state of a TPM (swtpm(8), `--tpmstate`).
pub const STATE_FILE: &str = "tpm2-00.permall";

/// The PCR banks of a new TPM: those that firmware and guests use. Every further bank would be computed at every measurement,
/// to no purpose.
const BANKS: &str = "sha256";

/// Time limit for a TPM to end after its machine has.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// Returns the version of swtpm, for the provenance.
pub async fn version(storage: &LabStorage) -> Result<String> {
    let TpmPrograms { swtpm, .. } = storage.host().tpm()?;
    storage.host().program_version(&swtpm).await
}

/// Creates the directory for the state of a TPM.
pub fn make_directory(path: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(path);
    made.map_err(|error| Error::io(format_args!("create the directory {}", path.display()), error))
}

/// Creates a new TPM in a directory of the lab.
pub async fn manufacture(storage: &LabStorage, directory: &str) -> Result<()> {
    let TpmPrograms { swtpm, setup } = storage.host().tpm()?;
    // swtpm_setup searches for swtpm in PATH.
    let mut path = swtpm.parent().map(|directory| directory.as_os_str().to_owned()).unwrap_or_default();
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    // Without the host's configuration, which determines how certificates are made.
    let finished = storage
        .tool(&setup)
        .args(["--tpm2", "--tpmstate", directory, "--pcr-banks", BANKS, "--config", "/dev/null"])
        .variable("PATH", path)
        .run(None)
        .await?;
    if !finished.status.success() {
        // Its error messages may be on either stream.
        let output = [&finished.stdout[..], b"\n", &finished.stderr[..]].concat();
        let output = String::from_utf8_lossy(&output);
        let lines: Vec<&str> = output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        return Err(Error::new(
            ErrorKind::LaunchFailed,
            format!("cannot create a TPM: {}", lines.join(" | ")),
        ));
    }
    Ok(())
}

/// The files of a machine's TPM, relative to the directory of its lab.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    /// The directory of its state.
    pub directory: &'a str,
    /// Its control socket.
    pub socket: &'a str,
    /// Its log file.
    pub log: &'a str,
}

/// Starts a TPM, which waits for QEMU and may live as long as the machines of the lab.
///
/// # Errors
/// `HostMissing` without swtpm; `LaunchFailed`; file errors.
pub async fn start(storage: &LabStorage, files: Files<'_>) -> Result<Tpm> {
    let TpmPrograms { swtpm, .. } = storage.host().tpm()?;
    let failed =
        |what: &'static str| move |error: io::Error| Error::io(format_args!("{what} of a TPM"), error);
    let listener = UnixListener::bind(storage.socket(files.socket)).map_err(failed("create the socket"))?;
    let log = File::create(storage.path(files.log)).map_err(failed("write the log"))?;
    let output = log.try_clone().map_err(failed("write the log"))?;
    let child = Invocation::new(&swtpm, storage.lifetime())
        .args(["socket", "--tpm2", "--terminate", "--ctrl", "type=unixio,fd=0", "--tpmstate"])
        .args([format!("dir={}", files.directory)])
        .directory(storage.dir().path())
        .variable(LAB_VARIABLE, storage.id().as_str())
        .spawn(Stdio::from(OwnedFd::from(listener)), output.into(), log.into())
        .await?;
    Ok(Tpm { child, log: storage.path(files.log) })
}

/// A running TPM. Dropping it kills it, unless it was released.
#[derive(Debug)]
pub struct Tpm {
    child: OwnedChild,
    log: PathBuf,
}

impl Tpm {
    /// Returns a running TPM that another process started; `log` is the file with its messages.
    pub(crate) fn adopted(process: OwnedChild, log: PathBuf) -> Self {
        Self { child: process, log }
    }

    /// Returns its process ID while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.pid()
    }

    /// Returns a switch that, once set, lets it outlive this value.
    #[must_use]
    pub fn release_switch(&self) -> Arc<AtomicBool> {
        self.child.release_switch()
    }

    /// Waits until it ends, and returns how it ended. May be repeated.
    pub async fn ended(&mut self) -> String {
        let status = self.child.wait().await;
        let status = status.map_or_else(|error| format!("could not be waited for: {error}"), describe);
        match last_lines(&self.log).await {
            lines if lines.is_empty() => status,
            lines => format!("{status}; its last lines: {lines}"),
        }
    }

    /// Waits until it has ended, as it does by itself when its machine has, and kills it if it does not.
    pub async fn finish(&mut self) {
        if timeout(QUIT_LIMIT, self.child.wait()).await.is_err() {
            self.child.kill();
            let _ = timeout(QUIT_LIMIT, self.child.wait()).await;
        }
    }
}
