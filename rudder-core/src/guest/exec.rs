//! One script on one channel: its input, its output line by line, its exit status. What the login shell in between
//! writes is separated from the script's output: see [`shell_frame`](crate::shell_frame).

use super::{Guest, lines::Lines};
use crate::{
    Error, ErrorKind, Result,
    event::{CommandStatus, OutputStream},
    shell_frame::{Cutter, Frame},
};
use bytes::Bytes;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig, client::Msg};
use std::time::Duration;
use tokio::{sync::Notify, time::Instant};

/// How long output may pause before reading stops, after the command ended: a process that it left in the background
/// may hold the output open forever.
const GRACE: Duration = Duration::from_millis(500);
/// How long output is read at most after the command ended, if that process keeps writing.
const MAX_GRACE: Duration = Duration::from_secs(10);
/// The number of the stream for standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;
/// How often a session is opened if the server closes it before what was requested has begun. dropbear 2022.82 to
/// 2024.86 closes a session at once when a process of another session ends between its opening and its request.
const MAX_STARTS: usize = 8;
/// How long a server may be silent after it closed a session, before it is considered gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a login shell may take before it runs what was requested. One that waits for input never does.
const BEGIN_LIMIT: Duration = Duration::from_secs(120);
/// How much of the output of [`Guest::command`] is kept of each stream, in bytes.
const MAX_KEPT: usize = 256 * 1024;

/// The output and exit status of a short command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandOutput {
    /// The exit status.
    pub status: CommandStatus,
    /// Standard output, at most 256 KiB.
    pub stdout: String,
    /// Standard error, at most 256 KiB.
    pub stderr: String,
}

impl CommandOutput {
    /// Returns everything the command wrote, for an error.
    pub(crate) fn text(&self) -> String {
        let text = format!("{}{}", self.stdout, self.stderr);
        let text = text.trim();
        if text.is_empty() { "it wrote nothing".to_owned() } else { format!("it wrote: {text}") }
    }
}

impl Guest {
    /// Runs a short script with `/bin/sh`, without input, and collects its output. It works with any login shell,
    /// whatever that prints.
    ///
    /// # Errors
    /// `GuestUnreachable` when the connection breaks; `Protocol` when the server or the login shell does not run it.
    pub async fn command(&self, command: &str) -> Result<CommandOutput> {
        self.command_with_input(command, Bytes::new()).await
    }

    pub(super) async fn command_with_input(&self, command: &str, input: Bytes) -> Result<CommandOutput> {
        let mut stdout = String::new();
        let mut stderr = String::new();
        let status = self
            .shell("a command ran", command, input, &mut |stream, text| {
                let kept = match stream {
                    OutputStream::Stdout => &mut stdout,
                    OutputStream::Stderr => &mut stderr,
                };
                if kept.len() < MAX_KEPT {
                    kept.push_str(text);
                    kept.push('\n');
                }
            })
            .await?;
        Ok(CommandOutput { status, stdout, stderr })
    }

