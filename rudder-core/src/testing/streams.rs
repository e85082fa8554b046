//! Connections to the guest: before it listens, many at once, large, half closed, cut.

use super::{
    Rig, TestResult,
    guest::{Booted, CLOSED},
    rig::eventually,
    test_result::{During as _, ensure, expect_equal, fail},
};
use crate::{
    ErrorKind,
    backend::{BoxedStream, Machine},
    digest::Digest,
};
use futures::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// How long an exchange may make no progress on a slow host.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long the stream of a port on which no process listens may stay open.
const END_LIMIT: Duration = Duration::from_secs(20);
/// How long the guest's echo service may take until it listens.
const LISTEN_LIMIT: Duration = Duration::from_secs(100);
/// How long the peer is given at least to answer a half-close, and how many exchanges on other connections take place
/// in that time: on a slow host, these take longer as well.
const HALF_CLOSE: (Duration, usize) = (Duration::from_secs(3), 20);

/// Dialling a guest that does not listen yet either fails with the expected error or returns a stream that ends early;
/// once the guest listens, dialling works, and so does a login with the key of the seed.
pub async fn dialling_succeeds_once_the_guest_listens(rig: &Rig) -> TestResult {
    // Every boot of the suite dials from power-on, and fails on any other answer.
    let booted = rig.shared().await?;
    expect_equal(&booted.run("echo hello").await?.trim(), &"hello", "what a command wrote")
}

/// A port on which no process listens refuses, or its stream ends.
pub async fn a_closed_port_refuses_connections(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    match booted.machine.dial(CLOSED).await {
        Err(error) => expect_equal(&error.kind(), &ErrorKind::GuestUnreachable, "dial a closed port"),
        Ok(mut stream) => {
            let mut byte = [0];
            let read = tokio::time::timeout(END_LIMIT, stream.read(&mut byte)).await;
            match read {
                Ok(Ok(0) | Err(_)) => Ok(()),
                Ok(Ok(_)) => fail!("a closed port: expected its stream to end, but found a byte"),
                Err(_) => fail!(
                    "a closed port: expected its stream to end, but it is still open after {END_LIMIT:?}"
                ),
            }
        }
    }
}

