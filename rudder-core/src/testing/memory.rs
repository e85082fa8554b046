//! The memory backend under test.

use super::{Adapter, BadImages, Echo, GuestImage, Owners};
use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, Death, LabId},
    memory::{Fault, MemoryBackend, Source},
    plan::PlannedUrl,
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};

/// The port of its guests' echo.
const ECHO: u16 = 7;
/// The image of its guests; its bytes are compared with what is promised of them.
const IMAGE: &str = "https://images.example/guest.qcow2";
/// Nothing is there.
const MISSING: &str = "https://images.example/missing.qcow2";
/// It is no image.
const BROKEN: &str = "https://images.example/broken.qcow2";
/// How long its guests take to boot: long enough to be dialled too early.
const BOOT: Duration = Duration::from_millis(50);

/// The [memory backend](MemoryBackend), ready to be put through the suite.
#[derive(Debug, Clone)]
pub struct MemoryAdapter {
    backend: MemoryBackend,
}

impl Default for MemoryAdapter {
    fn default() -> Self {
        let missing = Fault::new(ErrorKind::NotFound, "expected status 200, but found 404");
        let broken = Fault::new(ErrorKind::InvalidImage, "expected a disk image, but found something else");
        let backend = MemoryBackend::new()
            .every_machine(|guest| guest.echoes(ECHO).boot_delay(BOOT))
            .source(IMAGE, Source::wrong_checksum)
            .source(MISSING, |source| source.fails(missing))
            .source(BROKEN, |source| source.fails(broken));
        Self { backend }
    }
}

impl MemoryAdapter {
    /// A fresh backend.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The backend.
    #[must_use]
    pub fn memory(&self) -> &MemoryBackend {
        &self.backend
    }
}

#[async_trait]
impl Adapter for MemoryAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.backend.clone())
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.backend())
    }

    async fn traces(&self) -> Result<Vec<String>> {
        let inventory = self.backend.inventory();
        let modules = inventory.modules.iter().map(|module| format!("module {module}"));
        // Connections and tasks belong to machines: what is left of them without any is left behind.
        if inventory.running.is_empty() {
            return Ok(inventory.leftovers().into_iter().chain(modules).collect());
        }
        let machines = inventory.running.iter().map(|machine| format!("machine {machine}"));
        let labs = inventory.labs.iter().map(|lab| format!("lab {lab}"));
        Ok(labs.chain(machines).chain(modules).collect())
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        if self.backend.kill_machine(lab, machine, Death::Hypervisor) {
            return Ok(());
        }
        let message = format!("expected VM {machine} to run in lab {lab}, but it does not");
        Err(Error::new(ErrorKind::NotFound, message))
    }

    async fn is_running(&self, lab: &LabId, machine: &str) -> Result<bool> {
        Ok(self.backend.inventory().running.contains(&format!("{lab}/{machine}")))
    }

    fn guest(&self) -> Option<GuestImage> {
        let url = IMAGE.parse().ok()?;
        let mut guest = GuestImage::new(PlannedUrl { url, sha256: None });
        guest.boots_within = Duration::from_secs(60);
        guest.echo = Some(Echo::new(ECHO, None));
        guest.cards = "cat /run/cards".to_owned();
        guest.serial_says = Some("Booting in memory".to_owned());
        Some(guest)
    }

    fn bad_images(&self) -> Option<BadImages> {
        Some(BadImages::new(MISSING.parse().ok()?, BROKEN.parse().ok()?))
    }

    fn owners(&self) -> Owners {
        Owners::Handle
    }
}
