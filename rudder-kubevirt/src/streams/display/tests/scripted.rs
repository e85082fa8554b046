//! A scripted display, and a viewer that understands what it is sent.

use super::super::{
    messages::{self, Input, ViewerMessage},
    pixels::PixelFormat,
    screen::Area,
    *,
};
use rudder_core::{
    backend::DisplayEncoding,
    console::{Framebuffer, rfb},
};
use std::sync::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::mpsc,
};

/// What stands where KubeVirt's display is: connections arrive in `opened`, or are refused.
pub(super) struct Display {
    opened: mpsc::UnboundedReceiver<DuplexStream>,
    refuses: Arc<Mutex<Option<ErrorKind>>>,
}

impl Display {
    pub(super) fn new() -> (DisplayHub, Self) {
        let (sender, opened) = mpsc::unbounded_channel();
        let refuses = Arc::new(Mutex::new(None));
        let refused = Arc::clone(&refuses);
        let connect: Connect = Arc::new(move || {
            let (near, far) = tokio::io::duplex(1 << 16);
            let result = match *refused.lock().unwrap() {
                Some(kind) => Err(Error::new(kind, "no display")),
                None => Ok(Box::new(near) as BoxedStream),
            };
            if result.is_ok() {
                sender.send(far).unwrap();
            }
            Box::pin(async move { result })
        });
        (DisplayHub::new(connect), Self { opened, refuses })
    }

    pub(super) fn refuse(&self, kind: Option<ErrorKind>) {
        *self.refuses.lock().unwrap() = kind;
    }

    /// Accepts a connection and performs the handshake.
    pub(super) async fn accept(&mut self, (width, height): (u16, u16)) -> Connection {
        let mut stream = self.opened.recv().await.unwrap();
        stream.write_all(b"RFB 003.008\n").await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        stream.write_all(&[1, 1]).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), 1);
        stream.write_all(&[0; 4]).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), 1, "a shared session");
        let mut init = [width.to_be_bytes(), height.to_be_bytes()].concat();
        init.extend(PixelFormat::DEFAULT.to_bytes());
        init.extend([0; 4]);
        stream.write_all(&init).await.unwrap();
        Connection { stream }
    }

    pub(super) fn is_idle(&mut self) -> bool {
        self.opened.try_recv().is_err()
    }
}

/// A connection to the scripted display.
pub(super) struct Connection {
    pub(super) stream: DuplexStream,
}

impl Connection {
    /// Returns the next input; `None` when the client has hung up.
    pub(super) async fn input(&mut self) -> Option<Input> {
        loop {
            match messages::read(&mut self.stream).await.unwrap()? {
                ViewerMessage::Input(input) => return Some(input),
                _ => continue,
            }
        }
    }

    /// Waits for a request, and returns whether it is incremental.
    pub(super) async fn requested(&mut self) -> bool {
        loop {
            if let ViewerMessage::UpdateRequest { incremental, .. } =
                messages::read(&mut self.stream).await.unwrap().unwrap()
            {
                return incremental;
            }
        }
    }

    pub(super) async fn send(&mut self, rectangles: &[(Area, i32, Vec<u8>)]) {
        let mut bytes = vec![0, 0];
        bytes.extend((rectangles.len() as u16).to_be_bytes());
        for (area, encoding, data) in rectangles {
            for number in [area.x, area.y, area.width, area.height] {
                bytes.extend((number as u16).to_be_bytes());
            }
            bytes.extend(encoding.to_be_bytes());
            bytes.extend(data);
        }
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// Sends an area of a screen.
    pub(super) async fn draw(&mut self, frame: &Framebuffer, area: Area) {
        let rows = area.y..area.y + area.height;
        let pixels = rows.flat_map(|y| &frame.row(y)[area.x..area.x + area.width]);
        let data = pixels.flat_map(|[red, green, blue]| [*blue, *green, *red, 0]).collect();
        self.send(&[(area, 0, data)]).await;
    }

    /// Answers the next request with the whole screen.
    pub(super) async fn show(&mut self, frame: &Framebuffer) {
        self.requested().await;
        self.draw(frame, Area::of_size((frame.width(), frame.height()))).await;
    }
}

/// Returns a screen with a pattern that differs everywhere.
pub(super) fn pattern((width, height): (usize, usize), seed: usize) -> Framebuffer {
    let mut frame = Framebuffer::new(width, height);
    for y in 0..height {
        for (x, pixel) in frame.row_mut(y).iter_mut().enumerate() {
            *pixel = [(x / 3 + seed) as u8, (y / 2) as u8, (x * y / 64 + 7 * seed) as u8];
        }
    }
    frame
}

/// A viewer that decodes what it is sent.
pub(super) struct Viewer {
    pub(super) stream: BoxedStream,
    pub(super) frame: Framebuffer,
    zrle: rfb::ZrleDecoder,
}

impl Viewer {
    /// Connects, without any request.
    pub(super) async fn open(hub: &DisplayHub) -> Result<Self> {
        let mut stream = hub.connect().await?;
        let (width, height) = rfb::handshake(&mut stream).await?;
        Ok(Self { stream, frame: Framebuffer::new(width, height), zrle: rfb::ZrleDecoder::default() })
    }

    pub(super) async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub(super) async fn set_up(&mut self, encoding: DisplayEncoding) {
        self.write(&rfb::client_setup(encoding)).await;
    }

    pub(super) async fn request(&mut self, incremental: bool) {
        self.write(&rfb::update_request(incremental, self.frame.width(), self.frame.height())).await;
    }

    pub(super) async fn update(&mut self) -> Result<rfb::Update> {
        rfb::read_update(&mut self.stream, &mut self.frame, &mut self.zrle).await
    }

    /// Requests updates until the screen is this one.
    pub(super) async fn sees(&mut self, expected: &Framebuffer) {
        let seeing = async {
            while self.frame != *expected {
                self.request(true).await;
                self.update().await.unwrap();
            }
        };
        timeout(Duration::from_secs(10), seeing).await.expect("the screen did not become the expected one");
    }
}

/// Connects a viewer, which opens the session, and shows it a screen.
pub(super) async fn first(
    hub: &DisplayHub,
    display: &mut Display,
    frame: &Framebuffer,
) -> (Viewer, Connection) {
    let size = (frame.width() as u16, frame.height() as u16);
    let (viewer, mut connection) = tokio::join!(Viewer::open(hub), display.accept(size));
    connection.show(frame).await;
    (viewer.unwrap(), connection)
}
