//! The node: one lab of a backend, its volumes and its machines.

use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Backend, ImportRequest, Lab, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, Volume, VolumeKind,
    },
    digest::Digest,
    module::{CapturedDisk, CapturedState, Provenance, TemplateMachine, TemplateNetwork},
    plan::{PlannedBuildRef, PlannedNetwork, PlannedSource, PlannedSubnet, PlannedVpc},
    units::is_name,
};
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::objects::Key;

/// The name of the node's only subnet.
pub(super) const SUBNET: &str = "default";
/// The name of the VM in modules that carry copies.
const COPIED: &str = "copied";
/// How long a CD-ROM stays cached by the node after its last use.
const CDROM_KEPT: Duration = Duration::from_secs(3600);

/// The lab on the node.
#[derive(Debug)]
pub(super) struct Node {
    backend: Arc<dyn Backend>,
    lab: Arc<dyn Lab>,
    machine_names: Mutex<HashSet<String>>,
    /// Modules that carry copies of disks and state. The lab builds on them, so they stay until it is destroyed.
    copies: Mutex<Vec<String>>,
    next_copy: AtomicUsize,
}

impl Node {
    pub(super) async fn open(backend: Arc<dyn Backend>) -> Result<Self> {
        let cidr = "10.0.2.0/24".parse().map_err(|error| {
            Error::new(ErrorKind::Internal, "cannot parse the address range of the node").with_source(error)
        })?;
        let network = PlannedNetwork {
            declared: false,
            vpcs: vec![PlannedVpc { name: SUBNET.to_owned(), internet: true }],
            subnets: vec![PlannedSubnet {
                name: SUBNET.to_owned(),
                vpc: SUBNET.to_owned(),
                cidr,
                dhcp: true,
                dns: Vec::new(),
                unmanaged: false,
            }],
        };
        let lab = backend.open_lab(&LabSpec::new("double", network)).await?;
        Ok(Self {
            backend,
            lab,
            machine_names: Mutex::default(),
            copies: Mutex::default(),
            next_copy: AtomicUsize::new(1),
        })
    }

    /// Imports a source as a volume for a claim.
    pub(super) async fn import(
        &self,
        claim: &Key,
        kind: VolumeKind,
        (source, parent_disk): (PlannedSource, Option<String>),
        size: Option<u64>,
        progress: &Progress,
    ) -> Result<Volume> {
        let mut request = ImportRequest::new(short(&claim.namespace), short(&claim.name), source, size);
        request.kind = kind;
        request.parent_disk = parent_disk;
        request.keep_for = CDROM_KEPT;
        Ok(self.lab.import(&request, progress).await?.volume)
    }

    /// Defines a machine. Its name is the wished one, or a free one like it.
    pub(super) async fn create_machine(&self, mut spec: MachineSpec) -> Result<Arc<dyn Machine>> {
        spec.name = self.free_name(&spec.name);
        self.lab.create_machine(&spec).await
    }

    fn free_name(&self, wished: &str) -> String {
        let mut names = self.machine_names.lock().unwrap_or_else(PoisonError::into_inner);
        let wished = short(wished);
        let numbered = (2..).map(|number: usize| format!("{wished}-{number}"));
        let mut candidates = std::iter::once(wished.clone()).chain(numbered);
        let name = candidates.find(|name| !names.contains(name)).unwrap_or_default();
        names.insert(name.clone());
        name
    }

    /// Stores what was captured so that it can be imported again, any number of times. A captured disk keeps its name.
    pub(super) async fn store_copy(
        &self,
        disks: Vec<CapturedDisk>,
        state: Vec<CapturedState>,
    ) -> Result<PlannedBuildRef> {
        let name = format!("{}-{}", self.lab.id(), self.next_copy.fetch_add(1, Ordering::Relaxed));
        let mut machine = TemplateMachine::new(COPIED, 1, 64 << 20);
        (machine.disks, machine.state) = (disks, state);
        let provenance = Provenance::new("", Digest::of(b""));
        let draft = ModuleDraft::new(&name, vec![machine], TemplateNetwork::default(), provenance);
        let module = self.lab.publish(draft).await?;
        self.copies.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        Ok(PlannedBuildRef::new(module.name, module.digest, COPIED))
    }

    /// Destroys the lab, and removes the copies that it used.
    pub(super) async fn close(&self) -> Result<()> {
        self.lab.destroy().await?;
        let copies = std::mem::take(&mut *self.copies.lock().unwrap_or_else(PoisonError::into_inner));
        for copy in copies {
            self.backend.remove_module(&copy).await?;
        }
        Ok(())
    }
}

/// Returns a name that the node accepts and that leaves space for a number.
fn short(name: &str) -> String {
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(50).collect();
    let name = name.trim_matches('-').to_ascii_lowercase();
    if is_name(&name) { name } else { "machine".to_owned() }
}
