//! Files into the guest: over SFTP, or through `cat` where the server has none.

use super::{
    Guest, ending,
    exec::{Request, Start, quote},
};
use crate::{Error, ErrorKind, Result};
use bytes::Bytes;
use futures::{StreamExt as _, stream::FuturesUnordered};
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, client::Msg};
use russh_sftp::{
    client::{Config, RawSftpSession, error::Error as SftpError},
    protocol::{FileAttributes, OpenFlags, StatusCode},
};
use std::{borrow::Cow, io, path::Path};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_util::io::StreamReader;

/// Bytes of one write: what every server takes (draft-ietf-secsh-filexfer-02, 3).
const CHUNK: usize = 32 * 1024;
/// Writes under way: 2 MiB keep a fast link busy without a guest's memory being of interest.
const IN_FLIGHT: usize = 64;

/// What is uploaded.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// The bytes of this file of the host.
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

/// Why a file could not be written the direct way.
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
    /// Writes a file of the guest, replacing what stood there and keeping its owner and mode; a new file gets what the
    /// guest gives new files, usually 0644. Parents are made. The size is verified. Where the user may not write, it goes
    /// through a temporary file and `sudo -n`.
    ///
    /// # Errors
    /// `StepFailed` when the guest cannot take the file, and says why; `GuestUnreachable` when the connection breaks;
    /// `Io` or `NotFound` when a file of the host cannot be read.
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
        uploaded.map_err(|error| error.with_context("file", destination))
    }

    async fn upload_over(&self, way: &impl Way, content: Content<'_>, destination: &str) -> Result<()> {
        match way.put(content, destination).await {
            Ok(()) => return Ok(()),
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Denied) => {}
        }
        // A file that only its maker can read, in a directory that the user may write to.
        let made = self
            .command("umask 077; mktemp /tmp/rudder-XXXXXXXXXX || mktemp /var/tmp/rudder-XXXXXXXXXX")
            .await?;
        let temporary = made.stdout.trim().to_owned();
        if !made.status.success() || !temporary.starts_with('/') {
            return Err(failed(format!("the guest has no room for a temporary file: {}", made.text())));
        }
        let leftover = Temporary { guest: self, path: Some(temporary.clone()) };
        match way.put(content, &temporary).await {
            Ok(()) => {}
            Err(Refusal::Failed(error)) => return Err(error),
            Err(Refusal::Denied) => return Err(failed(format!("the guest refused to write {temporary}"))),
        }
        // `cat` keeps owner and mode of a file that stands there, and follows links as SFTP does.
        let place = format!(
            "mkdir -p {} && cat {temporary} >{} && wc -c <{}",
            quote(parent(destination)),
            quote(destination),
            quote(destination)
        );
        let size = content.open().await?.1;
        let placed = self.command(&format!("sudo -n /bin/sh -c {}", quote(&place))).await?;
        leftover.remove().await;
        if !placed.status.success() {
            return Err(failed(format!(
                "user {:?} may not write {destination}, and sudo could not either: {}",
                self.user(),
                placed.text()
            ))
            .with_help("log in as root, or let the user run sudo without a password"));
        }
        verify(destination, size, placed.stdout.trim().parse().ok())
    }

    /// `None`: the server has no SFTP.
    async fn sftp(&self) -> Result<Option<Sftp<'_>>> {
        let (reader, open) = match self.start("a file was uploaded", Request::Subsystem("sftp")).await? {
            Start::Begun(reader, open, None) => (reader, open),
            Start::Refused | Start::Closed => return Ok(None),
            // It ended before it said anything.
            Start::Begun(.., Some(_)) => return Ok(None),
        };
        let Some(writer) = open.finish() else { return Err(self.broken("a file was uploaded", None)) };
        let (replies, mut received) = mpsc::channel(16);
        let sending = writer.make_writer();
        let receiving = tokio::spawn(receive(reader, replies));
        let stream = tokio::io::join(
            StreamReader::new(futures::stream::poll_fn(move |cx| received.poll_recv(cx))),
            sending,
        );
        // A guest on an emulated processor with a slow disk takes its time; a dead one is noticed by the connection.
        let config = Config { request_timeout_secs: 120, ..Config::default() };
        let session = RawSftpSession::new_with_config(stream, config);
        let sftp = Sftp { guest: self, session, channel: Some((receiving, writer)) };
        match sftp.session.init().await {
            Ok(_) => Ok(Some(sftp)),
            // The server named a program that is not there, and hung up.
            Err(_) if !self.is_closed() => Ok(None),
            Err(_) => Err(self.broken("a file was uploaded", None)),
        }
    }
}

