//! Which process of this host runs a domain. Libvirt does not say, but names the domain in the command line, and hands on
//! the lab's id in the environment (`domain`).

use rudder_core::{backend::LabId, store::LAB_VARIABLE};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::{
    fs::{self, File},
    path::Path,
};
use tokio::net::unix::pipe;

/// The process of a domain of a lab; `None` when none runs, or it is another user's.
pub(crate) fn of_domain(domain: &str, lab: &LabId) -> Option<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| runs(&Path::new("/proc").join(pid.to_string()), domain, lab))
}

/// Waits until the process of a domain has ended; for ever, where there is none that can be watched. Told by the kernel: nobody
/// looks again and again.
pub(crate) async fn ended(domain: String, lab: LabId) {
    let open = move || {
        let pid = of_domain(&domain, &lab)?;
        let process = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let handle = pidfd_open(process, PidfdFlags::empty()).ok()?;
        // It is still the same: its number was not given to another in between.
        runs(&Path::new("/proc").join(pid.to_string()), &domain, &lab).then_some(handle)
    };
    let handle = tokio::task::spawn_blocking(open).await.ok().flatten();
    // A handle of a process becomes readable when it ends (pidfd_open(2)), as a pipe does: for the runtime they are the same.
    let watched = handle.and_then(|handle| pipe::Receiver::from_file_unchecked(File::from(handle)).ok());
    let readable = match &watched {
        Some(watched) => watched.readable().await.is_ok(),
        None => false,
    };
    if !readable {
        std::future::pending::<()>().await;
    }
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
