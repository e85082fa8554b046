//! The hub between a scripted display and viewers. The clock is paused: it advances when nothing else can happen.
#![allow(clippy::unwrap_used)]

mod scripted;

use super::{
    messages::Input,
    pixels::{PixelFormat, encoding},
    screen::Area,
    *,
};
use proptest::prelude::*;
use rudder_core::{
    backend::DisplayEncoding::{Compressed, Raw},
    console::{Framebuffer, rfb},
};
use scripted::{Connection, Display, Viewer, first, pattern};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::sleep,
};

const SIZE: (usize, usize) = (200, 150);

#[tokio::test(start_paused = true)]
async fn viewers_share_one_connection() {
    let (hub, mut display) = Display::new();
    let frame = pattern(SIZE, 1);
    let (mut one, mut connection) = first(&hub, &mut display, &frame).await;
    let mut two = Viewer::open(&hub).await.unwrap();
    one.set_up(Raw).await;
    two.set_up(Compressed).await;
    for viewer in [&mut one, &mut two] {
        viewer.request(false).await;
        assert_eq!(viewer.update().await.unwrap().rows, 0..SIZE.1);
        assert!(viewer.frame == frame);
    }
    // What changes arrives once it has changed.
    let mut changed = frame.clone();
    changed.row_mut(70)[130] = [1, 2, 3];
    one.request(true).await;
    two.request(true).await;
    assert!(timeout(Duration::from_secs(60), one.update()).await.is_err(), "nothing has changed yet");
    assert!(connection.requested().await, "an incremental request");
    connection.draw(&changed, Area { x: 130, y: 70, width: 1, height: 1 }).await;
    for viewer in [&mut one, &mut two] {
        // Only the tile of the pixel.
        assert_eq!(viewer.update().await.unwrap().rows, 64..128);
        assert!(viewer.frame == changed);
    }
    drop(one);
    connection.show(&frame).await;
    two.sees(&frame).await;
    let mut late = Viewer::open(&hub).await.unwrap();
    late.set_up(Compressed).await;
    late.sees(&frame).await;
    assert!(display.is_idle(), "no second connection");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_shown_before_it_was_drawn() {
    let (hub, mut display) = Display::new();
    let (viewer, mut connection) = tokio::join!(Viewer::open(&hub), display.accept((200, 150)));
    let mut viewer = viewer.unwrap();
    viewer.set_up(Raw).await;
    viewer.request(false).await;
    assert!(timeout(Duration::from_secs(5), viewer.update()).await.is_err());
    let frame = pattern(SIZE, 2);
    connection.show(&frame).await;
    viewer.update().await.unwrap();
    assert!(viewer.frame == frame);
}

#[tokio::test(start_paused = true)]
async fn a_viewer_that_does_not_read_gets_the_latest_pixels_and_holds_up_no_one() {
    let (hub, mut display) = Display::new();
    let size = (800, 600);
    let (mut slow, mut connection) = first(&hub, &mut display, &pattern(size, 0)).await;
    let mut fast = Viewer::open(&hub).await.unwrap();
    slow.set_up(Raw).await;
    fast.set_up(Raw).await;
    // More than the buffers hold.
    for _ in 0..100 {
        slow.request(false).await;
    }
    for number in 1..20 {
        let frame = pattern(size, number);
        connection.show(&frame).await;
        fast.sees(&frame).await;
    }
    // The requests were merged: few updates later, the viewer is current.
    let mut updates = 0;
    while slow.frame != pattern(size, 19) {
        slow.update().await.unwrap();
        slow.request(true).await;
        updates += 1;
    }
    assert!(updates <= 3, "{updates} updates");
}

#[tokio::test(start_paused = true)]
async fn a_change_of_size_is_told_or_hidden() {
    let (hub, mut display) = Display::new();
    let (mut aware, mut connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    let mut plain = Viewer::open(&hub).await.unwrap();
    aware.set_up(Compressed).await;
    // Only raw pixels: this viewer cannot be told.
    plain.write(&[2, 0, 0, 1, 0, 0, 0, 0]).await;
    aware.sees(&pattern(SIZE, 1)).await;
    plain.sees(&pattern(SIZE, 1)).await;
    aware.request(true).await;
    for size in [(300, 100), (90, 260)] {
        let larger = pattern(size, 3);
        connection.requested().await;
        connection.send(&[(Area::of_size(size), encoding::DESKTOP_SIZE, Vec::new())]).await;
        assert!(!connection.requested().await, "the whole new screen is requested");
        connection.draw(&larger, Area::of_size(size)).await;
        while aware.frame != larger {
            // Requests at once, as viewers do.
            aware.update().await.unwrap();
            aware.request(true).await;
        }
        let mut part = Framebuffer::new(SIZE.0, SIZE.1);
        for y in 0..SIZE.1.min(size.1) {
            let width = SIZE.0.min(size.0);
            part.row_mut(y)[..width].copy_from_slice(&larger.row(y)[..width]);
        }
        plain.sees(&part).await;
    }
    // A viewer that comes now knows the new size from the start.
    assert_eq!(Viewer::open(&hub).await.unwrap().frame.width(), 90);
}

/// Returns the rectangles of the next update: position, size and encoding; raw data is skipped.
async fn headers(viewer: &mut Viewer) -> Vec<([u16; 4], i32)> {
    let stream = &mut viewer.stream;
    assert_eq!(stream.read_u16().await.unwrap(), 0);
    let mut headers = Vec::new();
    for _ in 0..stream.read_u16().await.unwrap() {
        let mut area = [0; 4];
        for number in &mut area {
            *number = stream.read_u16().await.unwrap();
        }
        let encoding = stream.read_i32().await.unwrap();
        if encoding == encoding::RAW {
            let mut data = vec![0; 4 * usize::from(area[2]) * usize::from(area[3])];
            stream.read_exact(&mut data).await.unwrap();
        }
        headers.push((area, encoding));
    }
    headers
}

#[tokio::test(start_paused = true)]
async fn an_update_has_the_tiles_that_changed_in_the_wanted_area() {
    let (hub, mut display) = Display::new();
    let frame = pattern(SIZE, 1);
    let (mut viewer, mut connection) = first(&hub, &mut display, &frame).await;
    viewer.request(false).await;
    let rows = [([0, 0, 200, 64], 0), ([0, 64, 200, 64], 0), ([0, 128, 200, 22], 0)];
    assert_eq!(headers(&mut viewer).await, rows);
    let mut changed = frame.clone();
    for (x, y) in [(0, 0), (70, 10), (199, 0), (150, 149)] {
        changed.row_mut(y)[x] = [200; 3];
    }
    connection.show(&changed).await;
    viewer.request(true).await;
    let tiles = [([0, 0, 128, 64], 0), ([192, 0, 8, 64], 0), ([128, 128, 64, 22], 0)];
    assert_eq!(headers(&mut viewer).await, tiles);
    // A part of the screen is wanted: the rest stays due.
    connection.show(&frame).await;
    viewer.write(&[3, 1, 0, 100, 0, 0, 0, 100, 0, 100]).await;
    assert_eq!(headers(&mut viewer).await, [([100, 0, 28, 64], 0), ([192, 0, 8, 64], 0)]);
    viewer.request(true).await;
    assert_eq!(headers(&mut viewer).await, [([0, 0, 128, 64], 0), ([128, 128, 64, 22], 0)]);
    // A pixel that is wanted at once comes, whether it changed or not.
    viewer.write(&rfb::update_request(false, 1, 1)).await;
    assert_eq!(headers(&mut viewer).await, [([0, 0, 1, 1], 0)]);
}

#[tokio::test(start_paused = true)]
async fn input_is_passed_on_and_released() {
    let (hub, mut display) = Display::new();
    let (mut one, mut connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    let mut two = Viewer::open(&hub).await.unwrap();
    let key = |down, keysym| Input::Key { down, keysym };
    let pointer = |buttons, x| Input::Pointer { buttons, x, y: 1 };
    one.write(&key(true, 0xffe3).to_bytes(false)).await;
    assert_eq!(connection.input().await, Some(key(true, 0xffe3)));
    for input in [pointer(1, 5), key(true, 0x61), key(false, 0x61), pointer(1, 9)] {
        two.write(&input.to_bytes(false)).await;
        assert_eq!(connection.input().await, Some(input));
    }
    // Each viewer's own keys and buttons are released when it leaves, the last one's as well.
    drop(two);
    assert_eq!(connection.input().await, Some(pointer(0, 9)));
    drop(one);
    assert_eq!(connection.input().await, Some(key(false, 0xffe3)));
    assert_eq!(connection.input().await, None, "the connection ends with its last viewer");
}

#[tokio::test(start_paused = true)]
async fn scancodes_are_passed_on_if_the_display_takes_them() {
    let (hub, mut display) = Display::new();
    let (mut viewer, mut connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    viewer.set_up(Raw).await;
    viewer.request(false).await;
    assert!(!viewer.update().await.unwrap().extended_keys, "not announced by the display");
    let key = Input::ExtendedKey { down: true, keysym: 0x79, scancode: 0x15 };
    viewer.write(&key.to_bytes(true)).await;
    assert_eq!(connection.input().await, Some(Input::Key { down: true, keysym: 0x79 }));
    connection.send(&[(Area::of_size((0, 0)), encoding::QEMU_EXTENDED_KEY, Vec::new())]).await;
    viewer.request(true).await;
    assert!(viewer.update().await.unwrap().extended_keys);
    viewer.write(&key.to_bytes(true)).await;
    assert_eq!(connection.input().await, Some(key));
    // Once is enough.
    viewer.request(false).await;
    assert!(!viewer.update().await.unwrap().extended_keys);
}

#[tokio::test(start_paused = true)]
async fn the_connection_is_open_while_there_are_viewers() {
    let (hub, mut display) = Display::new();
    for round in 0..2 {
        let (viewer, mut connection) = first(&hub, &mut display, &pattern(SIZE, round)).await;
        drop(viewer);
        assert_eq!(connection.input().await, None);
    }
    display.refuse(Some(ErrorKind::GuestUnreachable));
    assert_eq!(hub.connect().await.err().unwrap().kind(), ErrorKind::GuestUnreachable);
}

/// Answers a connection that is opened again, once the hub gets to it.
async fn again(display: &mut Display, frame: &Framebuffer) -> Connection {
    let mut connection = display.accept((frame.width() as u16, frame.height() as u16)).await;
    connection.show(frame).await;
    connection
}

#[tokio::test(start_paused = true)]
async fn a_broken_connection_is_opened_again_and_viewers_stay() {
    let (hub, mut display) = Display::new();
    let (mut viewer, connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    viewer.set_up(Compressed).await;
    viewer.sees(&pattern(SIZE, 1)).await;
    display.refuse(Some(ErrorKind::GuestUnreachable));
    drop(connection);
    sleep(Duration::from_secs(60)).await;
    viewer.request(false).await;
    viewer.update().await.unwrap();
    assert!(viewer.frame == pattern(SIZE, 1), "the last screen until then");
    display.refuse(None);
    let connection = again(&mut display, &pattern(SIZE, 2)).await;
    viewer.sees(&pattern(SIZE, 2)).await;
    drop(connection);
    // A display of another size, as after a reset of the guest.
    let _connection = again(&mut display, &pattern((80, 80), 3)).await;
    while viewer.frame != pattern((80, 80), 3) {
        viewer.request(true).await;
        viewer.update().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn viewers_end_with_the_machine() {
    // Known from the display, and told by the machine.
    for told in [false, true] {
        let (hub, mut display) = Display::new();
        let (mut viewer, connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
        display.refuse(Some(ErrorKind::Conflict));
        if told {
            hub.end();
        } else {
            drop(connection);
        }
        // At once, rather than after many attempts to connect again.
        assert!(timeout(Duration::from_secs(5), viewer.update()).await.unwrap().is_err());
        assert_eq!(hub.connect().await.err().unwrap().kind(), ErrorKind::Conflict);
        assert!(display.is_idle());
    }
}

#[tokio::test(start_paused = true)]
async fn a_display_that_stays_away_is_given_up() {
    let (hub, mut display) = Display::new();
    let (mut viewer, connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    display.refuse(Some(ErrorKind::GuestUnreachable));
    drop(connection);
    assert!(timeout(Duration::from_secs(300), viewer.update()).await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn screenshots_outlive_the_machine() {
    let (hub, mut display) = Display::new();
    let frame = pattern(SIZE, 4);
    let serving = async {
        let mut connection = again(&mut display, &frame).await;
        while connection.input().await.is_some() {}
    };
    let (screenshot, ()) = tokio::join!(hub.screenshot(), serving);
    let png = frame.to_png().unwrap();
    assert!(screenshot.unwrap() == png);
    hub.end();
    assert!(hub.screenshot().await.unwrap() == png, "the last one");

    let (hub, display) = Display::new();
    display.refuse(Some(ErrorKind::GuestUnreachable));
    assert_eq!(hub.screenshot().await.unwrap_err().kind(), ErrorKind::GuestUnreachable);
    hub.end();
    assert_eq!(hub.screenshot().await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test(start_paused = true)]
async fn pixels_have_the_format_of_the_viewer() {
    let (hub, mut display) = Display::new();
    let frame = pattern(SIZE, 5);
    let (mut viewer, _connection) = first(&hub, &mut display, &frame).await;
    // Red in the lowest byte, as browsers draw it.
    let mut format = PixelFormat::DEFAULT.to_bytes();
    format[10..13].copy_from_slice(&[0, 8, 16]);
    let mut exchanged = frame.clone();
    for y in 0..SIZE.1 {
        exchanged.row_mut(y).iter_mut().for_each(|pixel| pixel.reverse());
    }
    for encoding in [Raw, Compressed] {
        viewer.set_up(encoding).await;
        viewer.write(&[[0; 4].as_slice(), &format].concat()).await;
        viewer.frame = Framebuffer::new(SIZE.0, SIZE.1);
        viewer.request(false).await;
        viewer.update().await.unwrap();
        assert!(viewer.frame == exchanged, "{encoding:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_version_of_viewers_is_let_in() {
    let (hub, mut display) = Display::new();
    let (_viewer, _connection) = first(&hub, &mut display, &pattern(SIZE, 1)).await;
    let cases: [(&[u8], &[u8], &[u8]); 4] = [
        (b"RFB 003.003\n", b"\x01", b"\0\0\0\x01"),
        (b"RFB 003.007\n", b"\x01\x01", b"\x01\x01"),
        (b"RFB 003.008\n", b"\x01\x00", b"\x01\x01\0\0\0\0"),
        (b"RFB 003.889\n", b"\x00", b"\0\0\0\x01"),
    ];
    for (version, said, answer) in cases {
        let mut stream = hub.connect().await.unwrap();
        stream.write_all(&[version, said].concat()).await.unwrap();
        let mut heard = vec![0; 12 + answer.len() + 24 + 6];
        stream.read_exact(&mut heard).await.unwrap();
        let init =
            [&[0, 200, 0, 150], PixelFormat::DEFAULT.to_bytes().as_slice(), b"\0\0\0\x06rudder"].concat();
        assert_eq!(heard, [b"RFB 003.008\n", answer, &init].concat());
    }
    for bad in [b"GET / HTTP/1".as_slice(), b"RFB 003.008\n\x02", b"RFB 003.008\n\x01\x01\x63"] {
        let mut stream = hub.connect().await.unwrap();
        stream.write_all(bad).await.unwrap();
        let ended = timeout(Duration::from_secs(5), stream.read_to_end(&mut Vec::new())).await;
        ended.expect("the viewer is disconnected").unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is drawn and whenever viewers ask, they end up with the screen of the display.
    #[test]
    fn viewers_converge(
        steps in prop::collection::vec(
            (
                any::<[prop::sample::Index; 2]>(),
                (1..90usize, 1..90usize),
                any::<[u8; 3]>(),
                any::<[bool; 2]>(),
            ),
            1..12,
        ),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let (hub, mut display) = Display::new();
            let mut frame = pattern(SIZE, 0);
            let (one, mut connection) = first(&hub, &mut display, &frame).await;
            let mut viewers = [one, Viewer::open(&hub).await.unwrap()];
            viewers[0].set_up(Raw).await;
            viewers[1].set_up(Compressed).await;
            for ([x, y], (width, height), colour, asks) in steps {
                let (x, y) = (x.index(SIZE.0), y.index(SIZE.1));
                let area = Area { x, y, width, height }.intersection(Area::of_size(SIZE));
                for y in area.y..area.y + area.height {
                    frame.row_mut(y)[area.x..area.x + area.width].fill(colour);
                }
                connection.requested().await;
                connection.draw(&frame, area).await;
                for (viewer, asks) in viewers.iter_mut().zip(asks) {
                    if asks {
                        viewer.request(false).await;
                        viewer.update().await.unwrap();
                    }
                }
            }
            for viewer in &mut viewers {
                viewer.sees(&frame).await;
            }
        });
    }
}
