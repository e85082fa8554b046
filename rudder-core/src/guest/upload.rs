//! Uploads files to the guest: over SFTP, or through `cat` where the server has none.

use super::{
    Guest, channel_close,
    exec::{CommandOutput, Request, Start, quote},
};
use crate::{Error, ErrorKind, Result, event::CommandStatus};
use bytes::Bytes;
use futures::{StreamExt as _, stream::FuturesUnordered};
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, client::Msg};
use russh_sftp::{
    client::{Config, RawSftpSession, error::Error as SftpError},
    protocol::{FileAttributes, OpenFlags, StatusCode},
};
use std::{borrow::Cow, io, path::Path, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_util::io::StreamReader;

/// Size of a write in bytes, which every server accepts (draft-ietf-secsh-filexfer-02, 3).
const CHUNK: usize = 32 * 1024;
/// Maximum number of concurrent writes: 2 MiB keep a fast link busy, and are negligible for a guest's memory.
const IN_FLIGHT: usize = 64;

/// How long removing the remains of a failed upload may take.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);
/// Exit codes of scripts that write a file, after sysexits.h: the destination is a directory; it cannot be written; the
/// user lacks permission.
pub(crate) const IS_DIRECTORY: u32 = 73;
pub(crate) const NOT_WRITTEN: u32 = 74;
pub(crate) const DENIED: u32 = 77;

/// The content to upload.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The content of this file on the host.
    File(&'a Path),
}

impl Content<'_> {
    async fn open(&self) -> Result<(Box<dyn AsyncRead + Send + Unpin + '_>, u64)> {
        match self {
            Self::Bytes(bytes) => Ok((Box::new(*bytes), bytes.len() as u64)),
            Self::File(path) => {
                let failed = |error| Error::io(format_args!("read {}", path.display()), error);
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let size = file.metadata().await.map_err(failed)?.len();
                Ok((Box::new(file), size))
            }
        }
    }
}

/// Why a file could not be written directly.
enum Refusal {
    Denied,
    Failed(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Guest {
    /// Writes a file of the guest. An existing file is replaced and keeps its owner and mode; a new file gets the
    /// guest's default mode, usually 0644. Parent directories are created. The size is verified. If the user may not
    /// write, the file is written through a temporary file and `sudo -n`.
    ///
    /// # Errors
    /// `StepFailed` when the guest cannot take the file, with the reason; `GuestUnreachable` when the connection
    /// breaks; `Io` or `NotFound` when a file of the host cannot be read.
    pub async fn upload(&self, content: Content<'_>, destination: &str) -> Result<()> {
        if !destination.starts_with('/') || destination.ends_with('/') || destination.contains('\0') {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("expected an absolute path of a file as destination, but found {destination:?}"),
            ));
        }
        let uploaded = match self.sftp().await? {
            Some(sftp) => self.upload_over(&sftp, content, destination).await,
            None => self.upload_over(&Cat { guest: self }, content, destination).await,
        };
        if uploaded.is_err() && !self.is_closed() {
            // An incomplete file is removed before anyone can see it.
            self.settle(REMOVE_LIMIT).await;
        }
        uploaded.map_err(|error| error.with_context("file", destination))
    }

