//! The TPM 2.0 of a machine: a process of swtpm beside its QEMU, and its state in the lab.
//!
//! swtpm is given a listening socket as its standard input, so QEMU never comes too early; it ends when QEMU hangs up.

use crate::{
    host::{self, Host},
    lab::Ground,
    process::{Invocation, Lifetime, OwnedChild, find},
};
use rudder_core::{Error, ErrorKind, Result, store::LAB_VARIABLE};
use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

/// How to install what is missing, on Debian and its children.
pub(crate) const INSTALL: &str = "apt-get install --no-install-recommends swtpm swtpm-tools";

/// The file in which swtpm keeps what a TPM does not forget (swtpm(8), `--tpmstate`).
pub(crate) const STATE_FILE: &str = "tpm2-00.permall";

/// The banks of measurements of a new TPM: what firmware and guests use. Every other is computed for nothing, at every
/// measurement.
const BANKS: &str = "sha256";

/// The programs that make a TPM.
#[derive(Debug)]
pub(crate) struct Programs {
    /// It.
    pub(crate) swtpm: PathBuf,
    /// What makes a new one.
    setup: PathBuf,
}

impl Programs {
    /// Looks for them.
    ///
    /// # Errors
    /// `HostMissing`, with the packages to install.
    pub(crate) fn find(given: Option<&Path>) -> Result<Self> {
        let missing = |name: &str, place: &str| {
            Error::new(ErrorKind::HostMissing, format!("expected the program {name} {place}, but found none"))
                .with_help(format!("install it: {INSTALL}; or write `tpm: false`"))
        };
        let place = given.map_or_else(|| "in PATH".to_owned(), |path| format!("at {}", path.display()));
        let swtpm = find(given, "swtpm").ok_or_else(|| missing("swtpm", &place))?;
        // Beside it, where it is not in PATH.
        let beside = swtpm.parent().map(|directory| directory.join("swtpm_setup"));
        let setup = find(beside.as_deref(), "swtpm_setup").or_else(|| find(None, "swtpm_setup"));
        let setup = setup.ok_or_else(|| missing("swtpm_setup", "in PATH"))?;
        Ok(Self { swtpm, setup })
    }
}

/// The version of swtpm, for the provenance.
pub(crate) async fn version(ground: &Ground) -> Result<String> {
    let Programs { swtpm, .. } = ground.host.tpm()?;
    host::ask_version(&swtpm, Lifetime::WithOwner(ground.host.setpriv.clone())).await
}

/// Makes the directory for the state of a TPM.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(path);
    made.map_err(|error| Error::io(format_args!("make the directory {}", path.display()), error))
}

/// Makes a new TPM in a directory of the lab.
pub(crate) async fn manufacture(ground: &Ground, directory: &str) -> Result<()> {
    let Programs { swtpm, setup } = ground.host.tpm()?;
    // It looks for swtpm in PATH.
    let mut path = swtpm.parent().map(|directory| directory.as_os_str().to_owned()).unwrap_or_default();
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    // Not with the configuration of the host, which says what certificates are made with.
    let finished = Invocation::new(&setup, Lifetime::WithOwner(ground.host.setpriv.clone()))
        .args(["--tpm2", "--tpmstate", directory, "--pcr-banks", BANKS, "--config", "/dev/null"])
        .directory(ground.dir.path())
        .variable("PATH", path)
        .variable(LAB_VARIABLE, ground.id.as_str())
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
pub(crate) struct Files<'a> {
    /// The directory of its state.
    pub(crate) directory: &'a str,
    /// Its control socket.
    pub(crate) socket: &'a str,
    /// Where it writes what it has to say.
    pub(crate) log: &'a str,
}

/// Starts a TPM; it waits for QEMU.
pub(crate) async fn start(ground: &Ground, files: Files<'_>, lifetime: Lifetime) -> Result<OwnedChild> {
    let Programs { swtpm, .. } = ground.host.tpm()?;
    let failed =
        |what: &'static str| move |error: io::Error| Error::io(format_args!("{what} of a TPM"), error);
    let listener = UnixListener::bind(ground.socket(files.socket)).map_err(failed("make the socket"))?;
    let log = File::create(ground.path(files.log)).map_err(failed("write the log"))?;
    let output = log.try_clone().map_err(failed("write the log"))?;
    Invocation::new(&swtpm, lifetime)
        .args(["socket", "--tpm2", "--terminate", "--ctrl", "type=unixio,fd=0", "--tpmstate"])
        .args([format!("dir={}", files.directory)])
        .directory(ground.dir.path())
        .variable(LAB_VARIABLE, ground.id.as_str())
        .spawn(Stdio::from(OwnedFd::from(listener)), output.into(), log.into())
        .await
}

impl Host {
    /// The programs that make a TPM.
    ///
    /// # Errors
    /// `HostMissing`, with the packages to install.
    pub(crate) fn tpm(&self) -> Result<Programs> {
        Programs::find(self.swtpm.as_deref())
    }
}
