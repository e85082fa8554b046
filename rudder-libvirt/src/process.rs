//! Which process of this host runs a domain. Libvirt does not say, but names the domain in the command line, and hands on
//! the lab's id in the environment (`domain`).

use rudder_core::{backend::LabId, store::LAB_VARIABLE};
use std::{fs, path::Path};

/// The process of a domain of a lab; `None` when none runs, or it is another user's.
pub(crate) fn of_domain(domain: &str, lab: &LabId) -> Option<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| runs(&Path::new("/proc").join(pid.to_string()), domain, lab))
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
