//! The memory backend under test.

use super::{Adapter, BadImages, Echo, GuestImage, Owners};
use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, Death, LabId},
    memory::{Execution, Fault, MemoryBackend, Response, Source},
    plan::PlannedUrl,
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};

/// The port of the guests' echo service.
const ECHO: u16 = 7;
/// The image of the guests; its bytes are compared with the expected checksum.
const IMAGE: &str = "https://images.example/guest.qcow2";
/// A URL at which nothing exists.
const MISSING: &str = "https://images.example/missing.qcow2";
/// A URL of something that is not an image.
const BROKEN: &str = "https://images.example/broken.qcow2";
/// How long the guests take to boot: long enough to be dialled too early.
const BOOT: Duration = Duration::from_millis(50);

/// Adapts the [memory backend](MemoryBackend) to the suite.
#[derive(Debug, Clone)]
pub struct MemoryAdapter {
    backend: MemoryBackend,
}

impl Default for MemoryAdapter {
    fn default() -> Self {
        let missing = Fault::new(ErrorKind::NotFound, "expected status 200, but found 404");
        let broken = Fault::new(ErrorKind::InvalidImage, "expected a disk image, but found something else");
        let backend = MemoryBackend::new()
            .every_machine(|guest| guest.echoes(ECHO).boot_delay(BOOT).answers(answer))
            .source(IMAGE, Source::wrong_checksum)
            .source(MISSING, |source| source.fails(missing))
            .source(BROKEN, |source| source.fails(broken));
        Self { backend }
    }
}

impl MemoryAdapter {
    /// Returns an adapter with a new backend.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns an adapter with a new backend that [behaves like a remote one](MemoryBackend::remote).
    #[must_use]
    pub fn remote() -> Self {
        Self { backend: Self::default().backend.remote() }
    }

    /// Returns the backend.
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
        // Connections and tasks belong to machines: those that exist without a running machine were left behind.
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
        guest.nics = "cat /proc/nics".to_owned();
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

/// Answers what the suite asks its guests to run. This is not a shell: any other script gets no answer, which its test
/// notices.
fn answer(execution: &Execution) -> Option<Response> {
    let script = &*execution.script;
    if let Some(flood) = script.strip_prefix("i=0; while [ $i -lt ") {
        let (times, line) = flood.split_once(" ]; do echo ")?;
        let line = format!("{}\n", line.split_once(';')?.0);
        return Some(Response::ok("").writes("/dev/ttyS0", line.repeat(times.parse().ok()?)));
    }
    let commands = script.split(['\n', ';']).flat_map(|line| line.split("&&")).map(str::trim);
    commands.filter(|command| !command.is_empty()).try_fold(Response::ok(""), |response, command| {
        let (program, words) = command.split_once(' ').unwrap_or((command, ""));
        let (words, file) =
            words.rsplit_once(" >").map_or((words, None), |(words, file)| (words, Some(file)));
        let text = match program {
            "sync" | "true" => return Some(response),
            "poweroff" => return Some(response.powers_off()),
            "hostname" => return Some(response.reads("/etc/hostname")),
            // A file that need not exist.
            "head" if words.ends_with(" 2>/dev/null") => return Some(response),
            "head" => return Some(response.reads(words.strip_prefix("-n 1 ")?)),
            "cat" => return Some(response.reads(words.trim_matches('"').replace("\\\"", "\""))),
            "echo" => match words.strip_prefix("\"$") {
                Some(variable) => execution.env.get(variable.trim_end_matches('"'))?,
                None => words,
            },
            "printf" => words.trim_matches('\'').strip_suffix("\\n")?,
            _ => return None,
        };
        let line = format!("{text}\n");
        Some(match file {
            Some(file) => response.writes(file, line),
            None => response.stdout(line),
        })
    })
}