/// Hands on what the server says, until it has closed the channel: only then its process has ended.
async fn receive(mut reader: ChannelReadHalf, replies: mpsc::Sender<io::Result<Bytes>>) {
    let mut replies = Some(replies);
    while let Some(message) = reader.wait().await {
        match message {
            ChannelMsg::Data { data } => {
                if let Some(replies) = &replies {
                    // Nobody may want to know any more: the end is waited for all the same.
                    let _ = replies.send(Ok(data)).await;
                }
            }
            ChannelMsg::Eof => replies = None,
            ChannelMsg::Close => break,
            _ => {}
        }
    }
}

/// A way of writing a file as the user.
trait Way {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal>;
}

struct Sftp<'a> {
    guest: &'a Guest,
    session: RawSftpSession,
    channel: Option<(JoinHandle<()>, ChannelWriteHalf<Msg>)>,
}

impl Drop for Sftp<'_> {
    fn drop(&mut self) {
        // Dropping the session, which comes next, tells the server to end. The next session waits until it has.
        if let Some((mut receiving, writer)) = self.channel.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let ending = self.guest.shared.endings.begin();
            let closing = async move {
                if tokio::time::timeout(ending::LIMIT, &mut receiving).await.is_err() {
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

    async fn make_parents(&self, path: &str) -> Result<(), Refusal> {
        let mut missing = Vec::new();
        let mut next = parent(path);
        while next != "/" {
            match self.session.stat(next).await {
                Ok(_) => break,
                Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile => {
                    missing.push(next);
                    next = parent(next);
                }
                Err(error) => return Err(self.refusal(&format!("look at {next}"), error)),
            }
        }
        for directory in missing.into_iter().rev() {
            if let Err(error) = self.session.mkdir(directory, FileAttributes::empty()).await {
                return Err(self.refusal(&format!("make the directory {directory}"), error));
            }
        }
        Ok(())
    }
}

impl Way for Sftp<'_> {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal> {
        let what = format!("write {path}");
        if let Ok(attrs) = self.session.stat(path).await
            && attrs.attrs.is_dir()
        {
            return Err(Refusal::Failed(is_directory(path)));
        }
        let handle = match self.open(path).await {
            Err(SftpError::Status(status)) if status.status_code == StatusCode::NoSuchFile => {
                self.make_parents(path).await?;
                self.open(path).await
            }
            opened => opened,
        }
        .map_err(|error| self.refusal(&what, error))?;
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
        Ok(())
    }
}

struct Cat<'a> {
    guest: &'a Guest,
}

impl Way for Cat<'_> {
    async fn put(&self, content: Content<'_>, path: &str) -> Result<(), Refusal> {
        let (mut reader, size) = content.open().await?;
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).await.map_err(|error| Error::io("read the file to upload", error))?;
        let (directory, file) = (quote(parent(path)), quote(path));
        // 77: denied, as sysexits.h has it; 73: something else stands in the way.
        let command = format!(
            "if [ -d {file} ]; then exit 73; fi; \
             mkdir -p {directory} 2>/dev/null || exit 77; \
             if [ -e {file} ]; then [ -w {file} ] || exit 77; else [ -w {directory} ] || exit 77; fi; \
             cat >{file} && wc -c <{file}"
        );
        let output = self.guest.command_with_input(&command, Bytes::from(bytes)).await?;
        match output.status {
            crate::event::ExitStatus::Code(0) => Ok(verify(path, size, output.stdout.trim().parse().ok())?),
            crate::event::ExitStatus::Code(77) => Err(Refusal::Denied),
            crate::event::ExitStatus::Code(73) => Err(Refusal::Failed(is_directory(path))),
            _ => Err(Refusal::Failed(failed(format!("the guest could not write {path}: {}", output.text())))),
        }
    }
}

/// A temporary file in the guest, removed when done with.
struct Temporary<'a> {
    guest: &'a Guest,
    path: Option<String>,
}

impl Temporary<'_> {
    async fn remove(mut self) {
        if let Some(path) = self.path.take() {
            let _ = self.guest.command(&format!("rm -f {path}")).await;
        }
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.path.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let guest = self.guest.clone();
            let removing = async move {
                let _ = guest.command(&format!("rm -f {path}")).await;
            };
            self.guest.shared.cleanups.spawn_on(removing, &runtime);
        }
    }
}

fn verify(path: &str, expected: u64, found: Option<u64>) -> Result<()> {
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.map_or(Cow::Borrowed("no size"), |found| format!("{found} bytes").into());
    Err(failed(format!("expected {expected} bytes in {path} after the upload, but found {found}"))
        .with_help("is the guest's disk full?"))
}

fn failed(message: String) -> Error {
    Error::new(ErrorKind::StepFailed, message)
}

fn is_directory(path: &str) -> Error {
    failed(format!("expected {path} to be a file or nothing, but found a directory"))
        .with_help("give the whole path of the file as `destination`")
}

fn parent(path: &str) -> &str {
    match path.trim_end_matches('/').rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}
