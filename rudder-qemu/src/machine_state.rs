//! What a machine keeps outside its disks, for a backend whose machines somebody else starts (libvirt): the same files, made,
//! run and captured as this backend does it.

use crate::{
    command_line::{Chipset, Files},
    ground::{Ground, blocking},
    host::Host,
    process::{Lifetime, OwnedChild, describe},
    state::{self, Flash},
    tpm,
    watch::last_words,
};
use rudder_core::{
    ErrorKind, Result,
    backend::{MachineSpec, Retention},
    module::CapturedState,
    plan::Firmware,
};
use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};
use tokio::time::timeout;

/// How long a TPM may take to end after its machine has.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// QEMU's short name for the machine that this one is built around: `pc` or `q35`.
#[must_use]
pub fn board(spec: &MachineSpec) -> &'static str {
    Chipset::of(spec).machine()
}

/// The firmware of a machine with UEFI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loader {
    /// The program.
    pub code: PathBuf,
    /// Its format, as QEMU calls it.
    pub format: String,
    /// Whether the variables are kept from the guest's kernel, by system management mode.
    pub smm: bool,
}

/// The firmware for a machine of a module, whose variables have this format and size; `None`: it has BIOS.
///
/// # Errors
/// `HostMissing`, with the package to install.
pub fn loader(host: &Host, spec: &MachineSpec, variables: Option<(&str, u64)>) -> Result<Option<Loader>> {
    if spec.firmware == Firmware::Bios {
        return Ok(None);
    }
    let secure = spec.firmware == Firmware::UefiSecureBoot;
    let uefi = host.uefi(Chipset::of(spec), secure, variables)?;
    Ok(Some(Loader { code: uefi.code.path, format: uefi.code.format, smm: uefi.smm }))
}

/// What a machine keeps outside its disks.
#[derive(Debug)]
pub struct MachineState {
    ground: Arc<Ground>,
    spec: MachineSpec,
    files: Files,
    flash: Option<Flash>,
}

impl MachineState {
    /// Makes it for a machine, whose number is its own in the lab: new, or as the module has it that the machine starts from.
    ///
    /// # Errors
    /// `HostMissing` when the host has no such firmware or TPM; `InvalidImage` when the module's files were changed; file
    /// errors.
    pub async fn prepare(ground: &Arc<Ground>, spec: &MachineSpec, number: usize) -> Result<Self> {
        let files = Files::new(number);
        let parent = match &spec.state_of {
            Some(parent) => Some(ground.parent(parent).await?),
            None => None,
        };
        let flash = state::prepare(ground, spec, &files, parent).await?;
        Ok(Self { ground: Arc::clone(ground), spec: spec.clone(), files, flash })
    }

    /// Its firmware, where that is UEFI, and the file of its variables.
    #[must_use]
    pub fn firmware(&self) -> Option<(Loader, PathBuf)> {
        let flash = self.flash.as_ref()?;
        let loader =
            Loader { code: flash.code.path.clone(), format: flash.code.format.clone(), smm: flash.smm };
        Some((loader, self.ground.path(&self.files.variables)))
    }

    /// The socket of its TPM, where it has one: something listens there after [`start_tpm`](Self::start_tpm).
    #[must_use]
    pub fn tpm_socket(&self) -> Option<PathBuf> {
        self.spec.tpm.then(|| self.ground.path(&self.files.tpm_socket))
    }

    /// Starts its TPM, where it has one: for one run of the machine, with whose hanging up it ends.
    ///
    /// # Errors
    /// `HostMissing` without swtpm; `LaunchFailed`; file errors.
    pub async fn start_tpm(&self) -> Result<Option<Tpm>> {
        let Some(socket) = self.tpm_socket() else { return Ok(None) };
        // That of the last run.
        let _ = tokio::fs::remove_file(&socket).await;
        let lifetime = match self.ground.retention {
            Retention::EndWithOwner => Lifetime::WithOwner(self.ground.host.setpriv.clone()),
            Retention::MayBeKept => Lifetime::Kept,
        };
        let Files { tpm, tpm_socket, tpm_log, .. } = &self.files;
        let files = tpm::Files { directory: tpm, socket: tpm_socket, log: tpm_log };
        let child = tpm::start(&self.ground, files, lifetime).await?;
        if let Some(pid) = child.pid() {
            let (ground, role) = (Arc::clone(&self.ground), format!("swtpm of {}", self.spec.name));
            let recorded = blocking(move || ground.dir.record_process(pid, role)).await;
            match recorded {
                // It has ended already: then the machine does not start, and says why.
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(Some(Tpm { child, log: self.ground.path(tpm_log) }))
    }

    /// Captures it after the machine has ended, as [`capture_state`](rudder_core::backend::Machine::capture_state) promises.
    ///
    /// # Errors
    /// File errors.
    pub async fn capture(&self) -> Result<Vec<CapturedState>> {
        state::capture(&self.ground, &self.spec, &self.files, self.flash.as_ref()).await
    }
}

/// A TPM that runs. Dropping it ends it, unless it was released.
#[derive(Debug)]
pub struct Tpm {
    child: OwnedChild,
    log: PathBuf,
}

impl Tpm {
    /// A switch that, once set, lets it outlive this.
    #[must_use]
    pub fn release_switch(&self) -> Arc<AtomicBool> {
        self.child.release_switch()
    }

    /// Waits for its end, and says how it ended. May be repeated.
    pub async fn ended(&mut self) -> String {
        let status = self.child.wait().await;
        let told = status.map_or_else(|error| format!("could not be waited for: {error}"), describe);
        match last_words(&self.log).await {
            words if words.is_empty() => told,
            words => format!("{told}; its last words: {words}"),
        }
    }

    /// Waits until it has ended, which it does by itself when its machine has, and ends it when it does not.
    pub async fn finish(&mut self) {
        if timeout(QUIT_LIMIT, self.child.wait()).await.is_err() {
            self.child.kill();
            let _ = timeout(QUIT_LIMIT, self.child.wait()).await;
        }
    }
}
