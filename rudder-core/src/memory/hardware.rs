//! The device files of a guest: its disks, media, consoles, and the description of its hardware.

use super::machine::MachineCore;
use crate::backend::MachineSpec;
use std::sync::PoisonError;

/// The path of a disk's content in the files of its volume, unless it is the boot disk.
pub(super) const CONTENT: &str = "/content";
/// How much of a medium can be read, in bytes: a sector of a CD-ROM.
const MEDIUM_LIMIT: usize = 2048;

fn lines<T>(of: impl IntoIterator<Item = T>, line: impl Fn(T) -> String) -> Vec<u8> {
    of.into_iter().map(line).collect::<String>().into_bytes()
}

/// Returns the description of the hardware at a path, if the path is one of those.
fn reported(spec: &MachineSpec, path: &str) -> Option<Vec<u8>> {
    let bytes = match path {
        "/proc/cpuinfo" => lines(0..spec.cpus, |number| format!("processor\t: {number}\n\n")),
        "/proc/meminfo" => format!("MemTotal: {} kB\n", spec.memory >> 10).into_bytes(),
        // Major and minor number, KiB, name.
        "/proc/partitions" => {
            lines(&spec.disks, |disk| format!("254 0 {} {}\n", disk.volume.virtual_size >> 10, disk.name))
        }
        "/proc/nics" => lines(&spec.nics, |nic| format!("{} slot{}\n", nic.mac, nic.slot)),
        "/etc/hostname" => format!("{}\n", spec.name).into_bytes(),
        "/dev/fd0" => spec.floppy.as_ref()?.iter().take(MEDIUM_LIMIT).copied().collect(),
        _ => return None,
    };
    Some(bytes)
}

impl MachineCore {
    /// Reads a file or a device.
    pub(super) fn read_file(&self, path: &str) -> Option<Vec<u8>> {
        let limit = if path.starts_with("/dev/sr") { MEDIUM_LIMIT } else { usize::MAX };
        let on_a_volume = || {
            let (volume, path) = self.place(path)?;
            let volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            Some(volumes.get(volume)?.files.read(path)?.iter().take(limit).copied().collect())
        };
        on_a_volume().or_else(|| reported(&self.spec, path))
    }

    /// Writes a file or a device.
    pub(super) fn write_file(&self, path: &str, content: Vec<u8>) {
        match path {
            "/dev/ttyS0" => return self.say(&content),
            "/dev/tty1" => return self.show(&String::from_utf8_lossy(&content)),
            _ => {}
        }
        let Some((volume, path)) = self.place(path) else { return };
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(volume) = volumes.get_mut(volume) {
            volume.files.put(path, content, 0o644);
        }
    }

    /// Returns the volume that a path is on, and the path within it. `/dev/vdb` is the second disk, `/dev/sr0` the
    /// first CD-ROM.
    fn place<'a>(&'a self, path: &'a str) -> Option<(&'a str, &'a str)> {
        if let Some(number) = path.strip_prefix("/dev/sr") {
            return Some((&self.spec.cdroms.get(number.parse::<usize>().ok()?)?.id, CONTENT));
        }
        let letter = path.strip_prefix("/dev/vd").and_then(|rest| rest.bytes().next());
        let index = letter.map_or(0, |letter| usize::from(letter.saturating_sub(b'a')));
        let path = if index == 0 { path } else { CONTENT };
        Some((&self.spec.disks.get(index)?.volume.id, path))
    }
}
