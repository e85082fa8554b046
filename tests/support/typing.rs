//! Shared by the test and the benchmark of typing: prompts of real programs, text typed into them, and how it is read
//! back.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use rudder::{
    backend::{Backend, ImportRequest, Lab, LabSpec, Machine, MachineDisk, MachineSpec, Progress},
    console::Console,
    hardware::Bus,
    keys::named_key,
    plan::{PlannedNetwork, PlannedSource, PlannedUrl},
    qemu::QemuBackend,
    store::Store,
};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// CD-ROMs of Debian's packages grub-rescue-pc and ipxe. They also boot as disks.
pub const GRUB: &str = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso";
pub const IPXE: &str = "/usr/lib/ipxe/ipxe.iso";

/// Longer than any wait here takes, on any machine that this is meant for.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Returns `count` characters that contain every printable character of ASCII, in varying order.
pub fn printable(count: usize) -> String {
    let all: Vec<char> = (' '..='~').collect();
    // 7 and 95 have no common divisor, so each round contains every character once.
    (0..count).map(|index| all[(index * 7 + index / 95 * 13) % 95]).collect()
}

/// A machine that runs a program to type into.
pub struct Rig {
    pub console: Console,
    pub machine: Arc<dyn Machine>,
    lab: Arc<dyn Lab>,
    _directory: tempfile::TempDir,
}

impl Rig {
    /// Boots a disk image.
    pub async fn boot(image: &Path, memory: u64) -> Self {
        assert!(image.exists(), "{} is missing: run `make setup`", image.display());
        let directory = tempfile::Builder::new().prefix("rudder-typing-").tempdir().unwrap();
        let backend = QemuBackend::builder(Store::open(directory.path()).unwrap()).build();
        let network = PlannedNetwork::default();
        let lab = backend.open_lab(&LabSpec::new("typing", network)).await.unwrap();
        let url = format!("file://{}", image.display()).parse().unwrap();
        let source = PlannedSource::Url(PlannedUrl::new(url));
        let request = ImportRequest::new("typing", "disk", source, None);
        let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
        let mut spec = MachineSpec::new("typing", 1, memory);
        spec.disks.push(MachineDisk::new("disk", Bus::Ide, volume));
        let machine = lab.create_machine(&spec).await.unwrap();
        machine.start().await.unwrap();
        Self { console: Console::new(machine.clone()), machine, lab, _directory: directory }
    }

    pub async fn end(self) {
        drop(self.console);
        self.lab.destroy().await.unwrap();
    }

    async fn key(&self, name: &str) {
        self.console.press(named_key(name).unwrap()).await.unwrap();
    }
}

/// The result of typing.
#[derive(Debug)]
pub struct Typed {
    pub wanted: String,
    pub found: String,
    /// Number of characters typed, including those around the text.
    pub strokes: usize,
    pub took: Duration,
}

impl Typed {
    pub fn rate(&self) -> f64 {
        self.strokes as f64 / self.took.as_secs_f64()
    }
}

/// Types text, and measures how long it takes.
struct Typist<'a> {
    console: &'a Console,
    strokes: usize,
    took: Duration,
}

impl<'a> Typist<'a> {
    fn new(console: &'a Console) -> Self {
        Self { console, strokes: 0, took: Duration::ZERO }
    }

    async fn types(&mut self, text: &str) {
        let start = Instant::now();
        self.console.type_text(text).await.unwrap();
        self.took += start.elapsed();
        self.strokes += text.chars().count();
    }

    fn typed(self, wanted: &str, found: String) -> Typed {
        Typed { wanted: wanted.to_owned(), found, strokes: self.strokes, took: self.took }
    }
}

fn lines(text: &str, length: usize) -> Vec<String> {
    let all: Vec<char> = text.chars().collect();
    all.chunks(length).map(|line| line.iter().collect()).collect()
}

/// Returns the output on the serial console between two marks, without line ends.
async fn between(machine: &dyn Machine, begin: &str, end: &str) -> Option<String> {
    let said = String::from_utf8_lossy(&machine.serial_tail(1 << 20).await.unwrap()).into_owned();
    let (_, rest) = said.split_once(begin)?;
    let (inner, _) = rest.split_once(end)?;
    Some(inner.replace(['\r', '\n'], ""))
}

