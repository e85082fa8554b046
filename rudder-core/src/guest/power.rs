//! Identifies the current boot of the guest, and powers it off.

use super::{Guest, exec::CommandOutput};
use crate::{Error, ErrorKind, Result};
use std::time::Duration;

/// Prints something that changes with every boot. Linux has an identity (random(4)); the BSDs know when they started;
/// other systems report it through `who`.
pub(super) const BOOT_IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id 2>/dev/null \
    || sysctl -n kern.boottime 2>/dev/null || who -b 2>/dev/null || uptime -s";

/// Tries every way that may work as this user. `poweroff` and `shutdown` may be outside of a user's PATH.
pub(super) const POWER_OFF: &str = r#"
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export PATH
if [ "$(id -u)" = 0 ]; then as=; elif command -v sudo >/dev/null 2>&1; then as='sudo -n'
elif command -v doas >/dev/null 2>&1; then as='doas -n'; else as=; fi
for how in poweroff 'shutdown -P now' 'shutdown -h now' 'shutdown -p now' 'halt -p' 'busybox poweroff'; do
    $as $how && exit 0
done
exit 1
"#;

impl Guest {
    /// Returns a text that changes with every boot of the guest.
    ///
    /// # Errors
    /// `GuestUnreachable` when the connection breaks; `Unsupported` when the guest provides nothing of that kind.
    pub async fn boot_id(&self) -> Result<String> {
        let output = self.command(BOOT_IDENTITY).await?;
        let identity = output.stdout.trim();
        if output.status.success() && !identity.is_empty() {
            return Ok(identity.to_owned());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("expected the guest to report its boot identity, but it could not: {}", output.text()),
        ))
    }

    /// Powers the guest off from within, as root or with sudo. Returns when the guest has begun to power off, or has
    /// hung up; [`Machine::wait`](crate::backend::Machine::wait) reports when it is off.
    ///
    /// # Errors
    /// `StepFailed` when no way of doing it worked; the message contains the guest's output.
    pub async fn power_off(&self) -> Result<()> {
        // A guest on its way down may neither answer nor hang up.
        let output = tokio::time::timeout(Duration::from_secs(10), self.command(POWER_OFF)).await;
        match output {
            Err(_) => Ok(()),
            Ok(Ok(CommandOutput { status, .. })) if status.success() => Ok(()),
            Ok(Ok(output)) => {
                if self.went_down().await {
                    return Ok(());
                }
                Err(Error::new(
                    ErrorKind::StepFailed,
                    format!("the guest cannot be powered off by user {:?}: {}", self.user(), output.text()),
                )
                .with_help("let the user run `sudo -n poweroff`, or log in as root"))
            }
            Ok(Err(error)) if error.kind() == ErrorKind::GuestUnreachable => Ok(()),
            // The server closed the session, perhaps on its way down.
            Ok(Err(_)) if self.went_down().await => Ok(()),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Distinguishes a shell that the shutdown killed from one that could not power off: only in the latter case does
    /// the guest stay up.
    async fn went_down(&self) -> bool {
        let limit = Duration::from_secs(2);
        tokio::time::timeout(limit, self.closed(limit)).await.is_ok()
    }
}
