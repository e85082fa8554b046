//! The client against valid and invalid bytes from servers.
#![allow(clippy::unwrap_used)]

use super::*;
use tokio::io::{DuplexStream, duplex};

/// Performs the handshake with a server that sends these bytes whatever the client sends. Returns the result, and what
/// the client sent.
async fn greeted(said: &[u8]) -> (Result<(usize, usize)>, Vec<u8>) {
    let (mut near, mut far) = duplex(1 << 16);
    far.write_all(said).await.unwrap();
    far.shutdown().await.unwrap();
    let size = handshake(&mut near).await;
    drop(near);
    let mut heard = Vec::new();
    far.read_to_end(&mut heard).await.unwrap();
    (size, heard)
}

/// Returns the `ServerInit` of a screen of this size.
fn init(width: u16, height: u16, name: &str) -> Vec<u8> {
    let mut bytes = [width.to_be_bytes(), height.to_be_bytes()].concat();
    bytes.extend([0; 16]);
    bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    bytes.extend(name.as_bytes());
    bytes
}

#[tokio::test]
async fn every_version_is_spoken() {
    let after = init(640, 480, "QEMU (web)");
    let cases: [(&[u8], &[u8], &[u8]); 5] = [
        (b"RFB 003.008\n", &[2, 16, 1, 0, 0, 0, 0], b"RFB 003.008\n\x01\x01"),
        (b"RFB 003.007\n", &[1, 1], b"RFB 003.007\n\x01\x01"),
        (b"RFB 003.003\n", &[0, 0, 0, 1], b"RFB 003.003\n\x01"),
        // The greeting of Apple's server and some old ones.
        (b"RFB 003.005\n", &[0, 0, 0, 1], b"RFB 003.003\n\x01"),
        (b"RFB 004.001\n", &[1, 1, 0, 0, 0, 0], b"RFB 003.008\n\x01\x01"),
    ];
    for (greeting, security, answer) in cases {
        let (size, heard) = greeted(&[greeting, security, &after].concat()).await;
        assert_eq!((size.unwrap(), heard.as_slice()), ((640, 480), answer));
    }
}

