//! How large an image is before the cluster imports it: CDI must be given the size of a volume, and reads only some formats.

use crate::http_client::http_client;
use futures::StreamExt as _;
use rudder_core::{Error, ErrorKind, Result, secret::public_url};
use std::time::Duration;
use url::Url;

/// Bytes read from the beginning of an image: the header of every format that is recognised.
const HEAD: usize = 4096;
/// The largest disk in bytes: what a Quantity of Kubernetes can express with room to spare.
const LARGEST: u64 = 1 << 60;
/// How long the server of an image may take to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// What the first bytes of an image say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probed {
    /// Size of the bytes as served, if the server says it.
    pub(crate) served: Option<u64>,
    /// Size of the disk in bytes, if the format has it in its header, or is none.
    pub(crate) virtual_size: Option<u64>,
}

/// Reads the beginning of an image. A server that this host does not reach is not an error: the cluster may reach it.
pub(crate) async fn probe(url: &Url) -> Result<Option<Probed>> {
    let request =
        http_client()?.get(url.clone()).header(reqwest::header::RANGE, format!("bytes=0-{}", HEAD - 1));
    let Ok(Ok(response)) = tokio::time::timeout(LIMIT, request.send()).await else { return Ok(None) };
    if response.status() == reqwest::StatusCode::NOT_FOUND {
        let message = format!("{} does not exist: the server answered 404", public_url(url));
        return Err(Error::new(ErrorKind::NotFound, message).with_help("check the URL"));
    }
    if !response.status().is_success() {
        return Ok(None);
    }
    let partial = response.status() == reqwest::StatusCode::PARTIAL_CONTENT;
    let range = response.headers().get(reqwest::header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let served = match range.and_then(|range| range.rsplit_once('/')) {
        Some((_, total)) if partial => total.parse().ok(),
        _ => response.content_length(),
    };
    let mut head = Vec::new();
    let mut body = response.bytes_stream();
    while head.len() < HEAD {
        match tokio::time::timeout(LIMIT, body.next()).await {
            Ok(Some(Ok(bytes))) => head.extend_from_slice(&bytes),
            Ok(None) => break,
            _ => return Ok(None),
        }
    }
    recognise(&head, served, url).map(Some)
}

/// Recognises the format by its first bytes, and refuses those that CDI cannot read.
fn recognise(head: &[u8], served: Option<u64>, url: &Url) -> Result<Probed> {
    let number =
        |at: usize| head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
    let refused = |format: &str| {
        let message = format!(
            "expected an image that CDI can read at {}, but found one compressed with {format}",
            public_url(url)
        );
        Err(Error::new(ErrorKind::Unsupported, message)
            .with_help("use qcow2, raw, vmdk, vdi, vhd or vhdx, or a raw image in gz or xz"))
    };
    let broken = |found: &str| {
        Error::new(
            ErrorKind::InvalidImage,
            format!("expected an image at {}, but found {found}", public_url(url)),
        )
    };
    let virtual_size = match head {
        // Zstandard (RFC 8878, 3.1.1) and bzip2.
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return refused("zstd"),
        [b'B', b'Z', b'h', ..] => return refused("bzip2"),
        // qcow2 (QEMU, docs/interop/qcow2.txt): the version is at byte 4, the size at byte 24.
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3, ..] => match number(24) {
            Some(1..=LARGEST) => number(24),
            _ => return Err(broken("a qcow2 image without a size")),
        },
        [b'Q', b'F', b'I', 0xfb, ..] => return Err(broken("a qcow2 image of an unknown version")),
        // Formats whose size is not in their first bytes: vmdk, gzip, xz, vdi, vhdx, vhd.
        [b'K', b'D', b'M', b'V', ..] | [0x1f, 0x8b, ..] | [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => None,
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..]
        | [b'c', b'o', b'n', b'e', b'c', b't', b'i', b'x', ..] => None,
        _ if head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => None,
        _ => served,
    };
    Ok(Probed { served, virtual_size })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn recognised(head: &[u8], served: Option<u64>) -> Result<Option<u64>> {
        recognise(head, served, &"http://images/x".parse().unwrap()).map(|probed| probed.virtual_size)
    }

    #[test]
    fn the_size_of_a_disk_is_read_from_its_header() {
        let mut qcow2 = vec![0; 64];
        qcow2[..4].copy_from_slice(b"QFI\xfb");
        qcow2[7] = 3;
        qcow2[24..32].copy_from_slice(&(20_u64 << 30).to_be_bytes());
        assert_eq!(recognised(&qcow2, Some(5)).unwrap(), Some(20 << 30));
        assert_eq!(recognised(&[0; 512], Some(1 << 20)).unwrap(), Some(1 << 20));
        assert_eq!(recognised(b"\x1f\x8b\x08", Some(5)).unwrap(), None);
        assert_eq!(recognised(b"QFI\xfb", Some(5)).unwrap_err().kind(), ErrorKind::InvalidImage);
        qcow2[24..32].fill(0xff);
        assert_eq!(recognised(&qcow2, Some(5)).unwrap_err().kind(), ErrorKind::InvalidImage);
    }

    #[test]
    fn what_cdi_cannot_read_is_refused() {
        for head in [&[0x28, 0xb5, 0x2f, 0xfd, 0][..], b"BZh9"] {
            assert_eq!(recognised(head, None).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}
