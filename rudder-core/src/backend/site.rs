//! Files that a lab serves to its machines over HTTP, and reports of requests for them.

use crate::fetch::Fetched;
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    fmt, io,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};

/// Files that a lab serves to its machines over HTTP.
#[derive(Clone)]
#[non_exhaustive]
pub struct Site {
    /// The files by name; the name is the path without the leading `/`.
    pub files: BTreeMap<String, SiteFile>,
    listener: Arc<dyn Fn(SiteRequest) + Send + Sync>,
}

impl Site {
    /// Creates a site with these files; `listener` is called with every request once it was answered.
    pub fn new(
        files: BTreeMap<String, SiteFile>,
        listener: impl Fn(SiteRequest) + Send + Sync + 'static,
    ) -> Self {
        Self { files, listener: Arc::new(listener) }
    }

    /// Reports a request that was answered to the listener.
    pub fn answered(&self, request: SiteRequest) {
        (self.listener)(request);
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Site").field("files", &self.files.keys()).finish_non_exhaustive()
    }
}

/// A file to serve: its size is known, and it can be opened any number of times. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SiteFile(Arc<dyn FileSource>);

/// Source of the bytes of a [`SiteFile`]. The bytes must not change while they are served.
#[async_trait]
pub trait FileSource: fmt::Debug + Send + Sync + 'static {
    /// Returns the size in bytes.
    ///
    /// # Errors
    /// When the source cannot be read.
    async fn size(&self) -> io::Result<u64>;

    /// Opens the bytes from this position to the end.
    ///
    /// # Errors
    /// When the source cannot be read.
    async fn open(&self, from: u64) -> io::Result<Box<dyn AsyncRead + Send + Unpin>>;
}

impl SiteFile {
    /// Creates a file with this source.
    pub fn new(source: impl FileSource) -> Self {
        Self(Arc::new(source))
    }

    /// Creates a file with these bytes.
    pub fn bytes(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self::new(Bytes(bytes.into()))
    }

    /// Creates a file that is read from a path on this host.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::new(HostFile { path: path.into(), lease: None })
    }

    /// Creates a file from a fetched one, which stays in place as long as the new value or a clone of it exists.
    #[must_use]
    pub fn fetched(fetched: Fetched) -> Self {
        Self::new(HostFile { path: fetched.path.clone(), lease: Some(fetched) })
    }

    /// Returns the size in bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn size(&self) -> io::Result<u64> {
        self.0.size().await
    }

    /// Opens the bytes from this position to the end.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn open(&self, from: u64) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
        self.0.open(from).await
    }

    /// Reads all bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(0).await?.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }
}

/// Bytes in memory.
struct Bytes(Arc<[u8]>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The bytes may contain secrets.
        write!(f, "{} bytes", self.0.len())
    }
}

#[async_trait]
impl FileSource for Bytes {
    async fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    async fn open(&self, from: u64) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
        let mut cursor = io::Cursor::new(Arc::clone(&self.0));
        cursor.set_position(from);
        Ok(Box::new(cursor))
    }
}

/// A file on this host.
#[derive(Debug)]
struct HostFile {
    path: PathBuf,
    #[expect(dead_code, reason = "keeps the file")]
    lease: Option<Fetched>,
}

#[async_trait]
impl FileSource for HostFile {
    async fn size(&self) -> io::Result<u64> {
        Ok(tokio::fs::metadata(&self.path).await?.len())
    }

    async fn open(&self, from: u64) -> io::Result<Box<dyn AsyncRead + Send + Unpin>> {
        let mut file = tokio::fs::File::open(&self.path).await?;
        file.seek(io::SeekFrom::Start(from)).await?;
        Ok(Box::new(file))
    }
}

/// A request that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SiteRequest {
    /// The machine that sent the request, where the backend can tell.
    pub machine: Option<String>,
    /// `GET`, `HEAD`…
    pub method: String,
    /// The requested path as it was sent, without control characters and of bounded length.
    pub path: String,
    /// The status of the response (RFC 9110, 15).
    pub status: u16,
    /// Number of bytes of the file that were sent.
    pub bytes: u64,
}

impl SiteRequest {
    /// Creates the report of a request that was answered.
    pub fn new(
        machine: Option<String>,
        method: impl Into<String>,
        path: impl Into<String>,
        status: u16,
        bytes: u64,
    ) -> Self {
        Self { machine, method: method.into(), path: path.into(), status, bytes }
    }
}

/// A [`Site`] that is being served. Dropping the value stops the server.
#[non_exhaustive]
pub struct Served {
    /// The server's address as reached from each subnet, by the name of the subnet.
    pub addresses: BTreeMap<String, Ipv4Addr>,
    /// The server's port.
    pub port: u16,
    // A mutex makes the type `Sync`, whatever it holds.
    _server: Mutex<Box<dyn Send>>,
}

impl Served {
    /// Creates a value for a site that is served at these addresses as long as `server` exists.
    pub fn new(addresses: BTreeMap<String, Ipv4Addr>, port: u16, server: impl Send + 'static) -> Self {
        Self { addresses, port, _server: Mutex::new(Box::new(server)) }
    }
}

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("addresses", &self.addresses)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_file_can_be_opened_repeatedly_at_any_position() {
        let mut on_disk = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut on_disk, b"0123456789").unwrap();
        for file in [SiteFile::bytes(*b"0123456789"), SiteFile::path(on_disk.path())] {
            assert_eq!(file.size().await.unwrap(), 10);
            for (from, expected) in [(0, &b"0123456789"[..]), (7, b"789"), (10, b""), (99, b"")] {
                let mut read = Vec::new();
                file.open(from).await.unwrap().read_to_end(&mut read).await.unwrap();
                assert_eq!(read, expected, "{file:?} from {from}");
            }
            assert_eq!(file.read().await.unwrap(), b"0123456789");
        }
        assert!(SiteFile::path("/nowhere").size().await.is_err());
        assert_eq!(format!("{:?}", SiteFile::bytes(*b"secret")), "SiteFile(6 bytes)");
    }
}
