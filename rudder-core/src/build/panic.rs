//! Detects panics of a guest's kernel that the hypervisor is not notified of: early in the boot, before the driver for that is
//! loaded, and in guests that have none. Linux writes them to its console and then halts.

use super::evidence::plain_lines;
use crate::{Error, ErrorKind, backend::Machine};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::{Instant, sleep, timeout_at},
};

/// How long the report of a panic must stand without a restart: a kernel that restarts itself announces that right after it.
const RESTART_WAIT: Duration = Duration::from_secs(2);
/// How many bytes of a line are kept.
const MAX_LINE: usize = 4096;
/// The message of a Linux panic (`panic()` in kernel/panic.c).
const PANIC_MESSAGE: &str = "Kernel panic - not syncing";
/// The message of Linux before it restarts itself, in which case the guest may well recover.
const RESTART_MESSAGE: &str = "Rebooting in";

/// Waits until the guest's kernel has panicked, and returns the error; `doing` ends the sentence "… while". Waits forever if the
/// machine has no serial console.
pub(super) async fn panicked(machine: &Arc<dyn Machine>, doing: &str) -> Error {
    loop {
        let Ok(log) = machine.serial_log(0).await else { return std::future::pending().await };
        if let Some(line) = panic_in(log.stream).await {
            let message = format!("the guest's kernel panicked while {doing}: {line}");
            return Error::new(ErrorKind::MachineDied, message).with_help(
                "check the end of the serial console; on a host under load, another attempt may help",
            );
        }
        // The machine has ended, or the connection broke.
        sleep(RESTART_WAIT).await;
    }
}

/// Returns the line of a panic after which the kernel did not restart itself; `None` once the console has ended.
async fn panic_in(mut console: impl AsyncRead + Unpin) -> Option<String> {
    let (mut panics, mut piece) = (Panics::default(), [0; 4096]);
    let mut found: Option<(String, Instant)> = None;
    loop {
        let read = match &found {
            None => console.read(&mut piece).await,
            Some((line, since)) => match timeout_at(*since + RESTART_WAIT, console.read(&mut piece)).await {
                Ok(read) => read,
                Err(_) => return Some(line.clone()),
            },
        };
        match read {
            Ok(count @ 1..) => panics.push(&piece[..count]),
            _ => return None,
        }
        found = panics.last.clone().map(|line| match found.take() {
            Some(known) if known.0 == line => known,
            _ => (line, Instant::now()),
        });
    }
}

/// The panics in the output of a console, read line by line: each byte is examined once, however small the pieces are.
#[derive(Debug, Default)]
struct Panics {
    /// The beginning of a line that has not ended yet.
    line: Vec<u8>,
    /// The line of the last panic, unless the kernel restarts itself after it.
    last: Option<String>,
}

impl Panics {
    fn push(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE - self.line.len();
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                for line in plain_lines(&std::mem::take(&mut self.line)) {
                    if line.contains(RESTART_MESSAGE) {
                        self.last = None;
                    } else if line.contains(PANIC_MESSAGE) && !line.contains("end Kernel panic") {
                        self.last = Some(line);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_reported_regardless_of_later_output() {
        let line = "Kernel panic - not syncing: VFS";
        let (mut guest, console) = tokio::io::duplex(1 << 10);
        let noise = async {
            let _ = guest.write_all(format!("booting\r\n{line}\r\n").as_bytes()).await;
            loop {
                sleep(RESTART_WAIT / 4).await;
                if guest.write_all(b"rcu: stalled\r\n").await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let reported = tokio::select! { reported = panic_in(console) => reported, () = noise => None };
        assert_eq!(reported.as_deref(), Some(line));
    }

    #[tokio::test(start_paused = true)]
    async fn a_restarting_kernel_and_an_ended_console_are_not_reported() {
        let (mut guest, console) = tokio::io::duplex(1 << 10);
        let print = async move {
            let _ = guest.write_all(b"Kernel panic - not syncing: VFS\r\n").await;
            sleep(RESTART_WAIT / 2).await;
            let _ = guest.write_all(b"Rebooting in 10 seconds..\r\n").await;
            sleep(RESTART_WAIT * 4).await;
        };
        let (reported, ()) = tokio::join!(panic_in(console), print);
        assert_eq!(reported, None);
    }

    #[test]
    fn a_panic_counts_unless_the_kernel_restarts_itself() {
        let panic = "[    0.004000] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    0.1] Call Trace:\r\n";
        let end = "[    0.2] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r\n";
        let line = "[    0.004000] Kernel panic - not syncing: VFS: Unable to mount root fs";
        // All at once, and byte by byte as a UART sends.
        for size in [usize::MAX, 1] {
            let panic_line = |console: &[u8]| {
                let mut panics = Panics::default();
                console.chunks(size).for_each(|piece| panics.push(piece));
                panics.last
            };
            assert_eq!(panic_line(format!("{panic}{end}").as_bytes()).as_deref(), Some(line));
            assert_eq!(panic_line(format!("{panic}Rebooting in 10 seconds..\r\n").as_bytes()), None);
            assert_eq!(panic_line(b"login:"), None);
        }
    }
}
