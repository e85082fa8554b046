//! What a machine keeps outside its disks: the variables of its firmware, the memory of its TPM. Given to it when it is
//! defined, new or as a module has them; captured after it has ended.

use crate::{
    command_line::{Chipset, Files},
    firmware::{Image, Uefi},
    lab::{Ground, blocking},
    tpm,
};
use rudder_core::{
    Error, Result,
    backend::{MachineSpec, Progress},
    digest::Digest,
    module::{CapturedState, Module, StateKind, TemplateMachine},
    plan::Firmware,
    store::Store,
};
use std::{fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path, sync::Arc};

/// The format of a TPM's state: the file in which swtpm keeps it.
const TPM_FORMAT: &str = "swtpm";

/// The VM of a module whose state a machine starts with.
#[derive(Debug)]
pub(crate) struct Parent {
    pub(crate) machine: TemplateMachine,
    /// The module, and the store that its files are in.
    pub(crate) module: Module,
    pub(crate) store: Store,
}

impl Parent {
    fn state(&self, kind: StateKind) -> Option<&CapturedState> {
        self.machine.state.iter().find(|state| state.kind == kind)
    }

    /// Its variables, for a machine with this firmware. Those of another would be without the keys of Secure Boot, or with
    /// keys that nobody asked for.
    fn variables(&self, firmware: Firmware) -> Option<&CapturedState> {
        let same = self.machine.firmware == firmware;
        self.state(StateKind::FirmwareVariables).filter(|_| same)
    }

    /// The bytes of a state, which are those that were captured.
    fn read(&self, state: &CapturedState) -> Result<Vec<u8>> {
        let progress = Progress::none();
        read(&self.store.captured_file(&self.module, &state.file, state.size, &state.sha256, &progress)?)
    }
}

/// The flash memory of a machine with UEFI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flash {
    /// The program, which is the host's and is never written to.
    pub(crate) code: Image,
    /// The format of the variables, which are a file of the machine's.
    pub(crate) variables: String,
    /// Whether the variables are kept from the guest's kernel.
    pub(crate) smm: bool,
}

/// Gives a machine its state, and says which flash memory it has.
pub(crate) async fn prepare(
    ground: &Arc<Ground>,
    spec: &MachineSpec,
    files: &Files,
    parent: Option<Parent>,
) -> Result<Option<Flash>> {
    let flash = if spec.firmware == Firmware::Bios {
        None
    } else {
        let inherited = parent.as_ref().and_then(|parent| Some((parent, parent.variables(spec.firmware)?)));
        let there = inherited.map(|(_, state)| (state.format.as_str(), state.size));
        let secure = spec.firmware == Firmware::UefiSecureBoot;
        let uefi = ground.host.uefi(Chipset::of(spec), secure, there)?;
        ground.note_version("firmware", uefi.version()?);
        let content = match inherited {
            Some((parent, state)) => parent.read(state)?,
            None => read(&uefi.template.path)?,
        };
        let path = ground.path(&files.variables);
        blocking(move || write_new(&path, &content)).await?;
        let Uefi { code, template, smm } = uefi;
        Some(Flash { code, variables: template.format, smm })
    };
    if spec.tpm {
        ground.note_version("swtpm", tpm::version(ground).await?);
        let state = parent.as_ref().and_then(|parent| Some((parent, parent.state(StateKind::Tpm)?)));
        let content = state.map(|(parent, state)| parent.read(state)).transpose()?;
        let directory = ground.path(&files.tpm);
        let made = directory.clone();
        blocking(move || tpm::make_directory(&made)).await?;
        match content {
            Some(content) => blocking(move || write_new(&directory.join(tpm::STATE_FILE), &content)).await?,
            None => tpm::manufacture(ground, &files.tpm).await?,
        }
    }
    Ok(flash)
}

/// Captures the state of a machine that has ended, as files of the lab.
pub(crate) async fn capture(
    ground: &Arc<Ground>,
    spec: &MachineSpec,
    files: &Files,
    flash: Option<&Flash>,
) -> Result<Vec<CapturedState>> {
    let mut wanted = Vec::new();
    if let Some(flash) = flash {
        let path = ground.path(&files.variables);
        wanted.push((StateKind::FirmwareVariables, flash.variables.clone(), path));
    }
    if spec.tpm {
        let path = ground.path(&files.tpm).join(tpm::STATE_FILE);
        wanted.push((StateKind::Tpm, TPM_FORMAT.to_owned(), path));
    }
    let (ground, prefix) = (Arc::clone(ground), files.captured.clone());
    blocking(move || {
        let captured = wanted.into_iter().map(|(kind, format, path)| {
            // A copy: the machine may be started again, and what was captured stays what it was.
            let bytes = read(&path)?;
            let file = format!("{prefix}.{}", kind.name());
            let target = ground.path(&file);
            let _ = fs::remove_file(&target);
            write_new(&target, &bytes)?;
            Ok(CapturedState { kind, file, format, size: bytes.len() as u64, sha256: Digest::of(&bytes) })
        });
        captured.collect()
    })
    .await
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| Error::io(format_args!("read {}", path.display()), error))
}

/// Writes a file that only its owner can read.
fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes))
        .map_err(|error| Error::io(format_args!("write {}", path.display()), error))
}
