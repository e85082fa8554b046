//! Finds the process of a domain on this host. Libvirt does not report it, but QEMU's command line contains the name of
//! the domain, and its environment contains the lab's id (`domain`).

use rudder_core::backend::LabId;
use rudder_local::{process::OwnedChild, store::LAB_VARIABLE};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Returns the process id of a domain of a lab; `None` if there is no such process or it belongs to another user.
pub(crate) fn of_domain(domain: &str, lab: &LabId) -> Option<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| runs(&directory(*pid), domain, lab))
}

/// Finds the process of a domain that was just started. It must still run: a process that has ended has no command
/// line.
pub(crate) async fn find(domain: String, lab: LabId) -> Option<OwnedChild> {
    let (wanted, of) = (domain.clone(), lab.clone());
    let pid = tokio::task::spawn_blocking(move || of_domain(&wanted, &of)).await.ok().flatten()?;
    OwnedChild::adopt(pid, || runs(&directory(pid), &domain, &lab)).ok().flatten()
}

fn directory(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn runs(process: &Path, domain: &str, lab: &LabId) -> bool {
    let name = format!("guest={domain},");
    let variable = format!("{LAB_VARIABLE}={lab}");
    has(&process.join("cmdline"), |argument| argument.starts_with(name.as_bytes()))
        && has(&process.join("environ"), |one| one == variable.as_bytes())
}

fn has(list: &Path, wanted: impl Fn(&[u8]) -> bool) -> bool {
    fs::read(list).unwrap_or_default().split(|byte| *byte == 0).any(wanted)
}