    /// Runs a script with `/bin/sh`, without input, and passes on its output while it runs.
    ///
    /// # Errors
    /// The same errors as [`command`](Self::command).
    pub async fn shell_line(
        &self,
        command: &str,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<CommandStatus> {
        self.shell("a command ran", command, Bytes::new(), output).await
    }

    pub(super) async fn open_channel(&self, what: &str) -> Result<Channel<Msg>> {
        match self.shared.handle.channel_open_session().await {
            Ok(channel) => Ok(channel),
            Err(russh::Error::ChannelOpenFailure(reason)) => Err(Error::new(
                ErrorKind::Protocol,
                format!("the guest's SSH server refused a session while {what}: {reason:?}"),
            )),
            Err(error) => Err(self.broken(what, Some(error))),
        }
    }

    /// Opens a session and makes a request in it. Returns once the request has begun, or was not accepted.
    pub(super) async fn start(&self, what: &str, request: Request<'_>) -> Result<Start<'_>> {
        for _ in 0..MAX_STARTS {
            self.shared.closing.all_closed().await;
            let (mut reader, writer) = self.open_channel(what).await?.split();
            let open = OpenChannel { guest: self, writer: Some(writer) };
            let Some(writer) = &open.writer else { return Err(self.broken(what, None)) };
            let asked = match request {
                Request::Exec(line) => writer.exec(true, line).await,
                Request::Subsystem(name) => writer.request_subsystem(true, name).await,
            };
            asked.map_err(|error| self.broken(what, Some(error)))?;
            let answer = loop {
                match reader.wait().await {
                    // Output and an exit status show that the command ran. Other messages, such as an early EOF, show
                    // nothing.
                    Some(
                        answer @ (ChannelMsg::Success
                        | ChannelMsg::Failure
                        | ChannelMsg::Close
                        | ChannelMsg::Data { .. }
                        | ChannelMsg::ExtendedData { .. }
                        | ChannelMsg::ExitStatus { .. }
                        | ChannelMsg::ExitSignal { .. }),
                    ) => break Some(answer),
                    Some(_) => {}
                    None => break None,
                }
            };
            match answer {
                None => return Err(self.broken(what, None)),
                Some(ChannelMsg::Failure) => return Ok(Start::Refused),
                Some(ChannelMsg::Close) => {
                    // Without an answer nothing has begun (RFC 4254, 6.5), so nothing runs twice.
                    open.finish();
                    tracing::debug!(what, "the server closed a session before it began");
                }
                Some(ChannelMsg::Success) => return Ok(Start::Begun(reader, open, None)),
                Some(first) => return Ok(Start::Begun(reader, open, Some(first))),
            }
        }
        Ok(Start::Closed)
    }

    /// Runs a script with `/bin/sh`, which then reads this input. `what` completes "the connection broke while".
    pub(super) async fn shell(
        &self,
        what: &str,
        script: &str,
        input: Bytes,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<CommandStatus> {
        let frame = Frame::new();
        let (reader, open, first) = match self.start(what, Request::Exec(&frame.line())).await? {
            Start::Begun(reader, open, first) => (reader, open, first),
            Start::Refused => {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the guest's SSH server refused to run a command",
                )
                .with_help(
                    "check whether the user is restricted to SFTP or to one command (sshd_config, \
                     ForceCommand)",
                ));
            }
            Start::Closed => {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    format!(
                        "the guest's SSH server closed {MAX_STARTS} consecutive sessions before it ran \
                         anything in them"
                    ),
                )
                .with_help("check the log of the guest's SSH server"));
            }
        };
        let Some(writer) = &open.writer else { return Err(self.broken(what, None)) };
        let begun = Notify::new();
        let writing = async {
            // Not earlier: the start-up files of a login shell could read what is not meant for them.
            begun.notified().await;
            let script = Bytes::from(frame.input(script));
            // A command that does not read its input is not an error: its exit status is more informative.
            if writer.data_bytes(script).await.is_ok() && writer.data_bytes(input).await.is_ok() {
                let _ = writer.eof().await;
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = self.read(what, reader, first, &frame, &begun, output) => ended,
            () = writing => Err(self.broken(what, None)),
        };
        if let Some(writer) = open.finish() {
            let _ = writer.close().await;
        }
        ended
    }

    async fn read(
        &self,
        what: &str,
        mut reader: ChannelReadHalf,
        mut first: Option<ChannelMsg>,
        frame: &Frame,
        begun: &Notify,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<CommandStatus> {
        let mut stdout = (frame.stdout(), Lines::new(OutputStream::Stdout));
        let mut stderr = (frame.stderr(), Lines::new(OutputStream::Stderr));
        // The exit status that the server reports: that of the login shell, unless `/bin/sh` replaced it.
        let mut status = None;
        let mut last = None;
        let mut closed = false;
        let begin = Instant::now() + BEGIN_LIMIT;
        loop {
            let message = match (first.take(), last) {
                (Some(first), _) => Some(first),
                (None, None) if stdout.0.has_begun() => reader.wait().await,
                (None, None) => match tokio::time::timeout_at(begin, reader.wait()).await {
                    Ok(message) => message,
                    Err(_) => return Err(self.not_begun_error(None, &[&stdout.0, &stderr.0])),
                },
                (None, Some(last)) => {
                    let until = (Instant::now() + GRACE).min(last);
                    match tokio::time::timeout_at(until, reader.wait()).await {
                        Ok(message) => message,
                        Err(_) => break,
                    }
                }
            };
            match message {
                Some(ChannelMsg::Data { data }) => {
                    stdout.1.push(&stdout.0.push(&data), output);
                    if stdout.0.has_begun() {
                        begun.notify_one();
                    }
                }
                Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => {
                    stderr.1.push(&stderr.0.push(&data), output);
                }
                Some(ChannelMsg::ExitStatus { exit_status }) => {
                    status = Some(CommandStatus::Code(exit_status));
                    last.get_or_insert(Instant::now() + MAX_GRACE);
                }
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    status = Some(CommandStatus::Signal(signal_text(&signal_name)));
                    last.get_or_insert(Instant::now() + MAX_GRACE);
                }
                // A server closes the channel after all output, unless background processes hold the output open.
                Some(ChannelMsg::Close) => {
                    closed = true;
                    break;
                }
                Some(_) => {}
                None => break,
            }
            if stdout.0.has_ended() {
                last.get_or_insert(Instant::now() + MAX_GRACE);
            }
        }
        for (cutter, lines) in [&mut stdout, &mut stderr] {
            lines.push(&cutter.rest(), output);
            lines.finish(output);
        }
        let has_begun = stdout.0.has_begun();
        match stdout.0.status().or(status) {
            Some(status) if has_begun => Ok(status),
            Some(status) => Err(self.not_begun_error(Some(&status), &[&stdout.0, &stderr.0])),
            None if closed && self.answers().await => Err(Error::new(
                ErrorKind::Protocol,
                format!(
                    "the guest's SSH server closed the session while {what}, and did not report how it ended"
                ),
            )
            .with_help(
                "check whether the step stopped the SSH server, and the log of the guest's SSH server",
            )),
            None => Err(self.broken(what, None)),
        }
    }