/// Many connections at once each carry their own bytes.
pub async fn many_concurrent_connections_work(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let port = booted.echo(rig).await?;
    let talks = (0..16).map(|number| {
        let machine = Arc::clone(&booted.machine);
        async move {
            let bytes = noise(number, 100_000);
            let failed = |why: String| failed(format!("connection {number} of many: {why}"));
            // Where the guest cannot take that many at once, a stream ends early, and is dialled again. After the first
            // answer, no failure is tolerated.
            for _ in 0..20 {
                let mut stream = machine.dial(port).await.during("dial one of many")?;
                if answers(&mut stream).await {
                    return intact(&exchange(stream, bytes.clone()).await?, &bytes).map_err(failed);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(failed("expected an answer, but its stream ended early twenty times".to_owned()))
        }
    });
    join_all(talks).await.into_iter().collect()
}

/// Large transfers both ways at once arrive complete and in order.
pub async fn large_transfers_arrive_complete(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let port = booted.echo(rig).await?;
    let bytes = noise(7, rig.image()?.large);
    let digest = Digest::of(&bytes);
    let stream = booted.machine.dial(port).await.during("dial")?;
    let returned = exchange(stream, bytes.clone()).await?;
    intact(&returned, &bytes).map_err(failed)?;
    expect_equal(&Digest::of(&returned), &digest, "the digest of what came back")
}

/// One side may close its half while the other continues: what was sent before is answered afterwards.
pub async fn one_half_of_a_connection_can_be_closed(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let port = booted.echo(rig).await?;
    let mut stream = booted.machine.dial(port).await.during("dial")?;
    let sent = async {
        stream.write_all(b"the last words").await?;
        stream.flush().await?;
        stream.shutdown().await?;
        let mut returned = Vec::new();
        stream.read_to_end(&mut returned).await?;
        std::io::Result::Ok(returned)
    };
    let patience = async {
        let began = Instant::now();
        for number in 0.. {
            if number >= HALF_CLOSE.1 && began.elapsed() >= HALF_CLOSE.0 {
                return Ok(number);
            }
            // The guest does this much meanwhile, so it had the time to see the half-close of the other connection.
            let mut other = booted.machine.dial(port).await.during("dial beside")?;
            ensure!(answers(&mut other).await, "expected an answer beside the connection, but found none");
        }
        Ok(0)
    };
    tokio::select! {
        biased;
        sent = sent => match sent {
            Ok(returned) => {
                expect_equal(&returned.as_slice(), &&b"the last words"[..], "what came after half closing")
            }
            Err(error) => fail!("half closing: expected the answer, but found {error}"),
        },
        others = patience => {
            let others = others?;
            fail!(
                "half closing: expected the peer to close its half, but it stays open while the guest answered {others} \
                 other connections"
            )
        }
    }
}

/// A port of the guest belongs to the guest, whatever listens at that number on the host.
pub async fn dialling_does_not_reach_ports_of_the_host(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let Some(port) = rig.host_port() else { fail!("expected to listen on the host's loopback, but cannot") };
    match booted.machine.dial(port).await {
        Err(error) => expect_equal(&error.kind(), &ErrorKind::GuestUnreachable, "dial a closed port")?,
        Ok(mut stream) => {
            let mut byte = [0];
            tokio::select! {
                read = stream.read(&mut byte) => ensure!(
                    !matches!(read, Ok(1..)),
                    "dial port {port} of the guest: expected the stream to end, but found a byte"
                ),
                reached = eventually(END_LIMIT, || async { Ok(rig.was_reached()) }) => match reached? {
                    true => fail!("dial port {port} of the guest: expected no listener, but reached the host"),
                    false => fail!("dial port {port} of the guest: expected the stream to end, but it is still open"),
                }
            }
        }
    }
    ensure!(!rig.was_reached(), "dial port {port} of the guest: expected no listener, but reached the host");
    Ok(())
}

/// A connection that is cut in the middle affects no other, and a new one works.
pub async fn a_broken_connection_does_not_affect_others(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let port = booted.echo(rig).await?;
    let steady = booted.machine.dial(port).await.during("dial")?;
    for _ in 0..3 {
        let mut doomed = booted.machine.dial(port).await.during("dial")?;
        // Nothing is read, so buffers are full when it is cut.
        let bytes = noise(3, 1 << 20);
        let _ = tokio::time::timeout(Duration::from_millis(200), doomed.write_all(&bytes)).await;
        drop(doomed);
    }
    let bytes = noise(4, 50_000);
    intact(&exchange(steady, bytes.clone()).await?, &bytes).map_err(failed)?;
    let fresh = booted.machine.dial(port).await.during("dial after others were cut")?;
    intact(&exchange(fresh, bytes.clone()).await?, &bytes).map_err(failed)?;
    expect_equal(&booted.run("echo still here").await?.trim(), &"still here", "what a command wrote")
}

/// Whether the echo on a stream sends back a byte.
async fn answers(stream: &mut BoxedStream) -> bool {
    let exchange_with = async {
        stream.write_all(b"?").await?;
        stream.flush().await?;
        stream.read_u8().await
    };
    matches!(tokio::time::timeout(Duration::from_secs(20), exchange_with).await, Ok(Ok(b'?')))
}

/// Fails with the first difference, if there is one.
fn intact(found: &[u8], expected: &[u8]) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    let (found, expected) = (found.len(), expected.len());
    Err(match wrong {
        Some(wrong) => format!("expected {expected} bytes back, but found another at {wrong} of {found}"),
        None => format!("expected {expected} bytes back, but found {found}"),
    })
}

fn failed(why: String) -> super::NotPassed {
    super::NotPassed::Failed(why)
}

/// Sends all bytes while reading as many. Whether the other side closes afterwards is checked by another test.
async fn exchange(stream: BoxedStream, bytes: Vec<u8>) -> TestResult<Vec<u8>> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let expected = bytes.len();
    let sending = async {
        writer.write_all(&bytes).await?;
        writer.flush().await
    };
    let reading = async {
        let mut returned = vec![0; expected];
        let mut filled = 0;
        while filled < expected {
            let read = tokio::time::timeout(STALL_LIMIT, reader.read(&mut returned[filled..])).await;
            match read.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))? {
                0 => break,
                count => filled += count,
            }
        }
        returned.truncate(filled);
        std::io::Result::Ok(returned)
    };
    match futures::try_join!(sending, reading) {
        Ok(((), returned)) => Ok(returned),
        Err(error) => {
            fail!("an exchange of {expected} bytes: expected the same bytes back, but found {error}")
        }
    }
}

/// Returns pseudorandom bytes, which no faulty transfer reproduces by chance; the same for the same seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// Waits until a guest greets on its SSH port, dialling from power-on; fails on any answer that the contract does not
/// allow.
pub(super) async fn greeted(machine: &dyn Machine, port: u16, limit: Duration) -> TestResult {
    let greets = eventually(limit, || async {
        match machine.dial(port).await {
            Ok(mut stream) => {
                let mut greeting = [0; 4];
                let read = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut greeting));
                match read.await {
                    Ok(Ok(_)) => {
                        expect_equal(&&greeting, &b"SSH-", "the greeting of the guest")?;
                        Ok(true)
                    }
                    // The stream ended early, or no process listens yet.
                    Ok(Err(_)) | Err(_) => Ok(false),
                }
            }
            Err(error) => {
                expect_equal(
                    &error.kind(),
                    &ErrorKind::GuestUnreachable,
                    "dial a guest that does not listen yet",
                )?;
                Ok(false)
            }
        }
    });
    ensure!(greets.await?, "expected a greeting of the guest within {limit:?}, but it did not");
    Ok(())
}

impl Booted {
    /// Returns the port of the guest's echo service, which is started if necessary.
    pub(super) async fn echo(&self, rig: &Rig) -> TestResult<u16> {
        let Some(echo) = rig.image()?.echo else {
            return Err(super::NotPassed::Skipped("the adapter's guest has no echo".to_owned()));
        };
        let mut started = self.echoes.lock().await;
        if let Some(command) = echo.start.filter(|_| !*started) {
            self.run(&command).await?;
            let answers = eventually(LISTEN_LIMIT, || async {
                let Ok(mut stream) = self.machine.dial(echo.port).await else { return Ok(false) };
                Ok(answers(&mut stream).await)
            });
            ensure!(
                answers.await?,
                "expected the guest's echo to answer within {LISTEN_LIMIT:?}, but it did not"
            );
        }
        *started = true;
        Ok(echo.port)
    }
}
