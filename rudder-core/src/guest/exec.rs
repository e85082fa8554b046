//! One script on one channel: its input, its output line by line, its end. The login shell between it and us is told from it:
//! see [`shell_frame`](crate::shell_frame).

use super::{Guest, lines::Lines};
use crate::{
    Error, ErrorKind, Result,
    event::{ExitStatus, OutputStream},
    shell_frame::{Cutter, Frame},
};
use bytes::Bytes;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig, client::Msg};
use std::time::Duration;
use tokio::{sync::Notify, time::Instant};

/// After the command ended, output is read on until nothing came for so long: a process that it left in the background
/// may hold the output open for ever.
const GRACE: Duration = Duration::from_millis(500);
/// And at most so long, when that process keeps writing.
const MAX_GRACE: Duration = Duration::from_secs(10);
/// The number of the stream for standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;
/// So often a session is opened anew that the server closed before it had begun what was asked of it. dropbear 2022.82 to
/// 2024.86 closes a session at once when a process of another session ends between its opening and its request.
const MAX_STARTS: usize = 8;
/// A server that says nothing for so long after it closed a session is taken as gone.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a login shell may take before it runs what it was asked to. One that waits for something never will.
const BEGIN: Duration = Duration::from_secs(120);
/// Of the output of [`Guest::command`], so much is kept of each stream.
const MAX_KEPT: usize = 256 * 1024;

/// What a short command said.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, at most 256 KiB.
    pub stdout: String,
    /// Its standard error, at most 256 KiB.
    pub stderr: String,
}

impl CommandOutput {
    /// Everything it wrote, for an error.
    pub(crate) fn text(&self) -> String {
        let text = format!("{}{}", self.stdout, self.stderr);
        let text = text.trim();
        if text.is_empty() { "it wrote nothing".to_owned() } else { format!("it wrote: {text}") }
    }
}

impl Guest {
    /// Runs a script with `/bin/sh`, without input, and collects what it says. For short ones. It does not matter which login
    /// shell the user has, nor what that says.
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

    /// Runs a script with `/bin/sh`, without input, and hands on its output while it runs.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub async fn shell_line(
        &self,
        command: &str,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<ExitStatus> {
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

    /// Opens a session and starts something in it, which has begun when this returns.
    pub(super) async fn start(&self, what: &str, request: Request<'_>) -> Result<Start<'_>> {
        for _ in 0..MAX_STARTS {
            self.shared.closing.over().await;
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
                    // What a command says and its end show that it ran; the rest, an early EOF among it, says nothing.
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
                    // Without an answer nothing has begun (RFC 4254, 6.5): nothing is done twice.
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
    ) -> Result<ExitStatus> {
        let frame = Frame::new();
        let (reader, open, first) = match self.start(what, Request::Exec(&frame.line())).await? {
            Start::Begun(reader, open, first) => (reader, open, first),
            Start::Refused => {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    "the guest's SSH server refused to run a command",
                )
                .with_help(
                    "the user may be restricted to SFTP or to one command (sshd_config, ForceCommand)",
                ));
            }
            Start::Closed => {
                return Err(Error::new(
                    ErrorKind::Protocol,
                    format!(
                        "the guest's SSH server closed {MAX_STARTS} sessions one after the other before it ran anything in them"
                    ),
                )
                .with_help("look at the log of the guest's SSH server"));
            }
        };
        let Some(writer) = &open.writer else { return Err(self.broken(what, None)) };
        let begun = Notify::new();
        let writing = async {
            // Not before: the start-up files of a login shell may read what is not meant for them.
            begun.notified().await;
            let script = Bytes::from(frame.input(script));
            // A command that does not read its input is no error: how it ended says more.
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
    ) -> Result<ExitStatus> {
        let mut stdout = (frame.stdout(), Lines::new(OutputStream::Stdout));
        let mut stderr = (frame.stderr(), Lines::new(OutputStream::Stderr));
        // What the server says, which is how the login shell ended where that did not make way.
        let mut status = None;
        let mut last = None;
        let mut closed = false;
        let begin = Instant::now() + BEGIN;
        loop {
            let message = match (first.take(), last) {
                (Some(first), _) => Some(first),
                (None, None) if stdout.0.has_begun() => reader.wait().await,
                (None, None) => match tokio::time::timeout_at(begin, reader.wait()).await {
                    Ok(message) => message,
                    Err(_) => return Err(self.not_begun(None, &[&stdout.0, &stderr.0])),
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
                    status = Some(ExitStatus::Code(exit_status));
                    last.get_or_insert(Instant::now() + MAX_GRACE);
                }
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    status = Some(ExitStatus::Signal(signal_text(&signal_name)));
                    last.get_or_insert(Instant::now() + MAX_GRACE);
                }
                // A server closes after all output; background processes that hold the output open keep it from doing so.
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
            Some(status) => Err(self.not_begun(Some(&status), &[&stdout.0, &stderr.0])),
            None if closed && self.answers().await => Err(Error::new(
                ErrorKind::Protocol,
                format!(
                    "the guest's SSH server closed the session while {what}, and did not say how it ended"
                ),
            )
            .with_help("did the step stop the SSH server? Look at the log of the guest's SSH server")),
            None => Err(self.broken(what, None)),
        }
    }

    /// The login shell did not run what it was asked to.
    fn not_begun(&self, status: Option<&ExitStatus>, streams: &[&Cutter]) -> Error {
        let said: Vec<String> =
            streams.iter().map(|cutter| cutter.noise()).filter(|said| !said.is_empty()).collect();
        let said = if said.is_empty() {
            "it wrote nothing".to_owned()
        } else {
            format!("it wrote: {}", said.join("\n"))
        };
        let ended = match status {
            Some(status) => format!("it ended with {status}"),
            None => format!("it did not within {} s", BEGIN.as_secs()),
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
        let ping = tokio::time::timeout(ANSWER, self.shared.handle.send_ping());
        !self.is_closed() && matches!(ping.await, Ok(Ok(())))
    }
}

/// What is asked of a new session.
#[derive(Clone, Copy)]
pub(super) enum Request<'a> {
    /// To run this line of the user's login shell.
    Exec(&'a str),
    /// To start this subsystem.
    Subsystem(&'a str),
}

/// What came of it.
pub(super) enum Start<'a> {
    /// It has begun; with what came in place of the server's consent, if anything.
    Begun(ChannelReadHalf, OpenChannel<'a>, Option<ChannelMsg>),
    /// The server does not do that.
    Refused,
    /// The server closed every session without a word.
    Closed,
}

/// A channel whose command is told to end, and that is closed, when it is dropped before its end.
pub(super) struct OpenChannel<'a> {
    guest: &'a Guest,
    writer: Option<ChannelWriteHalf<Msg>>,
}

impl OpenChannel<'_> {
    /// Nothing is done on dropping any more.
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

/// As RFC 4254, 6.10 writes it.
fn signal_text(signal: &Sig) -> String {
    match signal {
        Sig::Custom(name) => name.clone(),
        known => format!("{known:?}"),
    }
}

/// A word of a POSIX shell that stands for exactly this text.
pub(super) fn quote(text: &str) -> String {
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Whether a character stands for itself in a word without quotes.
pub(super) fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c)
}
