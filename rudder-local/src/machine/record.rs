//! The record of a machine in its lab's directory, with which another process attaches to it.

use crate::{lab_record, network::record_of_nics, store::LabDir};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{MachineDisk, MachineSpec, Volume},
    files::replace_file,
    hardware::{Bus, Firmware},
    plan::PlannedNic,
};
use serde::{Deserialize, Serialize};
use std::fs;

/// The format version of the record; later versions are not read.
const FORMAT: u32 = 1;

/// The record of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineRecord {
    format: u32,
    /// The backend that runs it.
    pub backend: String,
    name: String,
    cpus: u32,
    memory: u64,
    firmware: Firmware,
    tpm: bool,
    ports: Vec<u16>,
    #[serde(with = "record_of_nics")]
    nics: Vec<PlannedNic>,
    disks: Vec<Disk>,
    /// The format of the variables of its firmware, in QEMU's naming; `None` with BIOS.
    pub variables: Option<String>,
    /// The arguments of its QEMU; empty for a backend that does not start QEMU itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
}

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Disk {
    name: String,
    bus: Bus,
    volume: String,
    virtual_size: u64,
}

impl MachineRecord {
    /// Describes a machine of this backend.
    #[must_use]
    pub fn new(backend: &str, spec: &MachineSpec, variables: Option<&str>) -> Self {
        let disks = spec.disks.iter().map(|disk| Disk {
            name: disk.name.clone(),
            bus: disk.bus,
            volume: disk.volume.id.clone(),
            virtual_size: disk.volume.virtual_size,
        });
        Self {
            format: FORMAT,
            backend: backend.to_owned(),
            name: spec.name.clone(),
            cpus: spec.cpus,
            memory: spec.memory,
            firmware: spec.firmware,
            tpm: spec.tpm,
            ports: spec.ports.clone(),
            nics: spec.nics.clone(),
            disks: disks.collect(),
            variables: variables.map(str::to_owned),
            arguments: Vec::new(),
        }
    }

    /// Returns the specification of the machine, without what it read only when it was defined: its seed, floppy and CD-ROMs.
    #[must_use]
    pub fn spec(&self) -> MachineSpec {
        let mut spec = MachineSpec::new(&self.name, self.cpus, self.memory);
        (spec.firmware, spec.tpm) = (self.firmware, self.tpm);
        spec.ports.clone_from(&self.ports);
        spec.nics.clone_from(&self.nics);
        spec.disks.extend(self.disks.iter().map(|disk| {
            MachineDisk::new(&disk.name, disk.bus, Volume::new(&disk.volume, disk.virtual_size))
        }));
        spec
    }

    /// Writes the record of the machine with this number, if the lab may outlive this process.
    ///
    /// # Errors
    /// File errors.
    pub fn write(&self, lab: &LabDir, number: usize) -> Result<()> {
        if !lab.may_be_kept() {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(self).map_err(|error| {
            Error::new(ErrorKind::Internal, "cannot write the record of a machine").with_source(error)
        })?;
        replace_file(&lab.path().join(file(number)), &text)
    }

    /// Reads the records of all machines of a lab, with their numbers, in order.
    ///
    /// # Errors
    /// `Unsupported` for a record of a later version; `InvalidInput` for one that cannot be read, and for a machine of another
    /// backend than this one; file errors.
    pub fn read_all(lab: &LabDir, backend: &str) -> Result<Vec<(usize, Self)>> {
        let directory = lab.path();
        let failed = |error| Error::io(format_args!("read {}", directory.display()), error);
        let mut numbers = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            numbers.extend(name.to_str().and_then(number_in));
        }
        numbers.sort_unstable();
        let read = |number| {
            let record = Self::read(lab, number)?;
            if record.backend == backend {
                return Ok((number, record));
            }
            let message = format!(
                "expected a lab of the backend {backend}, but found one of the backend {}",
                record.backend
            );
            Err(Error::new(ErrorKind::InvalidInput, message)
                .with_context("lab", lab.id().as_str())
                .with_help(format!("attach to it with the backend {}", record.backend)))
        };
        numbers.into_iter().map(read).collect()
    }

    fn read(lab: &LabDir, number: usize) -> Result<Self> {
        let path = lab.path().join(file(number));
        let text =
            fs::read(&path).map_err(|error| Error::io(format_args!("read {}", path.display()), error))?;
        let help = "use the version of rudder that opened the lab, or a later one";
        lab_record::parse("machine record", &path, &text, FORMAT, help)
    }
}

fn file(number: usize) -> String {
    format!("m{number}.json")
}

fn number_in(file: &str) -> Option<usize> {
    let number = file.strip_prefix('m')?.strip_suffix(".json")?.parse().ok()?;
    // Rejects similar names, such as `m+1.json`.
    (self::file(number) == file).then_some(number)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A record as written by version 0.1.0. Never changed.
    const FORMAT_1: &str = r#"{
  "format": 1,
  "backend": "qemu",
  "name": "web",
  "cpus": 2,
  "memory": 1073741824,
  "firmware": "uefi",
  "tpm": true,
  "ports": [
    22
  ],
  "nics": [
    {
      "name": "nic1",
      "subnet": "front",
      "slot": 3,
      "slot_pinned": true,
      "ip": "10.20.0.10",
      "mac": "52:54:00:12:34:56",
      "model": "e1000"
    }
  ],
  "disks": [
    {
      "name": "root",
      "bus": "virtio",
      "volume": "v0.qcow2",
      "virtual_size": 4294967296
    }
  ],
  "variables": "raw",
  "arguments": [
    "-machine",
    "q35"
  ]
}"#;

    #[test]
    fn a_record_of_format_1_is_written_as_it_was_read() {
        let record: MachineRecord = serde_json::from_str(FORMAT_1).unwrap();
        assert_eq!(serde_json::to_string_pretty(&record).unwrap(), FORMAT_1);
        let again = MachineRecord {
            arguments: record.arguments.clone(),
            ..MachineRecord::new("qemu", &record.spec(), Some("raw"))
        };
        assert_eq!(again, record);
    }

    #[test]
    fn records_are_found_by_their_names() {
        assert_eq!(number_in("m12.json"), Some(12));
        for other in ["m12.qmp", "m+1.json", "m01.json", "mx.json", "network.json"] {
            assert_eq!(number_in(other), None, "{other}");
        }
    }
}