#[tokio::test]
async fn a_refusal_says_why() {
    let refusals: [(&[u8], ErrorKind, &str); 6] = [
        (b"RFB 003.008\n\0\0\0\0\x04busy", ErrorKind::Protocol, "busy"),
        (b"RFB 003.003\n\0\0\0\0\0\0\0\x04busy", ErrorKind::Protocol, "busy"),
        (b"RFB 003.008\n\x01\x01\0\0\0\x01\0\0\0\x03bad", ErrorKind::Protocol, "bad"),
        (b"RFB 003.008\n\x01\x02", ErrorKind::Authentication, "[2]"),
        (b"SSH-2.0-Open", ErrorKind::Protocol, "SSH-2.0-Open"),
        (b"RFB 003", ErrorKind::Protocol, "broke"),
    ];
    for (said, kind, text) in refusals {
        let error = greeted(said).await.0.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[tokio::test]
async fn a_greeting_cannot_ask_for_memory() {
    let shake: &[u8] = b"RFB 003.007\n\x01\x01";
    let huge = greeted(&[shake, &init(65535, 65535, "")].concat()).await.0.unwrap_err();
    assert!(huge.to_string().contains("65535×65535"), "{huge}");
    let mut long = init(640, 480, "");
    long[20..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(greeted(&[shake, &long].concat()).await.0.unwrap_err().kind(), ErrorKind::Protocol);
}

/// x, y, width, height, encoding and data.
type Rectangle<'a> = (u16, u16, u16, u16, i32, &'a [u8]);

/// Returns the bytes of a `FramebufferUpdate`.
fn update(rectangles: &[Rectangle<'_>]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(u16::try_from(rectangles.len()).unwrap().to_be_bytes());
    for (x, y, width, height, encoding, data) in rectangles {
        bytes.extend([x, y, width, height].into_iter().flat_map(|number| number.to_be_bytes()));
        bytes.extend(encoding.to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

async fn drawn(bytes: &[u8], frame: &mut Framebuffer) -> Result<Update> {
    let mut stream = bytes;
    let update = read_update(&mut stream, frame, &mut zrle::Decoder::default()).await?;
    assert_eq!(stream, b"", "read to the end");
    Ok(update)
}

#[tokio::test]
async fn updates_are_drawn() {
    let mut frame = Framebuffer::new(4, 3);
    // Two pixels: blue, green, red, padding.
    let raw = update(&[(1, 1, 2, 1, 0, &[3, 2, 1, 0, 6, 5, 4, 0])]);
    let changes = drawn(&raw, &mut frame).await.unwrap();
    assert_eq!(changes, Update { rows: 1..2, ..Update::default() });
    assert_eq!(frame.row(1), [[0; 3], [1, 2, 3], [4, 5, 6], [0; 3]]);

    let changes = drawn(&update(&[(0, 1, 4, 2, 1, &[0, 0, 0, 0])]), &mut frame).await.unwrap();
    assert_eq!(changes.rows, 1..3);
    assert_eq!(frame.row(2), [[0; 3], [1, 2, 3], [4, 5, 6], [0; 3]], "a copy that overlaps is not smeared");
    assert_eq!(frame.row(1), [[0; 3]; 4]);
    drawn(&update(&[(0, 0, 3, 3, 1, &[0, 1, 0, 0])]), &mut frame).await.unwrap();
    assert_eq!(frame.row(2), [[1, 2, 3], [4, 5, 6], [0; 3], [0; 3]]);
}

#[tokio::test]
async fn sizes_and_extensions_are_recognised() {
    let mut frame = Framebuffer::new(4, 3);
    frame.row_mut(0)[0] = [9; 3];
    assert!(drawn(&update(&[(0, 0, 0, 0, -258, &[])]), &mut frame).await.unwrap().extended_keys);
    // The current size, and a refused request of another client: neither changes anything.
    let layout = [[1, 0, 0, 0].as_slice(), &[0; 16]].concat();
    let changes =
        drawn(&update(&[(0, 0, 4, 3, -308, &layout), (1, 1, 9, 9, -308, &layout)]), &mut frame).await;
    assert_eq!(changes.unwrap(), Update::default());
    assert_eq!(frame.row(0)[0], [9; 3]);
    for encoding in [-308, -223] {
        let data = if encoding == -308 { layout.as_slice() } else { &[] };
        let (width, height) = if encoding == -308 { (2, 1) } else { (5, 6) };
        let changes = drawn(&update(&[(0, 0, width, height, encoding, data)]), &mut frame).await.unwrap();
        assert!(changes.resized);
        assert_eq!((frame.width(), frame.height()), (usize::from(width), usize::from(height)));
    }
}

#[tokio::test]
async fn what_is_no_picture_is_passed_over() {
    let mut frame = Framebuffer::new(4, 3);
    let mut bytes = vec![2, 3, 0, 0, 0, 0, 0, 0, 2];
    bytes.extend(b"hi");
    bytes.extend([1, 0, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9]);
    bytes.extend(update(&[]));
    assert_eq!(drawn(&bytes, &mut frame).await.unwrap(), Update::default());
}

#[tokio::test]
async fn a_hostile_server_is_left() {
    let bad = [
        update(&[(3, 0, 2, 1, 0, &[0; 8])]),
        update(&[(0, 3, 1, 1, 0, &[0; 4])]),
        update(&[(0, 0, 65535, 65535, 0, &[])]),
        update(&[(0, 0, 2, 2, 1, &[0, 3, 0, 0])]),
        update(&[(0, 0, 65535, 65535, -223, &[])]),
        update(&[(0, 0, 65535, 65535, -308, &[0; 4])]),
        update(&[(0, 0, 1, 1, 16, &[0, 0, 0, 1, 0])]),
        update(&[(0, 0, 5, 1, 16, &[0, 0, 0, 0])]),
        update(&[(0, 0, 1, 1, 5, &[0, 0, 0, 1, 0])]),
        vec![99],
        // Texts that never arrive: no memory is reserved for them.
        vec![3, 0, 0, 0, 255, 255, 255, 255, 65],
        vec![0, 0, 255, 255],
    ];
    for bytes in bad {
        let error = drawn(&bytes, &mut Framebuffer::new(4, 3)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{bytes:?}: {error}");
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_is_told_apart_from_silence() {
    let (near, far) = duplex(64);
    let mut stream: DuplexStream = near;
    drop(far);
    let error = read_update(&mut stream, &mut Framebuffer::new(1, 1), &mut zrle::Decoder::default())
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "the connection to the display broke");
}

#[test]
fn messages_have_their_fields() {
    assert_eq!(key_event(true, 0xff0d), [4, 1, 0, 0, 0, 0, 0xff, 0x0d]);
    assert_eq!(extended_key_event(false, 0x61, 0x1e), [255, 0, 0, 0, 0, 0, 0, 0x61, 0, 0, 0, 0x1e]);
    assert_eq!(update_request(true, 720, 400), [3, 1, 0, 0, 0, 0, 2, 0xd0, 1, 0x90]);
    // Nothing but raw pixels is requested of a display on this host: a server chooses from all that it is offered.
    let cases = [(DisplayEncoding::Raw, [1, 0].as_slice()), (DisplayEncoding::Compressed, &[1, 16, 0])];
    for (preferred, pixels) in cases {
        let introduction = client_setup(preferred);
        let encodings = [pixels, &[-223, -308, -258]].concat();
        assert_eq!(introduction[20..24], [2, 0, 0, encodings.len() as u8]);
        let bytes: Vec<u8> = encodings.iter().flat_map(|encoding| i32::to_be_bytes(*encoding)).collect();
        assert_eq!(introduction[24..], bytes);
    }
}
