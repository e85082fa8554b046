//! `module.json`, formats 1 and 2. Format 2 can describe content that is not identified by sha256, or whose size is unknown.
//!
//! Conversions name every field, so that a field added on one side does not compile until its conversion is written.

use crate::{
    both_ways::both_ways,
    content::{Content, ContentId},
    digest::Digest,
    hardware::{Bus, Firmware, NicModel},
    module::{
        CapturedDisk, CapturedState, InputRecord, InputRole, Module, Provenance, StateKind, TemplateMachine,
        TemplateNetwork, TemplateNic, TemplateSubnet, TemplateVpc, Timing,
    },
    timestamp::Timestamp,
    units::{Cidr, MacAddress, is_name},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr};

/// Reason why a record is not a valid module: completes "expected the record of a module, but …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidRecord {
    /// A file that is not in the module's directory.
    #[error("it refers to the file {0:?}, which is not in its directory")]
    Elsewhere(String),
    /// A format of a file that is not a plain name.
    #[error("it contains the invalid format name {0:?}")]
    Format(String),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ModuleRecord {
    format: u32,
    name: String,
    digest: Digest,
    created: Timestamp,
    machines: Vec<MachineRecord>,
    network: NetworkRecord,
    provenance: ProvenanceRecord,
}

#[derive(Debug, Serialize, Deserialize)]
struct MachineRecord {
    name: String,
    cpus: u32,
    memory: u64,
    firmware: Firmware,
    tpm: bool,
    nics: Vec<NicRecord>,
    disks: Vec<DiskRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    state: Vec<StateRecord>,
    #[serde(default)]
    invisible: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct NicRecord {
    name: String,
    subnet: String,
    slot: u8,
    slot_pinned: bool,
    ip: Option<Ipv4Addr>,
    mac: MacAddress,
    model: NicModel,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskRecord {
    name: String,
    bus: Bus,
    file: String,
    format: String,
    virtual_size: u64,
    #[serde(flatten)]
    content: ContentRecord,
}

#[derive(Debug, Serialize, Deserialize)]
struct StateRecord {
    kind: StateKindRecord,
    file: String,
    format: String,
    #[serde(flatten)]
    content: ContentRecord,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum ContentRecord {
    /// The only form in format 1.
    Verifiable { size: u64, sha256: Digest },
    /// Since format 2.
    Other {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        content: Option<ContentId>,
    },
}

impl ContentRecord {
    fn is_of_format_1(&self) -> bool {
        matches!(self, Self::Verifiable { .. })
    }
}

impl From<Content> for ContentRecord {
    fn from(content: Content) -> Self {
        match content.verifiable() {
            Some((size, sha256)) => Self::Verifiable { size, sha256 },
            None => Self::Other { size: content.size, content: content.id },
        }
    }
}

impl From<ContentRecord> for Content {
    fn from(record: ContentRecord) -> Self {
        match record {
            ContentRecord::Verifiable { size, sha256 } => Self::of_bytes(size, sha256),
            ContentRecord::Other { size, content } => Self { size, id: content },
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StateKindRecord {
    FirmwareVariables,
    Tpm,
}

#[derive(Debug, Serialize, Deserialize)]
struct NetworkRecord {
    declared: bool,
    vpcs: Vec<VpcRecord>,
    subnets: Vec<SubnetRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
struct VpcRecord {
    name: String,
    internet: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct SubnetRecord {
    name: String,
    vpc: String,
    cidr: Cidr,
    dhcp: bool,
    dns: Vec<Ipv4Addr>,
    unmanaged: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct ProvenanceRecord {
    manifest: String,
    plan: Digest,
    inputs: Vec<InputEntry>,
    versions: BTreeMap<String, String>,
    timings: Vec<TimingRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    not_repeatable: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct InputEntry {
    role: RoleRecord,
    url: String,
    #[serde(flatten)]
    content: ContentRecord,
}

/// A role as text: `source of VM NAME`, `ISO`, `file`. Any other text written by earlier versions means a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct RoleRecord(String);

/// Prefix of the role of a VM's source.
const SOURCE_OF: &str = "source of VM ";

impl From<InputRole> for RoleRecord {
    fn from(role: InputRole) -> Self {
        Self(match role {
            InputRole::Source { vm } => format!("{SOURCE_OF}{vm}"),
            InputRole::File => "file".to_owned(),
            InputRole::Iso => "ISO".to_owned(),
        })
    }
}

impl From<RoleRecord> for InputRole {
    fn from(RoleRecord(text): RoleRecord) -> Self {
        match text.strip_prefix(SOURCE_OF) {
            Some(vm) => Self::source(vm),
            None if text == "ISO" => Self::Iso,
            None => Self::File,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct TimingRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vm: Option<String>,
    phase: String,
    millis: u64,
}

/// Returns what the digest of a module is computed from.
pub(super) fn digested(
    name: &str,
    machines: &[TemplateMachine],
    network: &TemplateNetwork,
) -> serde_json::Result<String> {
    let machines: Vec<_> = machines.iter().cloned().map(MachineRecord::from).collect();
    serde_json::to_string(&(name, machines, NetworkRecord::from(network.clone())))
}

impl From<Module> for ModuleRecord {
    fn from(module: Module) -> Self {
        // The location of the record is not part of it.
        let Module { name, digest, created, machines, network, provenance, path: _ } = module;
        let machines: Vec<MachineRecord> = machines.into_iter().map(Into::into).collect();
        let (network, provenance): (_, ProvenanceRecord) = (network.into(), provenance.into());
        let disks = machines.iter().flat_map(|machine| &machine.disks).map(|disk| &disk.content);
        let state = machines.iter().flat_map(|machine| &machine.state).map(|state| &state.content);
        let inputs = provenance.inputs.iter().map(|input| &input.content);
        // Uses the earliest format that can hold the module, so that earlier versions can read it.
        let format = if disks.chain(state).chain(inputs).all(ContentRecord::is_of_format_1) { 1 } else { 2 };
        Self { format, name, digest, created, machines, network, provenance }
    }
}

impl TryFrom<ModuleRecord> for Module {
    type Error = InvalidRecord;

    fn try_from(record: ModuleRecord) -> Result<Self, InvalidRecord> {
        let ModuleRecord { format: _, name, digest, created, machines, network, provenance } = record;
        for machine in &machines {
            let disks = machine.disks.iter().map(|disk| (&disk.file, &disk.format));
            let state = machine.state.iter().map(|state| (&state.file, &state.format));
            for (file, format) in disks.chain(state) {
                if !is_file_name(file) {
                    return Err(InvalidRecord::Elsewhere(file.clone()));
                }
                if !is_name(format) {
                    return Err(InvalidRecord::Format(format.clone()));
                }
            }
        }
        let machines = machines.into_iter().map(Into::into).collect();
        let (network, provenance) = (network.into(), provenance.into());
        Ok(Self { name, digest, created, machines, network, provenance, path: None })
    }
}

/// Returns whether this is the name of a file rather than a path.
fn is_file_name(text: &str) -> bool {
    !text.contains(['/', '\0']) && !matches!(text, "" | "." | "..")
}

impl From<StateKind> for StateKindRecord {
    fn from(kind: StateKind) -> Self {
        match kind {
            StateKind::FirmwareVariables => Self::FirmwareVariables,
            StateKind::Tpm => Self::Tpm,
        }
    }
}

impl From<StateKindRecord> for StateKind {
    fn from(kind: StateKindRecord) -> Self {
        match kind {
            StateKindRecord::FirmwareVariables => Self::FirmwareVariables,
            StateKindRecord::Tpm => Self::Tpm,
        }
    }
}

both_ways!(MachineRecord = TemplateMachine {
    name, cpus, memory, firmware, tpm, invisible; each nics, disks, state
});
both_ways!(NicRecord = TemplateNic { name, subnet, slot, slot_pinned, ip, mac, model });
both_ways!(DiskRecord = CapturedDisk { name, bus, file, format, virtual_size; into content });
both_ways!(StateRecord = CapturedState { file, format; into kind, content });
both_ways!(NetworkRecord = TemplateNetwork { declared; each vpcs, subnets });
both_ways!(VpcRecord = TemplateVpc { name, internet });
both_ways!(SubnetRecord = TemplateSubnet { name, vpc, cidr, dhcp, dns, unmanaged });
both_ways!(ProvenanceRecord = Provenance {
    manifest, plan, versions, not_repeatable, warnings; each inputs, timings
});
both_ways!(InputEntry = InputRecord { url; into role, content });
both_ways!(TimingRecord = Timing { vm, phase, millis });