    async fn upload_over(
        &self,
        method: &impl WriteMethod,
        content: Content<'_>,
        destination: &str,
    ) -> Result<()> {
        match method.put(content, destination).await {
            Ok(()) => return Ok(()),
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Denied) => {}
        }
        let (remains, temporary) = self.temporary().await?;
        match method.put(content, &temporary).await {
            Ok(()) => {}
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Denied) => return Err(failed(format!("the guest refused to write {temporary}"))),
        }
        // `cat` keeps owner and mode of an existing file, and follows links as SFTP does.
        let size = content.open().await?.1;
        let script = write_and_verify(&format!("cat {temporary}"), destination, size);
        let placed = self.command(&as_root(&script)).await?;
        remains.remove().await;
        match placed.status {
            CommandStatus::Code(0) => Ok(()),
            CommandStatus::Code(IS_DIRECTORY) => Err(is_directory(destination)),
            CommandStatus::Code(NOT_WRITTEN) => Err(not_written(destination, size, &placed)),
            _ => Err(failed(format!(
                "user {:?} cannot write {destination}, and neither can sudo: {}",
                self.user(),
                placed.text()
            ))
            .with_help("log in as root, or let the user run sudo without a password")),
        }
    }

    /// Makes a file that only its owner can read, in a directory that the user may write to. Its name is chosen here,
    /// so that nothing has to be read to know it.
    async fn temporary(&self) -> Result<(RemoveOnDrop, String)> {
        let mut why = String::new();
        for directory in ["/tmp", "/var/tmp"] {
            let path = format!("{directory}/rudder-{:016x}", rand::random::<u64>());
            let remains = RemoveOnDrop::new(self, &path, Vec::new());
            // Fails if the file exists.
            let made = self.command(&create(&path)).await?;
            if made.status.success() {
                return Ok((remains, path));
            }
            why = made.text();
        }
        Err(failed(format!("the guest has no space for a temporary file: {why}")))
    }

    /// Starts an SFTP session; `None` when the server has no SFTP.
    async fn sftp(&self) -> Result<Option<Sftp<'_>>> {
        let (reader, open) = match self.start("a file was uploaded", Request::Subsystem("sftp")).await? {
            Start::Begun(reader, open, None) => (reader, open),
            Start::Refused | Start::Closed => return Ok(None),
            // It ended before it sent anything.
            Start::Begun(.., Some(_)) => return Ok(None),
        };
        let Some(writer) = open.finish() else { return Err(self.broken("a file was uploaded", None)) };
        let (replies, mut received) = mpsc::channel(16);
        let sending = writer.make_writer();
        let receiving = tokio::spawn(receive(reader, replies, Greeting::default()));
        let stream = tokio::io::join(
            StreamReader::new(futures::stream::poll_fn(move |cx| received.poll_recv(cx))),
            sending,
        );
        // A guest on an emulated processor with a slow disk is slow; a dead one is detected by the connection.
        let config = Config { request_timeout_secs: 120, ..Config::default() };
        let session = RawSftpSession::new_with_config(stream, config);
        let sftp = Sftp { guest: self, session, channel: Some((receiving, writer)) };
        match sftp.session.init().await {
            Ok(_) => Ok(Some(sftp)),
            // The server is configured with a program that does not exist, and closed the channel.
            Err(_) if !self.is_closed() => Ok(None),
            Err(_) => Err(self.broken("a file was uploaded", None)),
        }
    }
}

/// Passes on what the server sends, until it has closed the channel: only then has its process ended.
async fn receive(
    mut reader: ChannelReadHalf,
    replies: mpsc::Sender<io::Result<Bytes>>,
    mut greeting: Greeting,
) {
    let mut replies = Some(replies);
    while let Some(message) = reader.wait().await {
        match message {
            ChannelMsg::Data { data } => match greeting.push(data) {
                Ok(data) => {
                    if let Some(replies) = replies.as_ref().filter(|_| !data.is_empty()) {
                        // The receiver may be gone; the end is waited for nevertheless.
                        let _ = replies.send(Ok(data)).await;
                    }
                }
                Err(NotSftp) => replies = None,
            },
            ChannelMsg::Eof => replies = None,
            ChannelMsg::Close => break,
            _ => {}
        }
    }
}

/// Finds the first packet of an SFTP server. sshd starts an external server through the user's login shell, which may
/// write something first.
#[derive(Debug, Default)]
struct Greeting {
    found: bool,
    held: Vec<u8>,
}

/// The other side is not an SFTP server.
#[derive(Debug, PartialEq, Eq)]
struct NotSftp;

impl Greeting {
    /// How much a login shell may write before its server does, in bytes.
    const MAX_NOISE: usize = 64 * 1024;

    fn push(&mut self, data: Bytes) -> Result<Bytes, NotSftp> {
        if self.found {
            return Ok(data);
        }
        self.held.extend_from_slice(&data);
        // SSH_FXP_VERSION, version 3 (draft-ietf-secsh-filexfer-02, 3 and 4): a length, 2, 3. Text contains no zero
        // bytes.
        let is_start = |bytes: &[u8]| matches!(bytes, [0, 0, _, _, 2, 0, 0, 0, 3]);
        if let Some(at) = self.held.windows(9).position(is_start) {
            self.found = true;
            return Ok(Bytes::from(self.held.split_off(at)));
        }
        if self.held.len() > Self::MAX_NOISE { Err(NotSftp) } else { Ok(Bytes::new()) }
    }
}

/// A way to write a file as the user.
trait WriteMethod {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal>;
}

struct Sftp<'a> {
    guest: &'a Guest,
    session: RawSftpSession,
    channel: Option<(JoinHandle<()>, ChannelWriteHalf<Msg>)>,
}

