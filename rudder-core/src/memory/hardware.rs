//! What a guest in memory sees of its hardware while it runs, as files of its boot disk: its disks and their content, its
//! cards, its media, its serial console.

use super::{files::FileTree, machine::MachineCore};
use crate::backend::MachineSpec;
use std::sync::PoisonError;

/// The serial console: what is written there is said on it.
const CONSOLE: &str = "/dev/ttyS0";
/// The disks and their sizes, as proc(5) has them.
const PARTITIONS: &str = "/proc/partitions";
/// The screen: what is written there is shown on it.
const SCREEN: &str = "/dev/tty1";
/// The processors and the memory, as proc(5) has them.
const PROCESSORS: &str = "/proc/cpuinfo";
const MEMORY: &str = "/proc/meminfo";
/// A line for each card: its hardware address, and its place.
const CARDS: &str = "/run/cards";
/// Where the content of a disk stands in the files of its volume, when it is not the boot disk.
pub(super) const CONTENT: &str = "/content";

/// The file of a disk: `/dev/vda` is the first.
fn device(index: usize) -> String {
    let letter = u8::try_from(index).map_or('z', |index| char::from(b'a'.saturating_add(index)));
    format!("/dev/vd{letter}")
}

fn partitions(spec: &MachineSpec) -> String {
    let lines = spec.disks.iter().enumerate().map(|(index, disk)| {
        let (size, device) = (disk.volume.virtual_size >> 10, device(index));
        format!("{:4} {:8} {size:10} {}\n", 254, index * 16, device.trim_start_matches("/dev/"))
    });
    format!("major minor  #blocks  name\n\n{}", lines.collect::<String>())
}

fn cards(spec: &MachineSpec) -> String {
    spec.nics.iter().map(|nic| format!("{} slot{}\n", nic.mac, nic.slot)).collect()
}

fn processors(spec: &MachineSpec) -> String {
    (0..spec.cpus).map(|number| format!("processor\t: {number}\nmodel name\t: memory\n\n")).collect()
}

fn memory(spec: &MachineSpec) -> String {
    format!("MemTotal:       {} kB\n", spec.memory >> 10)
}

impl MachineCore {
    /// Shows the hardware to a guest that is powered on.
    pub(super) fn plug(&self) {
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = vec![
            (CONSOLE.to_owned(), Vec::new()),
            (SCREEN.to_owned(), Vec::new()),
            (PROCESSORS.to_owned(), processors(&self.spec).into_bytes()),
            (MEMORY.to_owned(), memory(&self.spec).into_bytes()),
            (PARTITIONS.to_owned(), partitions(&self.spec).into_bytes()),
            (CARDS.to_owned(), cards(&self.spec).into_bytes()),
        ];
        for (index, disk) in self.spec.disks.iter().enumerate().skip(1) {
            let content = volumes.get(&disk.volume.id).and_then(|volume| volume.files.read(CONTENT));
            files.push((device(index), content.unwrap_or_default().to_vec()));
        }
        for (index, cdrom) in self.spec.cdroms.iter().enumerate() {
            let content = volumes.get(&cdrom.id).and_then(|volume| volume.files.read(CONTENT));
            files.push((format!("/dev/sr{index}"), content.unwrap_or_default().to_vec()));
        }
        if let Some(floppy) = &self.spec.floppy {
            files.push(("/dev/fd0".to_owned(), floppy.to_vec()));
        }
        let boot = self.spec.disks.first().and_then(|disk| volumes.get_mut(&disk.volume.id));
        if let Some(boot) = boot {
            for (path, content) in files {
                boot.files.put(&path, content, 0o660);
            }
        }
    }

    /// Takes the hardware away again, and keeps what was written on the disks.
    pub(super) fn unplug(&self) {
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(boot) = self.spec.disks.first() else { return };
        let mut contents = Vec::new();
        if let Some(boot) = volumes.get_mut(&boot.volume.id) {
            let files = &mut boot.files;
            for (index, disk) in self.spec.disks.iter().enumerate().skip(1) {
                contents.push((&disk.volume.id, files.read(&device(index)).unwrap_or_default().to_vec()));
                remove(files, &device(index));
            }
            let discs = (0..self.spec.cdroms.len()).map(|index| format!("/dev/sr{index}"));
            let fixed =
                [CONSOLE, SCREEN, PROCESSORS, MEMORY, PARTITIONS, CARDS, "/dev/fd0"].map(str::to_owned);
            discs.chain(fixed).for_each(|path| remove(files, &path));
        }
        for (id, content) in contents {
            if let Some(volume) = volumes.get_mut(id).filter(|_| !content.is_empty()) {
                volume.files.put(CONTENT, content, 0o600);
            }
        }
    }

    /// Says on the serial console and shows on the screen what was written there.
    pub(super) fn say_what_was_written(&self) {
        let written = self.with_files(|files| [take(files, CONSOLE), take(files, SCREEN)]);
        let Some([said, shown]) = written else { return };
        if !said.is_empty() {
            self.say(&said);
        }
        if !shown.is_empty() {
            self.show(&String::from_utf8_lossy(&shown));
        }
    }
}

/// What was written into a device since this was asked last.
fn take(files: &mut FileTree, device: &str) -> Vec<u8> {
    let written = files.read(device).unwrap_or_default().to_vec();
    if !written.is_empty() {
        files.put(device, Vec::new(), 0o660);
    }
    written
}

fn remove(files: &mut FileTree, path: &str) {
    // What the guest removed itself is gone.
    let _ = files.remove_file(path);
}
