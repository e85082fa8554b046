//! A client of QEMU's control socket: commands, replies, and the events that report the state of the guest.
//!
//! The protocol is the QEMU Machine Protocol (QMP), implemented by the `qapi` crate. That crate knows the events of one
//! version of QEMU and closes the connection on any other, so unknown events are filtered out before they reach it.

use qapi::{
    ExecuteError,
    futures::{QapiService, QapiStream, QmpStreamTokio},
    qmp::{self, QmpCommand},
};
use rudder_core::{Error, ErrorKind, Result};
use rudder_local::lifecycle::{Observation, Shutdown};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader, DuplexStream},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{Mutex, mpsc},
};
use tokio_util::task::AbortOnDropHandle;

/// How long QEMU may take to reply to a command. It normally replies at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection to the control socket of a QEMU process.
#[derive(Clone)]
pub(crate) struct Qmp {
    service: Arc<QapiService<QmpStreamTokio<OwnedWriteHalf>>>,
    /// Serialises commands, and records whether QEMU has closed the connection: after a command that could not be sent,
    /// the service accepts no more.
    hung_up: Arc<Mutex<bool>>,
    /// Read replies and events for as long as any clone of the connection exists.
    _reader: Arc<[AbortOnDropHandle<()>; 2]>,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Qmp")
    }
}

impl Qmp {
    /// Connects, and returns the events received from then on. The channel closes when QEMU closes the connection.
    pub(crate) async fn connect(socket: &Path) -> io::Result<(Self, mpsc::UnboundedReceiver<Observation>)> {
        let (read, write) = UnixStream::connect(socket).await?.into_split();
        let (known, filtered) = tokio::io::duplex(64 << 10);
        let filter = AbortOnDropHandle::new(tokio::spawn(async move {
            // Success and failure alike mean that the connection has ended, which the reader notices.
            let _ = drop_unknown_events(read, known).await;
        }));
        let negotiation = QmpStreamTokio::open_split(filtered, write).await?;
        let stream: QapiStream<_, _> = negotiation.negotiate().await?;
        let (service, mut events) = stream.into_parts();
        let (sender, receiver) = mpsc::unbounded_channel();
        let reader = AbortOnDropHandle::new(tokio::spawn(async move {
            use futures::StreamExt;
            while let Some(item) = events.next().await {
                match item {
                    // Without a receiver of events, replies must still be read.
                    Ok(event) => drop(observation(event).map(|observation| sender.send(observation))),
                    Err(error) => tracing::debug!(%error, "QMP: unexpected or malformed reply"),
                }
            }
        }));
        Ok((
            Self { service: Arc::new(service), hung_up: Arc::default(), _reader: Arc::new([filter, reader]) },
            receiver,
        ))
    }

    /// Sends a command and waits for its reply. Dropping the future leaves the connection usable.
    async fn execute<C>(&self, what: &str, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + Send + Sync + 'static,
        C::Ok: Send + 'static,
    {
        let this = self.clone();
        let answer = tokio::spawn(async move {
            let mut hung_up = this.hung_up.lock().await;
            if *hung_up {
                return Err(ExecuteError::Io(io::ErrorKind::BrokenPipe.into()));
            }
            let answer = this.service.execute(command).await;
            // A reply that cannot be parsed is a reply nevertheless.
            *hung_up =
                matches!(&answer, Err(ExecuteError::Io(error)) if error.kind() != io::ErrorKind::InvalidData);
            answer
        });
        let failed = |message: String| Error::new(ErrorKind::Protocol, message);
        match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(ExecuteError::Qapi(error)))) => {
                Err(failed(format!("QEMU refused to {what}: {}", error.desc)))
            }
            Ok(Ok(Err(ExecuteError::Io(error)))) => {
                Err(failed(format!("QEMU closed the connection when asked to {what}")).with_source(error))
            }
            Ok(Err(error)) => {
                Err(failed(format!("the request to QEMU to {what} was interrupted")).with_source(error))
            }
            Err(_) => Err(failed(format!(
                "expected QEMU to {what}, but it did not answer within {} s",
                ANSWER_LIMIT.as_secs()
            ))),
        }
    }

    /// Starts or resumes the guest.
    pub(crate) async fn cont(&self) -> Result<()> {
        self.execute("start the machine", qmp::cont {}).await.map(drop)
    }

    /// Presses the power button.
    pub(crate) async fn press_power_button(&self) -> Result<()> {
        self.execute("press the power button", qmp::system_powerdown {}).await.map(drop)
    }

    /// Asks QEMU to exit cleanly.
    pub(crate) async fn quit(&self) -> Result<()> {
        self.execute("end", qmp::quit {}).await.map(drop)
    }

    /// Writes a screenshot to a file, given relative to QEMU's directory.
    pub(crate) async fn screendump(&self, file: &str) -> Result<()> {
        let command = qmp::screendump {
            filename: file.to_owned(),
            format: Some(qmp::ImageFormat::png),
            device: None,
            head: None,
        };
        self.execute("write a screenshot as PNG", command).await.map(drop)
    }
}