impl Drop for Sftp<'_> {
    fn drop(&mut self) {
        // Dropping the session, which happens next, tells the server to end. The next session waits until it has.
        if let Some((mut receiving, writer)) = self.channel.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let ending = self.guest.shared.closing.begin();
            let closing = async move {
                if tokio::time::timeout(channel_close::LIMIT, &mut receiving).await.is_err() {
                    receiving.abort();
                    let _ = writer.close().await;
                }
                drop(ending);
            };
            self.guest.shared.cleanups.spawn_on(closing, &runtime);
        }
    }
}

impl Sftp<'_> {
    fn refusal(&self, what: &str, error: SftpError) -> Refusal {
        match error {
            SftpError::Status(status) if status.status_code == StatusCode::PermissionDenied => {
                Refusal::Denied
            }
            SftpError::Status(status) => {
                let why = if status.error_message.is_empty() {
                    status.status_code.to_string()
                } else {
                    status.error_message
                };
                Refusal::Failed(failed(format!("the guest could not {what}: {why}")))
            }
            _ if self.guest.is_closed() => Refusal::Failed(self.guest.broken("a file was uploaded", None)),
            error => Refusal::Failed(
                Error::new(ErrorKind::Protocol, format!("the guest's SFTP server could not {what}"))
                    .with_source(error),
            ),
        }
    }

    async fn open(&self, path: &str) -> Result<String, SftpError> {
        let flags = OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::TRUNCATE;
        Ok(self.session.open(path, flags, FileAttributes::empty()).await?.handle)
    }

    /// Makes the parent directories of a file. Returns those that it made, the innermost first.
    async fn create_parents(&self, path: &str) -> Result<Vec<String>, Refusal> {
        let mut missing = Vec::new();
        let mut next = parent(path);
        while next != "/" {
            match self.session.stat(next).await {
                Ok(_) => break,
                Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile => {
                    missing.push(next);
                    next = parent(next);
                }
                Err(error) => return Err(self.refusal(&format!("check {next}"), error)),
            }
        }
        for directory in missing.iter().rev() {
            if let Err(error) = self.session.mkdir(*directory, FileAttributes::empty()).await {
                return Err(self.refusal(&format!("create the directory {directory}"), error));
            }
        }
        Ok(missing.into_iter().map(str::to_owned).collect())
    }
}

impl WriteMethod for Sftp<'_> {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal> {
        let what = format!("write {path}");
        // Whatever exists there belongs to someone else, including a dangling link.
        let is_new = match self.session.stat(path).await {
            Ok(attrs) if attrs.attrs.is_dir() => return Err(Refusal::Failed(is_directory(path))),
            Ok(_) => false,
            Err(_) => matches!(
                self.session.lstat(path).await,
                Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile
            ),
        };
        let mut remains = None;
        let opened = match self.open(path).await {
            Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile => {
                let made = self.create_parents(path).await?;
                remains = Some(RemoveOnDrop::new(self.guest, path, made));
                self.open(path).await
            }
            opened => opened,
        };
        let handle = opened.map_err(|error| self.refusal(&what, error))?;
        if is_new && remains.is_none() {
            remains = Some(RemoveOnDrop::new(self.guest, path, Vec::new()));
        }
        let (mut reader, size) = content.open().await?;
        let mut writes = FuturesUnordered::new();
        let mut offset = 0u64;
        loop {
            let mut chunk = vec![0; CHUNK];
            let mut filled = 0;
            while filled < CHUNK {
                match reader.read(&mut chunk[filled..]).await {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) => return Err(Error::io("read the file to upload", error).into()),
                }
            }
            if filled == 0 {
                break;
            }
            chunk.truncate(filled);
            writes.push(self.session.write(handle.clone(), offset, chunk));
            offset += filled as u64;
            if writes.len() >= IN_FLIGHT
                && let Some(Err(error)) = writes.next().await
            {
                return Err(self.refusal(&what, error));
            }
        }
        while let Some(written) = writes.next().await {
            written.map_err(|error| self.refusal(&what, error))?;
        }
        let attrs = self.session.fstat(handle.clone()).await.map_err(|error| self.refusal(&what, error))?;
        self.session.close(handle).await.map_err(|error| self.refusal(&what, error))?;
        verify(path, size.max(offset), attrs.attrs.size)?;
        remains.into_iter().for_each(RemoveOnDrop::keep);
        Ok(())
    }
}

