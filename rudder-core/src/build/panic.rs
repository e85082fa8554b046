//! Panics of a guest's kernel that the hypervisor does not hear of: early in the boot, before the driver for it is there, and
//! in guests that have none. Linux writes them on its console, and then stands still.

use super::evidence::plain_lines;
use crate::{Error, ErrorKind, backend::Machine};
use std::{sync::Arc, time::Duration};
use tokio::time::sleep;

/// How often is looked; what was said must stand for as long.
const LOOK: Duration = Duration::from_secs(2);
/// How much of the end of the serial console is read: the report of a panic with its call trace.
const BYTES: usize = 16 * 1024;
/// What Linux says (`panic()` in kernel/panic.c).
const SIGN: &str = "Kernel panic - not syncing";
/// What it says when it restarts itself: then it may well come back.
const RESTART: &str = "Rebooting in";

/// Waits until the guest's kernel has panicked, and says so; `doing` ends the sentence "… while". Of a machine without a
/// record of its serial console, for ever.
pub(super) async fn panicked(machine: &Arc<dyn Machine>, doing: &str) -> Error {
    let mut before = None;
    loop {
        sleep(LOOK).await;
        let said = machine.serial_tail(BYTES).await.ok().and_then(|bytes| panic_line(&bytes));
        if let Some(line) = said {
            if before.as_ref() == Some(&line) {
                let message = format!("the guest's kernel panicked while {doing}: {line}");
                return Error::new(ErrorKind::MachineDied, message).with_help(
                    "the end of the serial console says where; on a host under load, another try may help",
                );
            }
            before = Some(line);
        } else {
            before = None;
        }
    }
}

/// The line of a panic that stands at the end of a console.
fn panic_line(console: &[u8]) -> Option<String> {
    let lines = plain_lines(console);
    let at = lines.iter().rposition(|line| line.contains(SIGN) && !line.contains("end Kernel panic"))?;
    let restarts = lines[at..].iter().any(|line| line.contains(RESTART));
    (!restarts).then(|| lines[at].clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_one_unless_the_kernel_restarts_itself() {
        let panic = "[    0.004000] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    0.1] Call Trace:\r\n";
        let end = "[    0.2] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n";
        let line = "[    0.004000] Kernel panic - not syncing: VFS: Unable to mount root fs";
        assert_eq!(panic_line(format!("{panic}{end}").as_bytes()).as_deref(), Some(line));
        assert_eq!(panic_line(format!("{panic}Rebooting in 10 seconds..\r\n").as_bytes()), None);
        assert_eq!(panic_line(b"login:"), None);
    }
}
