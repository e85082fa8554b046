//! The backends that the examples offer, by the names that users write.

use clap::ValueEnum;
use rudder::{Result, backend::Backend, memory::MemoryBackend, qemu::QemuBackend, store::Store};
use std::{path::Path, sync::Arc};

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Hypervisor {
    Qemu,
    #[cfg(feature = "libvirt")]
    Libvirt,
    #[cfg(feature = "kubevirt")]
    Kubevirt,
    Memory,
}

impl Hypervisor {
    /// Opens the backend, on a store in this directory.
    pub(crate) fn open(self, store: &Path) -> Result<Arc<dyn Backend>> {
        Ok(match self {
            Self::Qemu => Arc::new(QemuBackend::builder(Store::open(store)?).build()),
            #[cfg(feature = "libvirt")]
            Self::Libvirt => Arc::new(rudder::libvirt::LibvirtBackend::builder(Store::open(store)?).build()),
            #[cfg(feature = "kubevirt")]
            Self::Kubevirt => Arc::new(rudder::kubevirt::KubevirtBackend::builder().build()),
            Self::Memory => Arc::new(MemoryBackend::new().store(Store::open(store)?.root())?),
        })
    }
}
