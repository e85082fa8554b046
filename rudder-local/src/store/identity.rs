//! Which directory something is: a directory that was moved is the same, a copy of it is another one. By it things outside of a
//! store are known to belong to it.

use super::{Store, durable::io_error, process};
use rudder_core::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
    time::UNIX_EPOCH,
};

/// Which directory of this host something is, for as long as the host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DirectoryIdentity {
    /// The device that it is on.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// When it was created, in nanoseconds since 1970, where the file system knows: inodes are given again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
}

impl DirectoryIdentity {
    /// Which one there is at this path now; symbolic links are not followed.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let meta = fs::symlink_metadata(path).map_err(|error| io_error("read", path, error))?;
        Ok(Self::from_metadata(&meta))
    }

    pub(super) fn from_metadata(meta: &Metadata) -> Self {
        let created = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let created = created.and_then(|since| u64::try_from(since.as_nanos()).ok());
        Self { device: meta.dev(), inode: meta.ino(), created }
    }
}

impl Store {
    /// Its random name. A copy of the store has the same.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.opened.id
    }

    /// Marks what runs outside of the store, such as the domains of a hypervisor, as belonging to this very store: to its
    /// [name](Self::name), and, until the host starts again, to its directory.
    #[must_use]
    pub fn mark(&self) -> String {
        let DirectoryIdentity { device, inode, .. } = self.0.opened.directory;
        format!("{}/{}/{device}:{inode}", self.name(), process::boot_id().unwrap_or_default())
    }

    /// Whether a [mark](Self::mark), or a [name](Self::name) alone, is of this store.
    #[must_use]
    pub fn recognises(&self, mark: &str) -> bool {
        let mut parts = mark.splitn(3, '/');
        let own = self.mark();
        let mut own = own.splitn(3, '/');
        parts.next() == own.next()
            && match parts.next() {
                // Numbers of devices mean nothing after the host's next start.
                boot @ Some(_) if boot == own.next() => parts.next() == own.next(),
                _ => true,
            }
    }
}