    /// Returns the error of a login shell that did not run what was requested.
    fn not_begun_error(&self, status: Option<&CommandStatus>, streams: &[&Cutter]) -> Error {
        let said: Vec<String> =
            streams.iter().map(|cutter| cutter.noise()).filter(|said| !said.is_empty()).collect();
        let said = if said.is_empty() {
            "it wrote nothing".to_owned()
        } else {
            format!("it wrote: {}", said.join("\n"))
        };
        let ended = match status {
            Some(status) => format!("it ended with {status}"),
            None => format!("it did not within {} s", BEGIN_LIMIT.as_secs()),
        };
        Error::new(
            ErrorKind::Protocol,
            format!("expected the login shell of user {:?} to run `/bin/sh`, but {ended}; {said}", self.user()),
        )
        .with_help(
            "give the user a login shell that runs commands without a terminal, and start-up files that neither wait for input \
             nor end the shell; or log in as another user",
        )
    }

    /// Whether the connection still works.
    async fn answers(&self) -> bool {
        let ping = tokio::time::timeout(ANSWER_LIMIT, self.shared.handle.send_ping());
        !self.is_closed() && matches!(ping.await, Ok(Ok(())))
    }
}

/// A request in a new session.
#[derive(Clone, Copy)]
pub(super) enum Request<'a> {
    /// Runs this line in the user's login shell.
    Exec(&'a str),
    /// Starts this subsystem.
    Subsystem(&'a str),
}

/// The result of a request.
pub(super) enum Start<'a> {
    /// It has begun. If a message arrived in place of the server's confirmation, it is the last field.
    Begun(ChannelReadHalf, OpenChannel<'a>, Option<ChannelMsg>),
    /// The server does not support it.
    Refused,
    /// The server closed every session without an answer.
    Closed,
}

/// A channel that, if dropped before its end, signals its command to end and is closed.
pub(super) struct OpenChannel<'a> {
    guest: &'a Guest,
    writer: Option<ChannelWriteHalf<Msg>>,
}

impl OpenChannel<'_> {
    /// Disarms the drop handler, and returns the writing half.
    pub(super) fn finish(mut self) -> Option<ChannelWriteHalf<Msg>> {
        self.writer.take()
    }
}

impl Drop for OpenChannel<'_> {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let closing = async move {
                let _ = writer.signal(Sig::TERM).await;
                let _ = writer.close().await;
            };
            self.guest.shared.cleanups.spawn_on(closing, &runtime);
        }
    }
}

/// Returns the name of a signal as in RFC 4254, 6.10.
fn signal_text(signal: &Sig) -> String {
    match signal {
        Sig::Custom(name) => name.clone(),
        known => format!("{known:?}"),
    }
}

/// Quotes a text as one word of a POSIX shell.
pub(super) fn quote(text: &str) -> String {
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Whether a character is literal in an unquoted word.
pub(super) fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c)
}
