//! The identity of directories: a moved directory keeps its identity, a copy gets another one. Things outside a store are
//! recognised as belonging to it by that identity.

use super::{Store, durable::io_error, process};
use rudder_core::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
    time::UNIX_EPOCH,
};

/// The identity of a directory on this host, valid until the host restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DirectoryIdentity {
    /// The device that it is on.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its creation time, in nanoseconds since 1970, if the file system knows it: inodes are reused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
}

impl DirectoryIdentity {
    /// Returns the identity of the directory at this path; symbolic links are not followed.
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
    /// Returns the store's random name. A copy of the store has the same.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.opened.id
    }

    /// Returns a mark for objects outside the store, such as the domains of a hypervisor, that belong to this store: it
    /// contains the store's [name](Self::name) and, valid until the host restarts, the identity of its directory.
    #[must_use]
    pub fn mark(&self) -> String {
        let DirectoryIdentity { device, inode, .. } = self.0.opened.directory;
        format!("{}/{}/{device}:{inode}", self.name(), process::boot_id().unwrap_or_default())
    }

    /// Returns whether a [mark](Self::mark), or a [name](Self::name) alone, is of this store.
    #[must_use]
    pub fn recognises(&self, mark: &str) -> bool {
        let mut parts = mark.splitn(3, '/');
        let own = self.mark();
        let mut own = own.splitn(3, '/');
        parts.next() == own.next()
            && match parts.next() {
                // Device numbers mean nothing after the host restarts.
                boot @ Some(_) if boot == own.next() => parts.next() == own.next(),
                _ => true,
            }
    }
}
