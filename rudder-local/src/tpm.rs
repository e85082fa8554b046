//! The TPM 2.0 of a machine: a process of swtpm beside its QEMU, and its state in the lab.
//!
//! swtpm is given a listening socket as its standard input, so QEMU never comes too early; it ends when QEMU hangs up.

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

/// The file in which swtpm keeps what a TPM does not forget (swtpm(8), `--tpmstate`).
pub const STATE_FILE: &str = "tpm2-00.permall";

/// The banks of measurements of a new TPM: what firmware and guests use. Every other is computed for nothing, at every
/// measurement.
const BANKS: &str = "sha256";

/// How long a TPM may take to end after its machine has.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// The version of swtpm, for the provenance.
pub async fn version(storage: &LabStorage) -> Result<String> {
    let TpmPrograms { swtpm, .. } = storage.host().tpm()?;
    storage.host().ask_version(&swtpm).await
}

/// Makes the directory for the state of a TPM.
pub fn make_directory(path: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(path);
    made.map_err(|error| Error::io(format_args!("make the directory {}", path.display()), error))
}

/// Makes a new TPM in a directory of the lab.
pub async fn manufacture(storage: &LabStorage, directory: &str) -> Result<()> {
    let TpmPrograms { swtpm, setup } = storage.host().tpm()?;
    // It looks for swtpm in PATH.
    let mut path = swtpm.parent().map(|directory| directory.as_os_str().to_owned()).unwrap_or_default();
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    // Not with the configuration of the host, which says what certificates are made with.
    let finished = storage
        .tool(&setup)
        .args(["--tpm2", "--tpmstate", directory, "--pcr-banks", BANKS, "--config", "/dev/null"])
        .variable("PATH", path)
        .run(None)
        .await?;
    if !finished.status.success() {
        // It says what went wrong on either.
        let said = [&finished.stdout[..], b"\n", &finished.stderr[..]].concat();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        return Err(Error::new(ErrorKind::LaunchFailed, format!("cannot make a TPM: {}", lines.join(" | "))));
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
    /// Where it writes what it has to say.
    pub log: &'a str,
}

/// Starts a TPM, which lives as long as the machines of the lab may and waits for QEMU.
///
/// # Errors
/// `HostMissing` without swtpm; `LaunchFailed`; file errors.
pub async fn start(storage: &LabStorage, files: Files<'_>) -> Result<Tpm> {
    let TpmPrograms { swtpm, .. } = storage.host().tpm()?;
    let failed =
        |what: &'static str| move |error: io::Error| Error::io(format_args!("{what} of a TPM"), error);
    let listener = UnixListener::bind(storage.socket(files.socket)).map_err(failed("make the socket"))?;
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

/// A TPM that runs. Dropping it ends it, unless it was released.
#[derive(Debug)]
pub struct Tpm {
    child: OwnedChild,
    log: PathBuf,
}

impl Tpm {
    /// The id of its process while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.pid()
    }

    /// A switch that, once set, lets it outlive this value.
    #[must_use]
    pub fn release_switch(&self) -> Arc<AtomicBool> {
        self.child.release_switch()
    }

    /// Waits for its end, and says how it ended. May be repeated.
    pub async fn ended(&mut self) -> String {
        let status = self.child.wait().await;
        let told = status.map_or_else(|error| format!("could not be waited for: {error}"), describe);
        match last_lines(&self.log).await {
            lines if lines.is_empty() => told,
            lines => format!("{told}; its last lines: {lines}"),
        }
    }

    /// Waits until it has ended, which it does by itself when its machine has, and kills it when it does not.
    pub async fn finish(&mut self) {
        if timeout(QUIT_LIMIT, self.child.wait()).await.is_err() {
            self.child.kill();
            let _ = timeout(QUIT_LIMIT, self.child.wait()).await;
        }
    }
}
