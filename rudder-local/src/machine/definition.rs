//! What a machine was defined as, and the names of its files in the lab's directory.

use super::MachineRecord;
use crate::{lab_storage::LabStorage, lan::Lan, machine_state::MachineState};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{MachineDisk, MachineSpec},
};
use std::{borrow::Cow, path::PathBuf, sync::Arc};

/// The medium with the seed.
pub const SEED: &str = "seed.img";
/// The floppy image.
pub const FLOPPY: &str = "floppy.img";

/// What a machine was defined as.
#[derive(Debug)]
pub struct Definition {
    /// The storage of its lab.
    pub storage: Arc<LabStorage>,
    /// The network of its lab.
    pub lan: Arc<Lan>,
    /// The description of the machine.
    pub spec: MachineSpec,
    /// Its number, unique in the lab.
    pub number: usize,
    /// The state that the machine keeps outside its disks.
    pub state: MachineState,
}

impl Definition {
    /// Creates the files of a machine with this number: its state, its seed and its floppy.
    ///
    /// # Errors
    /// As [`MachineState::prepare`]; file errors.
    pub async fn prepare(
        storage: &Arc<LabStorage>,
        lan: &Arc<Lan>,
        spec: &MachineSpec,
        number: usize,
    ) -> Result<Self> {
        let state = MachineState::prepare(storage, spec, number).await?;
        let (storage, lan) = (Arc::clone(storage), Arc::clone(lan));
        let definition = Self { storage, lan, spec: spec.clone(), number, state };
        let seed = spec.seed.as_ref().map(|seed| (SEED, &seed.image));
        let floppy = spec.floppy.as_ref().map(|image| (FLOPPY, image));
        for (suffix, image) in seed.into_iter().chain(floppy) {
            let path = definition.path(suffix);
            let written = tokio::fs::write(&path, image).await;
            written.map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
        }
        Ok(definition)
    }

    /// Returns the definition of a machine of a lab that was attached to, from its record.
    ///
    /// # Errors
    /// As [`MachineState::attach`].
    pub fn attach(
        storage: &Arc<LabStorage>,
        lan: &Arc<Lan>,
        record: &MachineRecord,
        number: usize,
    ) -> Result<Self> {
        let spec = record.spec();
        let state = MachineState::attach(storage, &spec, number, record.variables.as_deref())?;
        for disk in &spec.disks {
            storage.add_volume(&disk.volume.id, disk.volume.virtual_size);
        }
        Ok(Self { storage: Arc::clone(storage), lan: Arc::clone(lan), spec, number, state })
    }

    /// Records the machine for processes that attach to its lab.
    pub(super) fn record(&self, backend: &str, arguments: &[String]) -> Result<()> {
        let variables = self.state.flash().map(|(flash, _)| flash.variables.as_str());
        let mut record = MachineRecord::new(backend, &self.spec, variables);
        record.arguments = arguments.to_vec();
        record.write(self.storage.dir(), self.number)
    }

    /// Returns the name of one of its files, relative to the directory of the lab. Short, because the path of a socket
    /// has at most 107 bytes (unix(7)).
    #[must_use]
    pub fn file(&self, suffix: &str) -> String {
        format!("m{}.{suffix}", self.number)
    }

    /// Returns the path of one of its files.
    #[must_use]
    pub fn path(&self, suffix: &str) -> PathBuf {
        self.storage.path(&self.file(suffix))
    }

    /// Returns a path of one of its sockets that is short enough for an address (unix(7): at most 107 bytes).
    #[must_use]
    pub fn socket(&self, suffix: &str) -> PathBuf {
        self.storage.socket(&self.file(suffix))
    }

    /// Returns an error about this machine.
    #[must_use]
    pub fn error(&self, kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(kind, message).with_context("vm", &self.spec.name)
    }

    /// Returns the disk of this name, and its index.
    pub(super) fn disk(&self, name: &str) -> Result<(usize, &MachineDisk)> {
        self.spec.disks.iter().enumerate().find(|(_, disk)| disk.name == name).ok_or_else(|| {
            self.error(ErrorKind::NotFound, format!("expected a disk of the machine, but found {name:?}"))
        })
    }
}
