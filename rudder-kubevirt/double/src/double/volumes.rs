//! The content of claims: volumes of the node.

use super::{node::Node, objects::Key};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Machine, Progress, Volume, VolumeKind},
    plan::{PlannedBuildRef, PlannedSource},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

/// The volumes of all claims that have content.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    stored: Mutex<HashMap<Key, Arc<StoredVolume>>>,
    changed: watch::Sender<()>,
}

impl Volumes {
    fn stored(&self) -> MutexGuard<'_, HashMap<Key, Arc<StoredVolume>>> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, claim: &Key) -> Option<Arc<StoredVolume>> {
        self.stored().get(claim).cloned()
    }

    pub(super) fn insert(&self, volume: StoredVolume) {
        self.stored().insert(volume.claim.clone(), Arc::new(volume));
        self.changed.send_replace(());
    }

    /// Forgets the volume of a claim with this UID.
    pub(super) fn forget(&self, claim: &Key, uid: &str) {
        let mut stored = self.stored();
        if stored.get(claim).is_some_and(|volume| volume.uid == uid) {
            stored.remove(claim);
        }
    }

    /// Forgets the volumes of claims that do not exist any more.
    pub(super) fn retain(&self, exists: impl Fn(&Key, &str) -> bool) {
        self.stored().retain(|claim, volume| exists(claim, &volume.uid));
    }

    /// Waits until a claim has content.
    pub(super) async fn wait_for(&self, claim: &Key) -> Option<Arc<StoredVolume>> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(volume) = self.get(claim) {
                return Some(volume);
            }
            changed.changed().await.ok()?;
        }
    }
}

/// Where the content of a volume comes from, which is enough to create the same content again.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    /// A disk or a CD-ROM; the name of the disk, if the source is a module.
    Disk(PlannedSource, Option<String>),
    /// The TPM and firmware state of a machine: that of a copied machine, or none yet.
    State(Option<PlannedBuildRef>),
}

/// The content of a claim.
#[derive(Debug)]
pub(super) struct StoredVolume {
    pub(super) claim: Key,
    /// The UID of the claim.
    pub(super) uid: String,
    /// Size in bytes.
    pub(super) size: u64,
    origin: Origin,
    content: tokio::sync::Mutex<Content>,
    /// The pods that use the volume now.
    users: watch::Sender<Vec<String>>,
}

#[derive(Debug, Default)]
struct Content {
    disk: Option<Volume>,
    cdrom: Option<Volume>,
    /// The machine that has written to the volume since it was created, and the name that the disk has there.
    writer: Option<(Arc<dyn Machine>, String)>,
    /// A copy of the volume as it is now.
    copy: Option<Origin>,
}

impl StoredVolume {
    pub(super) fn new(claim: Key, uid: impl Into<String>, size: u64, origin: Origin) -> Self {
        let (content, users) = (tokio::sync::Mutex::default(), watch::Sender::default());
        Self { claim, uid: uid.into(), size, origin, content, users }
    }

    /// Creates the volume on the node, as the kind that it will probably be used as.
    pub(super) async fn fill(&self, node: &Node, progress: &Progress) -> Result<()> {
        match &self.origin {
            Origin::Disk(PlannedSource::Url(url), _) if url.url.path().ends_with(".iso") => {
                let volume = self.cdrom(node, progress).await?;
                if volume.virtual_size > self.size {
                    let message =
                        format!("expected at most {} bytes, but found {}", self.size, volume.virtual_size);
                    return Err(Error::new(ErrorKind::InvalidInput, message));
                }
            }
            Origin::Disk(..) => drop(self.disk(node, progress).await?),
            Origin::State(_) => {}
        }
        Ok(())
    }

    fn source(&self) -> Result<(PlannedSource, Option<String>)> {
        match &self.origin {
            Origin::Disk(source, disk) => Ok((source.clone(), disk.clone())),
            Origin::State(_) => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("expected a disk in claim {}, but found the state of a machine", self.claim),
            )),
        }
    }

    /// Returns the volume for use as a disk.
    pub(super) async fn disk(&self, node: &Node, progress: &Progress) -> Result<Volume> {
        let mut content = self.content.lock().await;
        if let Some(volume) = &content.disk {
            return Ok(volume.clone());
        }
        let volume =
            node.import(&self.claim, VolumeKind::Disk, self.source()?, Some(self.size), progress).await?;
        content.disk = Some(volume.clone());
        Ok(volume)
    }

    /// Returns the volume for use as a CD-ROM.
    pub(super) async fn cdrom(&self, node: &Node, progress: &Progress) -> Result<Volume> {
        let mut content = self.content.lock().await;
        if let Some(volume) = &content.cdrom {
            return Ok(volume.clone());
        }
        let volume = node.import(&self.claim, VolumeKind::Cdrom, self.source()?, None, progress).await?;
        content.cdrom = Some(volume.clone());
        Ok(volume)
    }

    /// Records that a pod uses the volume, and which machine may write to it as the disk with which name.
    pub(super) async fn used_by(&self, pod: &str, writer: Option<(&Arc<dyn Machine>, &str)>) {
        let mut content = self.content.lock().await;
        if let Some((machine, disk)) = writer {
            content.copy = None;
            content.writer = Some((machine.clone(), disk.to_owned()));
        }
        self.users.send_modify(|users| users.push(pod.to_owned()));
    }

    /// Records that a pod does not use the volume any more.
    pub(super) fn released_by(&self, pod: &str) {
        self.users.send_modify(|users| users.retain(|user| user != pod));
    }

    /// Returns a pod that uses the volume.
    pub(super) fn user(&self) -> Option<String> {
        self.users.borrow().first().cloned()
    }

    /// Waits until no pod uses the volume.
    pub(super) async fn unused(&self) {
        // The sender lives as long as `self`.
        let _ = self.users.subscribe().wait_for(Vec::is_empty).await;
    }

    /// Returns the origin of a copy of the volume as it is now. Nothing may use the volume meanwhile.
    pub(super) async fn copy(&self, node: &Node, progress: &Progress) -> Result<Origin> {
        let mut content = self.content.lock().await;
        if let Some(copy) = &content.copy {
            return Ok(copy.clone());
        }
        let copy = match (&self.origin, &content.writer) {
            (origin, None) => origin.clone(),
            (Origin::Disk(..), Some((machine, disk))) => {
                let captured = machine.capture(disk, progress).await?;
                let module = node.store_copy(vec![captured], Vec::new()).await?;
                Origin::Disk(PlannedSource::BuildRef(module), Some(disk.clone()))
            }
            (Origin::State(_), Some((machine, _))) => {
                let state = machine.capture_state().await?;
                match state.is_empty() {
                    true => Origin::State(None),
                    false => Origin::State(Some(node.store_copy(Vec::new(), state).await?)),
                }
            }
        };
        content.copy = Some(copy.clone());
        Ok(copy)
    }
}
