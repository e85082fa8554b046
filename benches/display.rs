//! What a screen of text costs raw and compressed: bytes, and the time until a new console has read all of it, on QEMU.
//!
//! ```text
//! make bench
//! ```
//!
//! *on this host* is the whole way: connecting to the Unix socket of QEMU's display, encoding in QEMU, decoding here.
//! *decoding* is the same bytes, recorded, without QEMU. The encodings take turns.

#![allow(missing_docs, clippy::print_stdout, clippy::unwrap_used)] // A program that prints, and ends where it cannot go on.

#[path = "../tests/support/typing.rs"]
mod typing;

use async_trait::async_trait;
use rudder::{
    Result,
    backend::{BoxedStream, DisplayEncoding, Exit, Machine, Progress, SerialLog, Stop},
    console::{Console, Framebuffer},
    module::{CapturedDisk, CapturedState},
};
use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use typing::{PATIENCE, Rig};

const ROUNDS: usize = 31;

#[tokio::main]
async fn main() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests/tiny.qcow2");
    assert!(tiny.exists(), "this bench needs {}: make guests", tiny.display());
    let rig = Rig::boot(&tiny, 256 << 20).await;
    rig.console.wait_text("login:", PATIENCE).await.unwrap();
    rig.console.type_text("tester\n").await.unwrap();
    rig.console.wait_text("Password:", PATIENCE).await.unwrap();
    rig.console.type_text("tester\n").await.unwrap();
    rig.console.wait_text("$", PATIENCE).await.unwrap();
    rig.console.type_text("clear; sudo dmesg | tail -n 60; echo the-\"end\"\n").await.unwrap();
    rig.console.wait_text("the-end", PATIENCE).await.unwrap();

    let encodings = [DisplayEncoding::Raw, DisplayEncoding::Compressed];
    let mut times = [const { Vec::new() }; 4];
    let mut screen = Framebuffer::new(0, 0);
    for _ in 0..ROUNDS {
        for (times, encoding) in times.iter_mut().zip(encodings) {
            let (read, took) = read(rig.machine.clone(), encoding).await;
            times.push(took);
            screen = read;
        }
    }
    let mut bytes = [0; 2];
    for (index, encoding) in encodings.into_iter().enumerate() {
        let recorder = Arc::new(Recorder { machine: rig.machine.clone(), bytes: Arc::default() });
        read(recorder.clone(), encoding).await;
        let recorded = recorder.bytes.lock().unwrap().clone();
        bytes[index] = recorded.len();
        let replay =
            Arc::new(Replay { machine: rig.machine.clone(), bytes: recorded, streams: Mutex::default() });
        for _ in 0..ROUNDS {
            times[2 + index].push(read(replay.clone(), encoding).await.1);
        }
    }
    let [raw, zrle, decoding_raw, decoding_zrle] = times.map(median);
    println!("a screen of text, {}×{}, median of {ROUNDS}", screen.width(), screen.height());
    println!("             kilobytes   on this host     decoding");
    for (name, bytes, whole, decoding) in
        [("raw", bytes[0], raw, decoding_raw), ("compressed", bytes[1], zrle, decoding_zrle)]
    {
        println!("  {name:10} {:>9.1} {whole:>14.2?} {decoding:>12.2?}", bytes as f64 / 1000.0);
    }
    println!(
        "  ratio      {:>9.4} {:>14.2} {:>12.2}",
        bytes[1] as f64 / bytes[0] as f64,
        zrle.as_secs_f64() / raw.as_secs_f64(),
        decoding_zrle.as_secs_f64() / decoding_raw.as_secs_f64()
    );
    rig.end().await;
}

/// Reads the screen with a new console.
async fn read(machine: Arc<dyn Machine>, encoding: DisplayEncoding) -> (Framebuffer, Duration) {
    let start = Instant::now();
    let screen = Console::new(machine).encoding(encoding).framebuffer().await.unwrap();
    (screen, start.elapsed())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A machine whose display is recorded.
#[derive(Debug)]
struct Recorder {
    machine: Arc<dyn Machine>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl Recorder {
    async fn connect(&self) -> Result<BoxedStream> {
        let (mut reader, mut writer) = tokio::io::split(self.machine.display().await?);
        let (near, far) = tokio::io::duplex(64 << 10);
        let (mut from_console, mut to_console) = tokio::io::split(far);
        tokio::spawn(async move { tokio::io::copy(&mut from_console, &mut writer).await });
        let bytes = self.bytes.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                bytes.lock().unwrap().extend_from_slice(&buffer[..count]);
                if to_console.write_all(&buffer[..count]).await.is_err() {
                    break;
                }
            }
        });
        Ok(Box::new(near))
    }
}

/// A machine whose display is a recording.
#[derive(Debug)]
struct Replay {
    machine: Arc<dyn Machine>,
    bytes: Vec<u8>,
    /// The other ends of the connections: a connection that ends is an error.
    streams: Mutex<Vec<DuplexStream>>,
}

impl Replay {
    async fn connect(&self) -> Result<BoxedStream> {
        let (near, mut far) = tokio::io::duplex(self.bytes.len() + 1024);
        far.write_all(&self.bytes).await.unwrap();
        self.streams.lock().unwrap().push(far);
        Ok(Box::new(near))
    }
}

macro_rules! machine {
    ($tap:ty) => {
        #[async_trait]
        impl Machine for $tap {
            fn name(&self) -> &str {
                self.machine.name()
            }

            async fn start(&self) -> Result<()> {
                self.machine.start().await
            }

            async fn wait(&self) -> Result<Exit> {
                self.machine.wait().await
            }

            async fn stop(&self, how: Stop) -> Result<Exit> {
                self.machine.stop(how).await
            }

            async fn dial(&self, port: u16) -> Result<BoxedStream> {
                self.machine.dial(port).await
            }

            async fn display(&self) -> Result<BoxedStream> {
                self.connect().await
            }

            async fn serial(&self) -> Result<BoxedStream> {
                self.machine.serial().await
            }

            async fn serial_log(&self, from: u64) -> Result<SerialLog> {
                self.machine.serial_log(from).await
            }

            async fn screenshot(&self) -> Result<Vec<u8>> {
                self.machine.screenshot().await
            }

            fn access(&self) -> Vec<String> {
                self.machine.access()
            }

            async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
                self.machine.capture(disk, progress).await
            }

            async fn capture_state(&self) -> Result<Vec<CapturedState>> {
                self.machine.capture_state().await
            }
        }
    };
}

machine!(Recorder);
machine!(Replay);
