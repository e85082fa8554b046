//! What the parts of a lab share: its cluster, its lease, and the disks that were captured in it.

use crate::{
    cluster::{Cluster, metadata},
    data_volume::{Filling, data_volume, filled},
    lease::Ownership,
    names::{Kind, NAME, VM, lab_labels, label_value, object_name},
    specification::DiskRecord,
};
use kube::ResourceExt as _;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, Progress},
    content::{Content, ContentId},
    module::CapturedDisk,
};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// How labs are made.
#[derive(Debug, Clone)]
pub(crate) struct LabOptions {
    pub(crate) storage_class: Option<String>,
    pub(crate) lease_duration: Duration,
    pub(crate) start_limit: Duration,
}

/// What the parts of a lab share.
#[derive(Debug)]
pub(crate) struct LabContext {
    pub(crate) cluster: Cluster,
    pub(crate) id: LabId,
    pub(crate) name: String,
    pub(crate) ownership: Arc<Ownership>,
    /// The storage class of volumes; `None` for the cluster's default.
    pub(crate) storage_class: Option<String>,
    /// How long a machine may take from power-on until it runs.
    pub(crate) start_limit: Duration,
    destroyed: AtomicBool,
    counter: AtomicU32,
    /// The disks that were captured, by claim.
    captured: Mutex<BTreeMap<String, CapturedDisk>>,
}

impl LabContext {
    pub(crate) fn new(
        cluster: &Cluster,
        id: LabId,
        name: String,
        ownership: Arc<Ownership>,
        options: &LabOptions,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            id,
            name,
            ownership,
            storage_class: options.storage_class.clone(),
            start_limit: options.start_limit,
            destroyed: AtomicBool::new(false),
            counter: AtomicU32::new(0),
            captured: Mutex::default(),
        }
    }

    /// Refuses further work.
    pub(crate) fn close(&self) {
        self.destroyed.store(true, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.destroyed.load(Ordering::Acquire)
    }

    /// Returns a number that no other object of the lab has.
    pub(crate) fn next(&self) -> u32 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// # Errors
    /// `Conflict` when the lab was destroyed.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.is_closed() {
            let message = format!("expected lab {} to be open, but it was destroyed", self.id);
            return Err(Error::new(ErrorKind::Conflict, message));
        }
        Ok(())
    }

    pub(crate) fn captured(&self) -> MutexGuard<'_, BTreeMap<String, CapturedDisk>> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies a disk of a machine that is not running to a volume of its own.
    pub(crate) async fn capture(
        &self,
        machine: &str,
        disk: &DiskRecord,
        progress: &Progress,
    ) -> Result<CapturedDisk> {
        self.check_open()?;
        let name =
            object_name(&[self.id.as_str(), "captured", machine, &disk.name, &self.next().to_string()]);
        let mut labels = lab_labels(Kind::Captured, &self.id, &self.name);
        labels.insert(VM.to_owned(), label_value(machine));
        let annotations = [(NAME, format!("{machine}/{}", disk.name))];
        let filling =
            Filling::Volume { namespace: self.cluster.namespace().to_owned(), name: disk.claim.clone() };
        let metadata = metadata(&name, labels, annotations, Some(self.ownership.owner()));
        let wanted = data_volume(metadata, &filling, disk.virtual_size, self.storage_class.as_deref());
        let what = format!("a copy of disk {} of VM {machine}", disk.name);
        self.cluster.create(&wanted, &what).await?;
        let task = format!("capture {}", disk.name);
        let volume = filled(&self.cluster, &name, &what, progress, Some((&task, disk.virtual_size))).await?;
        let content = Content::identified(ContentId::Cluster(format!(
            "datavolume/{}",
            volume.uid().unwrap_or_default()
        )));
        let captured = CapturedDisk::new(&disk.name, disk.bus, &name, "raw", disk.virtual_size, content);
        let mut all = self.captured();
        all.insert(name, captured.clone());
        Ok(captured)
    }
}
