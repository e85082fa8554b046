//! One command on one channel: its input, its output line by line, its end.

use super::{Guest, lines::Lines};
use crate::{
    Error, ErrorKind, Result,
    event::{ExitStatus, OutputStream},
};
use bytes::Bytes;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig, client::Msg};
use std::time::Duration;
use tokio::time::Instant;

/// After the command ended, output is read on until nothing came for so long: a process that it left in the background
/// may hold the output open for ever.
const GRACE: Duration = Duration::from_millis(500);
/// And at most so long, when that process keeps writing.
const MAX_GRACE: Duration = Duration::from_secs(10);
/// The number of the stream for standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;
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
    /// Runs a command line with `/bin/sh`, without input, and collects what it says. For short commands.
    ///
    /// # Errors
    /// `GuestUnreachable` when the connection breaks; `Protocol` when the server refuses to run it.
    pub async fn command(&self, command: &str) -> Result<CommandOutput> {
        self.command_with_input(command, Bytes::new()).await
    }

    pub(super) async fn command_with_input(&self, command: &str, input: Bytes) -> Result<CommandOutput> {
        let mut stdout = String::new();
        let mut stderr = String::new();
        let line = format!("/bin/sh -c {}", quote(command));
        let status = self
            .exec("a command ran", &line, input, &mut |stream, text| {
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

    /// Runs a command line with `/bin/sh`, without input, and hands on its output while it runs.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub async fn shell_line(
        &self,
        command: &str,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<ExitStatus> {
        self.exec("a command ran", &format!("/bin/sh -c {}", quote(command)), Bytes::new(), output).await
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

    /// Runs a line of the user's login shell. `what` completes "the connection broke while".
    pub(super) async fn exec(
        &self,
        what: &str,
        line: &str,
        input: Bytes,
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<ExitStatus> {
        let channel = self.open_channel(what).await?;
        channel.exec(true, line).await.map_err(|error| self.broken(what, Some(error)))?;
        let (reader, writer) = channel.split();
        let open = OpenChannel { guest: self, writer: Some(writer) };
        let Some(writer) = &open.writer else { return Err(self.broken(what, None)) };
        let writing = async {
            // A command that does not read its input is no error: how it ended says more.
            if writer.data_bytes(input).await.is_ok() {
                let _ = writer.eof().await;
            }
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            ended = self.read(what, reader, output) => ended,
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
        output: &mut (dyn FnMut(OutputStream, &str) + Send),
    ) -> Result<ExitStatus> {
        let mut stdout = Lines::new(OutputStream::Stdout);
        let mut stderr = Lines::new(OutputStream::Stderr);
        let mut status = None;
        let mut last = None;
        loop {
            let message = match last {
                None => reader.wait().await,
                Some(last) => {
                    let until = (Instant::now() + GRACE).min(last);
                    match tokio::time::timeout_at(until, reader.wait()).await {
                        Ok(message) => message,
                        Err(_) => break,
                    }
                }
            };
            match message {
                Some(ChannelMsg::Data { data }) => stdout.push(&data, output),
                Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => stderr.push(&data, output),
                Some(ChannelMsg::ExitStatus { exit_status }) => {
                    status = Some(ExitStatus::Code(exit_status));
                    last = Some(Instant::now() + MAX_GRACE);
                }
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    status = Some(ExitStatus::Signal(signal_text(&signal_name)));
                    last = Some(Instant::now() + MAX_GRACE);
                }
                Some(ChannelMsg::Failure) if status.is_none() => {
                    return Err(Error::new(
                        ErrorKind::Protocol,
                        "the guest's SSH server refused to run a command",
                    )
                    .with_help(
                        "the user may be restricted to SFTP or to one command (sshd_config, ForceCommand)",
                    ));
                }
                Some(ChannelMsg::Close) | None => break,
                Some(_) => {}
            }
        }
        stdout.finish(output);
        stderr.finish(output);
        status.ok_or_else(|| self.broken(what, None))
    }
}

/// A channel whose command is told to end, and that is closed, when it is dropped before its end.
struct OpenChannel<'a> {
    guest: &'a Guest,
    writer: Option<ChannelWriteHalf<Msg>>,
}

impl OpenChannel<'_> {
    fn finish(mut self) -> Option<ChannelWriteHalf<Msg>> {
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
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&c);
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