/// Types into the command line of GRUB, from Debian's rescue CD; reads back over the serial console.
pub async fn grub(text: &str) -> Typed {
    let rig = Rig::boot(Path::new(GRUB), 128 << 20).await;
    // GRUB shows a menu first.
    rig.console.wait_text("for a command-line", PATIENCE).await.unwrap();
    rig.console.press(u32::from('c')).await.unwrap();
    rig.console.wait_text("grub>", PATIENCE).await.unwrap();
    rig.console.type_text("insmod serial\nserial\nset begin='<<<'\nset end='>>>'\n").await.unwrap();
    let mut typist = Typist::new(&rig.console);
    // Shorter than a line of the screen, including the quotes.
    let lines = lines(text, 60);
    for (index, line) in lines.iter().enumerate() {
        // Between single quotes, only the quote itself is special.
        let quoted = line.replace('\'', "'\"'\"'");
        typist.types(&format!("set t{index}='{quoted}'\n")).await;
    }
    let echoes: String = (0..lines.len()).map(|index| format!("echo \"$begin$t{index}\"; ")).collect();
    let say = format!("terminal_output serial; {echoes}echo \"$end\"; terminal_output console\n");
    rig.console.type_text(&say).await.unwrap();
    rig.console.wait_serial(">>>", PATIENCE).await.unwrap();
    let found = between(&*rig.machine, "<<<", ">>>").await.unwrap_or_default();
    let typed = typist.typed(text, found.replace("<<<", ""));
    rig.end().await;
    typed
}

/// Types into the shell of iPXE; reads back from the screen.
pub async fn ipxe(text: &str) -> Typed {
    let rig = Rig::boot(Path::new(IPXE), 128 << 20).await;
    rig.console.wait_text("Ctrl-B", PATIENCE).await.unwrap();
    let control = named_key("leftCtrl").unwrap();
    rig.console.hold(control).await.unwrap();
    rig.console.press(u32::from('b')).await.unwrap();
    rig.console.release(control).await.unwrap();
    rig.console.wait_text("iPXE>", PATIENCE).await.unwrap();
    let mut typist = Typist::new(&rig.console);
    let mut found = String::new();
    for line in lines(text, 72) {
        typist.types(&line).await;
        // The screen may not show the last key yet, and a screenshot may be taken in the middle of drawing.
        let patience = Instant::now() + Duration::from_secs(20);
        let shown = loop {
            let screen = rig.console.text().await.unwrap();
            let last = screen.rows().filter(|row| row.starts_with(&['i', 'P', 'X', 'E', '>', ' '])).last();
            let shown: String =
                last.map(|row| row[6..].iter().take(line.len()).collect()).unwrap_or_default();
            if shown == line || Instant::now() > patience {
                break shown;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        found.push_str(&shown);
        // The line is erased, so that nothing of it is executed.
        rig.console.hold(control).await.unwrap();
        rig.console.press(u32::from('u')).await.unwrap();
        rig.console.release(control).await.unwrap();
    }
    let typed = typist.typed(text, found);
    rig.end().await;
    typed
}

/// Types into a Linux console of the tiny guest; reads back over the serial console.
pub async fn linux(text: &str, image: &Path) -> Typed {
    let rig = Rig::boot(image, 256 << 20).await;
    rig.console.wait_text("login:", PATIENCE).await.unwrap();
    rig.console.type_text("tester\n").await.unwrap();
    rig.console.wait_text("Password:", PATIENCE).await.unwrap();
    rig.console.type_text("tester\n").await.unwrap();
    rig.console.wait_text("$", PATIENCE).await.unwrap();
    rig.console.type_text("cat >/tmp/typed\n").await.unwrap();
    let mut typist = Typist::new(&rig.console);
    for line in lines(text, 100) {
        typist.types(&format!("{line}\n")).await;
    }
    rig.console.hold(named_key("leftCtrl").unwrap()).await.unwrap();
    rig.console.press(u32::from('d')).await.unwrap();
    rig.console.release(named_key("leftCtrl").unwrap()).await.unwrap();
    rig.console.wait_text("$", PATIENCE).await.unwrap();
    let say = "(echo '<''<<'; cat /tmp/typed; echo '>>''>') | sudo tee /dev/ttyS0 >/dev/null\n";
    rig.console.type_text(say).await.unwrap();
    rig.console.wait_serial(">>>", PATIENCE).await.unwrap();
    let found = between(&*rig.machine, "<<<", ">>>").await;
    let typed = typist.typed(text, found.unwrap_or_default());
    rig.end().await;
    typed
}
