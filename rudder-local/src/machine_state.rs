//! The state of a machine outside its disks: the variables of its firmware and the state of its TPM. It is created new or copied
//! from a module when the machine is defined, and captured after the machine has ended.

use crate::{
    firmware::{Image, Uefi},
    host::Host,
    lab_storage::{LabStorage, blocking},
    parent::Parent,
    pci_layout::Chipset,
    tpm::{self, Tpm},
};
use rudder_core::{
    Error, Result,
    backend::MachineSpec,
    content::Content,
    hardware::Firmware,
    module::{CapturedState, StateKind},
};
use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc};

/// The format of a captured TPM: the file in which swtpm keeps its state.
const TPM_FORMAT: &str = "swtpm";

/// The flash memory of a machine with UEFI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flash {
    /// The firmware's executable, which belongs to the host and is never written to.
    pub code: Image,
    /// The format of the variables, in QEMU's naming.
    pub variables: String,
    /// Whether the variables are protected from the guest's kernel by system management mode.
    pub smm: bool,
}

/// Returns the firmware for a machine of a module, whose variables have this format and size; `None` for a machine with BIOS.
///
/// # Errors
/// `HostMissing`, with the package to install.
pub fn template_firmware(
    host: &Host,
    spec: &MachineSpec,
    variables: Option<(&str, u64)>,
) -> Result<Option<Flash>> {
    choose(host, spec, variables).map(|uefi| uefi.map(Flash::from))
}

fn choose(host: &Host, spec: &MachineSpec, variables: Option<(&str, u64)>) -> Result<Option<Uefi>> {
    if spec.firmware == Firmware::Bios {
        return Ok(None);
    }
    host.uefi(Chipset::of(spec), spec.firmware == Firmware::UefiSecureBoot, variables).map(Some)
}

impl From<Uefi> for Flash {
    fn from(uefi: Uefi) -> Self {
        Self { code: uefi.code, variables: uefi.template.format, smm: uefi.smm }
    }
}

/// The names of the files, relative to the directory of the lab.
#[derive(Debug)]
struct Files {
    variables: String,
    tpm: String,
    tpm_socket: String,
    tpm_log: String,
    captured: String,
}

impl Files {
    /// Names the files of the machine with this number. They are short, because a socket's path has at most 107 bytes (unix(7)).
    fn new(number: usize) -> Self {
        let file = |suffix: &str| format!("m{number}.{suffix}");
        Self {
            variables: file("variables"),
            tpm: file("tpm"),
            tpm_socket: file("tpm.ctrl"),
            tpm_log: file("tpm.log"),
            captured: file("captured"),
        }
    }
}

/// The state of a machine outside its disks.
#[derive(Debug)]
pub struct MachineState {
    storage: Arc<LabStorage>,
    machine: String,
    tpm: bool,
    files: Files,
    flash: Option<Flash>,
}

impl MachineState {
    /// Creates the state of a machine, either new or copied from the module that the machine starts from. `number` is the number
    /// of the machine in the lab.
    ///
    /// # Errors
    /// `HostMissing` when the host has no such firmware or TPM; `InvalidImage` when the module's files were changed; file
    /// errors.
    pub async fn prepare(storage: &Arc<LabStorage>, spec: &MachineSpec, number: usize) -> Result<Self> {
        let files = Files::new(number);
        let parent = match &spec.state_of {
            Some(parent) => Some(storage.parent(parent).await?),
            None => None,
        };
        let flash = prepare_flash(storage, spec, &files, parent.as_ref()).await?;
        if spec.tpm {
            prepare_tpm(storage, &files, parent.as_ref()).await?;
        }
        Ok(Self { storage: Arc::clone(storage), machine: spec.name.clone(), tpm: spec.tpm, files, flash })
    }

    /// Returns the state of a machine that another process prepared. `variables` is the format of its firmware variables, if it has
    /// any.
    ///
    /// # Errors
    /// `HostMissing` when the host has no such firmware any more; file errors.
    pub fn attach(
        storage: &Arc<LabStorage>,
        spec: &MachineSpec,
        number: usize,
        variables: Option<&str>,
    ) -> Result<Self> {
        let files = Files::new(number);
        let flash = match variables {
            None => None,
            Some(format) => {
                let path = storage.path(&files.variables);
                let failed = |error| Error::io(format_args!("read {}", path.display()), error);
                let size = fs::metadata(&path).map_err(failed)?.len();
                choose(storage.host(), spec, Some((format, size)))?.map(Flash::from)
            }
        };
        Ok(Self { storage: Arc::clone(storage), machine: spec.name.clone(), tpm: spec.tpm, files, flash })
    }