/// Copies the lines of QMP, without the events that the `qapi` crate does not know.
async fn drop_unknown_events(read: impl AsyncRead + Unpin, mut known: DuplexStream) -> io::Result<()> {
    let mut lines = BufReader::new(read).split(b'\n');
    while let Some(mut line) = lines.next_segment().await? {
        if is_unknown_event(&line) {
            tracing::debug!(event = %String::from_utf8_lossy(&line), "QMP: unknown event");
            continue;
        }
        line.push(b'\n');
        known.write_all(&line).await?;
    }
    Ok(())
}

fn is_unknown_event(line: &[u8]) -> bool {
    let is_event =
        || serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|value| value.get("event").is_some());
    serde_json::from_slice::<qmp::Event>(line).is_err() && is_event()
}

/// Converts an event into an observation of the machine, if it is relevant here.
fn observation(event: qmp::Event) -> Option<Observation> {
    use qmp::Event;
    match event {
        Event::SHUTDOWN { data, .. } => Some(Observation::Shutdown(match (data.guest, data.reason) {
            (true, qmp::ShutdownCause::guest_shutdown) => Shutdown::ByGuest,
            (_, reason) => {
                let reason = serde_json::to_value(reason).ok();
                let reason = reason.as_ref().and_then(|reason| reason.as_str()).unwrap_or("unknown");
                Shutdown::Other(reason.to_owned())
            }
        })),
        Event::GUEST_PANICKED { .. } => Some(Observation::Panicked),
        // With any other action, the error is reported to the guest or ignored, and the machine keeps running.
        Event::BLOCK_IO_ERROR { data, .. } if data.action == qmp::BlockErrorAction::stop => {
            let node = data.node_name.unwrap_or(data.device);
            let operation = match data.operation {
                qmp::IoOperationType::read => "read",
                qmp::IoOperationType::write => "write",
            };
            Some(Observation::DiskFailed {
                full: data.nospace.unwrap_or_else(|| data.reason.contains("No space left")),
                detail: Some(format!("{operation} of {node} failed: {}", data.reason)),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn observed(line: &str) -> Option<Observation> {
        observation(serde_json::from_str(line).unwrap())
    }

    #[test]
    fn events_become_observations() {
        let time = r#""timestamp": {"seconds": 1, "microseconds": 2}"#;
        let shutdown = |guest: bool, reason: &str| {
            observed(&format!(
                r#"{{{time}, "event": "SHUTDOWN", "data": {{"guest": {guest}, "reason": "{reason}"}}}}"#
            ))
        };
        assert_eq!(shutdown(true, "guest-shutdown"), Some(Observation::Shutdown(Shutdown::ByGuest)));
        let other = |reason: &str| Some(Observation::Shutdown(Shutdown::Other(reason.to_owned())));
        assert_eq!(shutdown(false, "host-qmp-quit"), other("host-qmp-quit"));
        assert_eq!(shutdown(true, "guest-panic"), other("guest-panic"));
        assert_eq!(
            observed(&format!(r#"{{{time}, "event": "GUEST_PANICKED", "data": {{"action": "pause"}}}}"#)),
            Some(Observation::Panicked)
        );
        let failed = |action: &str| {
            observed(&format!(
                r#"{{{time}, "event": "BLOCK_IO_ERROR", "data": {{"device": "", "nospace": true, "node-name": "disk0",
                 "reason": "No space left on device", "operation": "write", "action": "{action}", "qom-path": "/x"}}}}"#
            ))
        };
        assert_eq!(
            failed("stop"),
            Some(Observation::DiskFailed {
                detail: Some("write of disk0 failed: No space left on device".to_owned()),
                full: true
            })
        );
        assert_eq!(failed("report"), None);
        assert_eq!(observed(&format!(r#"{{{time}, "event": "RESUME"}}"#)), None);
    }

    #[test]
    fn only_unknown_events_are_dropped() {
        assert!(is_unknown_event(
            br#"{"event": "OF_A_LATER_QEMU", "timestamp": {"seconds": 1, "microseconds": 2}}"#
        ));
        assert!(!is_unknown_event(br#"{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}"#));
        assert!(!is_unknown_event(br#"{"return": {}, "id": 1}"#));
        assert!(!is_unknown_event(b"not JSON"));
    }
}
