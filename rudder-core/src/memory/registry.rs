//! The labs and modules of the backend.

use super::{lab::LabCore, persist::Kept};
use crate::{
    backend::{LabId, LabInfo, LabState},
    module::DamagedModule,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) labs: BTreeMap<LabId, LabRecord>,
    pub(super) modules: BTreeMap<String, Kept>,
    pub(super) damaged: Vec<DamagedModule>,
}

#[derive(Debug)]
pub(super) enum LabRecord {
    /// An owner holds the lab.
    Owned(Weak<LabCore>),
    /// The lab is kept.
    Kept(Arc<LabCore>),
    /// The owner dropped the lab of this name without destroying it.
    Orphaned(String),
}

impl LabRecord {
    pub(super) fn core(&self) -> Option<Arc<LabCore>> {
        match self {
            Self::Owned(core) => core.upgrade(),
            Self::Kept(core) => Some(core.clone()),
            Self::Orphaned(_) => None,
        }
    }

    pub(super) fn info(&self, id: &LabId) -> LabInfo {
        let name = || self.core().map_or_else(String::new, |core| core.name.clone());
        match self {
            Self::Owned(_) => LabInfo::new(id.clone(), name(), LabState::Owned),
            Self::Kept(core) => LabInfo::new(id.clone(), name(), LabState::of_kept(core.expires())),
            Self::Orphaned(name) => LabInfo::new(id.clone(), name, LabState::Abandoned),
        }
    }
}