    /// Adopts the running TPM of a machine that another process started.
    ///
    /// # Errors
    /// The process cannot be observed.
    pub fn adopt_tpm(&self) -> Result<Option<Tpm>> {
        if !self.tpm {
            return Ok(None);
        }
        let process = self.storage.adopt("swtpm", &self.machine)?;
        Ok(process.map(|process| Tpm::adopted(process, self.storage.path(&self.files.tpm_log))))
    }

    /// Returns its flash memory, and the name of the file with its variables in the lab; `None` unless its firmware is UEFI.
    #[must_use]
    pub fn flash(&self) -> Option<(&Flash, &str)> {
        Some((self.flash.as_ref()?, &self.files.variables))
    }

    /// Returns the name of its TPM's socket in the lab, if it has a TPM, which listens there after
    /// [`start_tpm`](Self::start_tpm).
    #[must_use]
    pub fn tpm_socket(&self) -> Option<&str> {
        self.tpm.then_some(self.files.tpm_socket.as_str())
    }

    /// Starts its TPM, if it has one, for one run of the machine: the TPM ends when QEMU closes the connection.
    ///
    /// # Errors
    /// `HostMissing` without swtpm; `LaunchFailed`; file errors.
    pub async fn start_tpm(&self) -> Result<Option<Tpm>> {
        let Some(socket) = self.tpm_socket() else { return Ok(None) };
        // The socket of the last run.
        let _ = tokio::fs::remove_file(self.storage.path(socket)).await;
        let Files { tpm, tpm_socket, tpm_log, .. } = &self.files;
        let files = tpm::Files { directory: tpm, socket: tpm_socket, log: tpm_log };
        let started = tpm::start(&self.storage, files).await?;
        self.storage.record_process(started.pid(), "swtpm", &self.machine).await?;
        Ok(Some(started))
    }

    /// Captures it after the machine has ended, as [`capture_state`](rudder_core::backend::Machine::capture_state) promises.
    ///
    /// # Errors
    /// File errors.
    pub async fn capture(&self) -> Result<Vec<CapturedState>> {
        let mut wanted = Vec::new();
        if let Some((flash, variables)) = self.flash() {
            let path = self.storage.path(variables);
            wanted.push((StateKind::FirmwareVariables, flash.variables.clone(), path));
        }
        if self.tpm {
            let path = self.storage.path(&self.files.tpm).join(tpm::STATE_FILE);
            wanted.push((StateKind::Tpm, TPM_FORMAT.to_owned(), path));
        }
        let (storage, prefix) = (Arc::clone(&self.storage), self.files.captured.clone());
        blocking(move || {
            let captured = wanted.into_iter().map(|(kind, format, path)| {
                // A copy, because the machine may be started again, which must not change what was captured.
                let bytes = read(&path)?;
                let file = format!("{prefix}.{}", kind.name());
                let target = storage.path(&file);
                let _ = fs::remove_file(&target);
                write_new(&target, &bytes)?;
                Ok(CapturedState::new(kind, file, format, Content::of(&bytes)))
            });
            captured.collect()
        })
        .await
    }
}

async fn prepare_flash(
    storage: &Arc<LabStorage>,
    spec: &MachineSpec,
    files: &Files,
    parent: Option<&Parent>,
) -> Result<Option<Flash>> {
    let inherited = parent.and_then(|parent| Some((parent, parent.variables(spec.firmware)?)));
    let format = inherited.and_then(|(_, state)| Some((state.format.as_str(), state.content.size?)));
    let Some(uefi) = choose(storage.host(), spec, format)? else { return Ok(None) };
    storage.note_version("firmware", uefi.version()?);
    let content = match inherited {
        Some((parent, state)) => parent.read(state)?,
        None => read(&uefi.template.path)?,
    };
    let path = storage.path(&files.variables);
    blocking(move || write_new(&path, &content)).await?;
    Ok(Some(uefi.into()))
}

async fn prepare_tpm(storage: &Arc<LabStorage>, files: &Files, parent: Option<&Parent>) -> Result<()> {
    storage.note_version("swtpm", tpm::version(storage).await?);
    let state = parent.and_then(|parent| Some((parent, parent.state(StateKind::Tpm)?)));
    let content = state.map(|(parent, state)| parent.read(state)).transpose()?;
    let directory = storage.path(&files.tpm);
    let made = directory.clone();
    blocking(move || tpm::make_directory(&made)).await?;
    match content {
        Some(content) => blocking(move || write_new(&directory.join(tpm::STATE_FILE), &content)).await,
        None => tpm::manufacture(storage, &files.tpm).await,
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Error::io(format_args!("read {}", path.display()), error))
}

/// Writes a new file that only its owner can read.
fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Error::io(format_args!("write {}", path.display()), error))
}