struct Cat<'a> {
    guest: &'a Guest,
}

impl WriteMethod for Cat<'_> {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal> {
        let (mut reader, size) = content.open().await?;
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).await.map_err(|error| Error::io("read the file to upload", error))?;
        let script = write_and_verify("cat", path, size);
        let output = self.guest.command_with_input(&script, Bytes::from(bytes)).await?;
        match output.status {
            CommandStatus::Code(0) => Ok(()),
            CommandStatus::Code(DENIED) => Err(Refusal::Denied),
            CommandStatus::Code(IS_DIRECTORY) => Err(Refusal::Failed(is_directory(path))),
            _ => Err(Refusal::Failed(not_written(path, size, &output))),
        }
    }
}

/// Returns a script that writes the output of `source` to a file, makes its parent directories, and checks the size. If
/// it fails, it removes what it made.
pub(super) fn write_and_verify(source: &str, path: &str, size: u64) -> String {
    let (file, directory) = (quote(path), quote(parent(path)));
    format!(
        r#"f={file}; d={directory}
[ -d "$f" ] && exit {IS_DIRECTORY}
set --
while [ ! -e "$d" ]; do set -- "$@" "$d"; d=${{d%/*}}; [ -n "$d" ] || d=/; done
old=; if [ -e "$f" ] || [ -h "$f" ]; then old=yes; fi
undo='[ -n "$old" ] || rm -f "$f"; [ $# = 0 ] || rmdir "$@" 2>/dev/null'
trap 'eval "$undo"; exit {NOT_WRITTEN}' HUP INT TERM
mkdir -p {directory} 2>/dev/null || {{ eval "$undo"; exit {DENIED}; }}
if [ -e "$f" ]; then [ -w "$f" ] || exit {DENIED}
elif [ ! -w {directory} ]; then eval "$undo"; exit {DENIED}; fi
{source} >"$f" && [ "$(wc -c <"$f")" -eq {size} ] && exit 0
eval "$undo"; exit {NOT_WRITTEN}"#
    )
}

/// Returns a script that makes an empty file that only its user can access, and fails if it exists.
pub(super) fn create(path: &str) -> String {
    format!("umask 077; set -C; : >{path}")
}

/// Returns a script that removes a file, and directories that are empty.
pub(super) fn remove(path: &str, directories: &[String]) -> String {
    let directories = directories.iter().map(|directory| format!("; rmdir {} 2>/dev/null", quote(directory)));
    format!("rm -f {}{}", quote(path), directories.collect::<String>())
}

/// Returns a command line that runs a script as root.
pub(super) fn as_root(script: &str) -> String {
    format!("sudo -n /bin/sh -c {}", quote(script))
}

/// What is removed from the guest unless kept: a file, and the directories that were made for it.
struct RemoveOnDrop {
    guest: Guest,
    remove: Option<String>,
}

impl RemoveOnDrop {
    fn new(guest: &Guest, path: &str, directories: Vec<String>) -> Self {
        Self { guest: guest.clone(), remove: Some(remove(path, &directories)) }
    }

    fn keep(mut self) {
        self.remove = None;
    }

    async fn remove(mut self) {
        if let Some(remove) = self.remove.take() {
            let _ = self.guest.command(&remove).await;
        }
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(remove) = self.remove.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let guest = self.guest.clone();
            let removing = async move {
                let _ = guest.command(&remove).await;
            };
            self.guest.shared.cleanups.spawn_on(removing, &runtime);
        }
    }
}

fn not_written(path: &str, size: u64, output: &CommandOutput) -> Error {
    failed(format!("the guest could not write {size} bytes to {path}: {}", output.text()))
        .with_help("check whether the guest's disk is full")
}

fn verify(path: &str, expected: u64, found: Option<u64>) -> Result<()> {
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.map_or(Cow::Borrowed("no size"), |found| format!("{found} bytes").into());
    Err(failed(format!("expected {expected} bytes in {path} after the upload, but found {found}"))
        .with_help("check whether the guest's disk is full"))
}

fn failed(message: String) -> Error {
    Error::new(ErrorKind::StepFailed, message)
}

fn is_directory(path: &str) -> Error {
    failed(format!("expected a file or nothing at {path}, but found a directory"))
        .with_help("set `destination` to the full path of the file")
}

fn parent(path: &str) -> &str {
    match path.trim_end_matches('/').rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}
