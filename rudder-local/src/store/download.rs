//! Downloads: shared by concurrent requests, resumed after interruptions, unpacked while they arrive.

use super::{
    Store,
    blob::{UrlRecord, Validator},
    blocking, durable,
    durable::human,
    fetch::Obtained,
    http::{self, Failure, RequestKind, ServerReply},
    lock::{FileLock, Mode},
    masked,
    partial_download::{EndOnDrop, PartialDownload},
    process,
    unpack::{self, Packing, Stop, Unpacked},
};
use bytes::Bytes;
use rudder_core::{Error, ErrorKind, Result, backend::Progress, digest::Digest, plan::PlannedUrl};
use std::{
    io::{Cursor, Read},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time,
};

/// Interval between checks whether another download of the same URL has ended.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Number of new bytes with which a failed attempt restarts the count of attempts.
const SIGNIFICANT_PROGRESS: u64 = 1 << 20;
/// The longest pause between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Number of received pieces that may wait for the disk.
const QUEUE_LENGTH: usize = 8;

/// What is requested of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Requested {
    Image {
        /// Size of the disk to be made from the image, in bytes, if known.
        disk: Option<u64>,
    },
    File,
}

impl Requested {
    pub(super) fn is_image(self) -> bool {
        matches!(self, Self::Image { .. })
    }

    pub(super) fn disk(self) -> Option<u64> {
        match self {
            Self::Image { disk } => disk,
            Self::File => None,
        }
    }
}

/// The outcome of a transfer that did not fail.
enum Transferred {
    /// Nothing was transferred: the server's content has not changed.
    NotModified,
    /// All bytes have been received.
    Complete,
}

/// A download to perform, and its request.
struct Job<'a> {
    url: &'a PlannedUrl,
    key: &'a str,
    lock: Arc<FileLock>,
    requested: Requested,
    progress: &'a Progress,
}

/// A complete download.
pub(super) struct Received {
    pub(super) part: PartialDownload,
    pub(super) served: Digest,
    resumed: bool,
    /// The unpacked image, if it was served packed, and how often the download had started over when unpacking began.
    pub(super) unpacked: Option<(u32, Result<Option<Unpacked>>)>,
}

type Unpacking = oneshot::Receiver<(u32, Result<Option<Unpacked>>)>;

impl Store {
    /// Returns what a server has at a URL. Revalidates the cached copy, and downloads it if that is outdated.
    pub(super) async fn download(
        &self,
        url: &PlannedUrl,
        requested: Requested,
        progress: &Progress,
    ) -> Result<Obtained> {
        let key = Self::url_key(&url.url);
        let before = self.url_record(&url.url)?;
        let lock = Arc::new(self.wait_for_others(&key, url, progress).await?);
        // The download that we waited for may be the requested one.
        if let Some(promised) = url.sha256
            && let Some(got) = self.cached(&promised, requested, progress).await?
        {
            return Ok(got);
        }
        let known = self.url_record(&url.url)?;
        let usable = match &known {
            Some(record) => match self.cached(&record.served, requested, progress).await {
                // What was received last time is not an image: the server may have the right one by now.
                Err(error) if error.kind() == ErrorKind::InvalidImage => None,
                cached => cached?,
            },
            None => None,
        };
        if let (Some(record), Some(got)) = (&known, &usable)
            && before.as_ref() != Some(record)
        {
            Self::verify(url, &record.served)?;
            return Ok(got.clone());
        }
        let job = Job { url, key: &key, lock, requested, progress };
        let mut from_scratch = false;
        loop {
            let conditional = known.as_ref().filter(|_| usable.is_some());
            let Some(received) = self.receive(&job, conditional, from_scratch).await? else {
                let (Some(record), Some(got)) = (known, usable) else {
                    return Err(Error::new(
                        ErrorKind::Protocol,
                        "the server reported unchanged content, but none is cached",
                    ));
                };
                Self::verify(url, &record.served)?;
                return Ok(got);
            };
            // Two transfers of different content were joined: download once more, without resuming.
            if received.resumed
                && !from_scratch
                && url.sha256.is_some_and(|expected| expected != received.served)
            {
                progress
                    .notice(format!("{}: the resumed download is damaged; starting over", masked(&url.url)));
                received.part.discard()?;
                from_scratch = true;
                continue;
            }
            let (store, url, progress) = (self.clone(), url.clone(), progress.clone());
            return blocking(move || store.ingest(&url, received, requested, &progress)).await;
        }
    }

    /// Waits until no other process or task downloads this, and reports their progress.
    async fn wait_for_others(&self, key: &str, url: &PlannedUrl, progress: &Progress) -> Result<FileLock> {
        let path = self.download_lock(key);
        let mut notified = false;
        loop {
            if let Some(lock) = FileLock::attempt(&path, Mode::Exclusive)? {
                return Ok(lock.transient());
            }
            if !notified {
                progress.notice(format!("waiting for another download of {}", masked(&url.url)));
                notified = true;
            }
            if let Ok(meta) = std::fs::metadata(self.part_path(key)) {
                progress.bytes(&task(url), meta.len(), None);
            }
            time::sleep(LOCK_POLL_INTERVAL).await;
        }
    }

    /// Receives all bytes. `None`: the server's content is still what `known` describes.
    async fn receive(
        &self,
        job: &Job<'_>,
        known: Option<&UrlRecord>,
        from_scratch: bool,
    ) -> Result<Option<Received>> {
        let Job { url, requested, progress, .. } = *job;
        let client = self.client()?;
        let boot_id = process::boot_id()?;
        let mut part = {
            let (store, key, lock) = (self.clone(), job.key.to_owned(), job.lock.clone());
            let trusted = url.sha256.is_some();
            blocking(move || {
                let mut part = PartialDownload::open(&store, &key, trusted, lock)?;
                if from_scratch {
                    part.restart(None)?;
                }
                Ok(part)
            })
            .await?
        };
        if part.was_damaged() {
            progress
                .notice(format!("{}: the partial download was modified; starting over", masked(&url.url)));
        }
        let stop = Stop::default();
        let _stop = stop.on_drop();
        let growth = part.growth();
        let _end = EndOnDrop(growth.clone());
        let mut unpacking = match requested {
            Requested::Image { disk } => Some(self.unpack_while_downloading(&part, disk, progress, &stop)?),
            Requested::File => None,
        };
        let mut unpacked = None;
        let mut resumed = false;
        let (mut failures, mut furthest) = (0, part.len());
        let mut backoff = self.options().backoff;
        loop {
            let (from, restarts) = (part.len(), growth.restarts());
            let known = known.filter(|_| from == 0);
            let attempt = async {
                let origin = part.origin().cloned();
                let kind = match (&origin, known.map(|record| &record.validator)) {
                    (Some(origin), _) if from > 0 => match &origin.if_range {
                        Some(if_range) => RequestKind::Rest { from, if_range },
                        None => RequestKind::All,
                    },
                    (_, Some(Validator::Http { etag, last_modified }))
                        if etag.is_some() || last_modified.is_some() =>
                    {
                        RequestKind::IfChanged {
                            etag: etag.as_deref(),
                            last_modified: last_modified.as_deref(),
                        }
                    }
                    _ => RequestKind::All,
                };
                let reply =
                    http::request(client, &url.url, kind, origin.as_ref(), self.options(), &boot_id).await;
                match reply {
                    Ok(reply) => self.transfer(part, reply, url, progress).await,
                    Err(failure) => Ok((part, Err(failure))),
                }
            };
            tokio::pin!(attempt);
            let (back, outcome) = loop {
                let Some(handle) = &mut unpacking else { break attempt.await? };
                let early = tokio::select! {
                    ended = &mut attempt => break ended?,
                    early = handle => unpacking_result(early)?,
                };
                unpacking = None;
                // No need to receive what does not fit on the host or on the disk. All other errors are judged when the
                // checksum is compared.
                match early {
                    (_, Err(error))
                        if matches!(error.kind(), ErrorKind::HostDiskFull | ErrorKind::InvalidInput) =>
                    {
                        return Err(error);
                    }
                    early => unpacked = Some(early),
                }
            };
            part = back;
            let failure = match outcome {
                Ok(Transferred::NotModified) => {
                    part.discard()?;
                    return Ok(None);
                }
                Ok(Transferred::Complete) => {
                    resumed = growth.restarts() == restarts && (resumed || from > 0);
                    break;
                }
                Err(failure) => failure,
            };
            resumed = growth.restarts() == restarts && (resumed || from > 0);
            if !failure.error.is_retryable() {
                if part.len() == 0 || !part.is_resumable() {
                    part.discard()?;
                }
                return Err(failure.error);
            }
            if part.len() >= furthest + SIGNIFICANT_PROGRESS {
                failures = 0;
                backoff = self.options().backoff;
            }
            furthest = furthest.max(part.len());
            failures += 1;
            if failures >= self.options().attempts {
                if part.len() == 0 || !part.is_resumable() {
                    part.discard()?;
                }
                return Err(attempts_exhausted(failure.error, failures, &part));
            }
            if failure.start_over || !part.is_resumable() {
                part = blocking(move || {
                    part.restart(None)?;
                    Ok(part)
                })
                .await?;
                resumed = false;
            }
            progress.notice(format!(
                "{}: {}; retrying from {}",
                masked(&url.url),
                failure.error,
                human(part.len())
            ));
            time::sleep(failure.retry_after.unwrap_or_default().max(backoff)).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
        growth.end(true);
        if let Some(handle) = unpacking {
            unpacked = Some(unpacking_result(handle.await)?);
        }
        let served = part.digest();
        Ok(Some(Received { part, served, resumed, unpacked }))
    }

    /// Stores what a server sends.
    async fn transfer(
        &self,
        mut part: PartialDownload,
        reply: ServerReply,
        url: &PlannedUrl,
        progress: &Progress,
    ) -> Result<(PartialDownload, Result<Transferred, Failure>)> {
        let mut response = match reply {
            ServerReply::NotModified => return Ok((part, Ok(Transferred::NotModified))),
            ServerReply::NoRest => return Ok((part, Ok(Transferred::Complete))),
            ServerReply::Rest(response) => response,
            ServerReply::All(response, origin) => {
                part = blocking(move || {
                    part.restart(Some(*origin))?;
                    Ok(part)
                })
                .await?;
                response
            }
        };
        let total = part.origin().and_then(|origin| origin.total);
        if let Err(error) = check_free_space(part.path(), part.len(), total) {
            return Ok((part, Err(error.into())));
        }
        let task = task(url);
        let mut done = part.len();
        progress.bytes(&task, done, total);
        let (sender, receiver) = mpsc::channel::<Bytes>(QUEUE_LENGTH);
        let writer = tokio::task::spawn_blocking(move || part.append(receiver));
        let stall = self.options().stall_timeout;
        let received = loop {
            match time::timeout(stall, response.chunk()).await {
                Ok(Ok(Some(bytes))) => {
                    done += bytes.len() as u64;
                    if total.is_some_and(|total| done > total) {
                        break Err(Error::new(
                            ErrorKind::Download,
                            format!("expected {} bytes, but found more", total.unwrap_or_default()),
                        ));
                    }
                    // Closed: the writer failed, and its error is returned below.
                    if sender.send(bytes).await.is_err() {
                        break Ok(());
                    }
                    progress.bytes(&task, done, total);
                }
                Ok(Ok(None)) => break Ok(()),
                Ok(Err(error)) => break Err(http::transfer_error(error)),
                Err(_) => {
                    break Err(Error::new(
                        ErrorKind::Download,
                        format!("the server sent nothing for {} s", stall.as_secs_f64()),
                    ));
                }
            }
        };
        drop(sender);
        let (part, written) = join_result(writer.await)?;
        let complete = match total {
            Some(total) if part.len() != total => Err(Error::new(
                ErrorKind::Download,
                format!("expected {total} bytes, but found {}", part.len()),
            )),
            _ => Ok(Transferred::Complete),
        };
        let outcome = written.and(received).and(complete).map_err(Failure::from);
        Ok((part, outcome))
    }

    /// Unpacks a download while it arrives, on a thread of its own.
    fn unpack_while_downloading(
        &self,
        part: &PartialDownload,
        disk: Option<u64>,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<Unpacking> {
        let (store, path, growth) = (self.clone(), part.path().to_owned(), part.growth());
        let (progress, stop) = (progress.clone(), stop.clone());
        let (sender, receiver) = oneshot::channel();
        let work = move || {
            let mut follower = match growth.follow(&path) {
                Ok(follower) => follower,
                Err(error) => return (growth.restarts(), Err(error)),
            };
            let restarts = follower.restarts();
            let mut head = Vec::new();
            let read = follower.by_ref().take(Packing::MAGIC_LENGTH as u64).read_to_end(&mut head);
            let outcome = match (read, Packing::recognise(&head)) {
                (Err(error), _) => Err(unpack::read_error(error)),
                (Ok(_), None) => Ok(None),
                (Ok(_), Some(packing)) => {
                    let source = Cursor::new(head).chain(follower);
                    unpack::unpack(&store, packing, source, disk, &progress, &stop).map(Some)
                }
            };
            (restarts, outcome)
        };
        // Not a thread of the runtime's pool: it waits for the writer, which needs one of those.
        std::thread::Builder::new()
            .name("rudder-unpack".into())
            .spawn(move || sender.send(work()))
            .map_err(|error| Error::io("start a thread", error))?;
        Ok(receiver)
    }
}

/// Returns the name of the task under which progress is reported.
fn task(url: &PlannedUrl) -> String {
    format!("download {}", masked(&url.url))
}

/// Returns the result of the unpacking thread, or an error if it panicked.
fn unpacking_result<T>(result: std::result::Result<T, oneshot::error::RecvError>) -> Result<T> {
    result.map_err(|error| {
        Error::new(ErrorKind::Internal, "the unpacking thread ended without a result").with_source(error)
    })
}

/// Returns the result of work on another thread.
fn join_result<T>(result: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => {
            Err(Error::new(ErrorKind::Cancelled, "the async runtime is shutting down").with_source(error))
        }
    }
}

/// Fails at once if the rest would not fit on the disk.
fn check_free_space(path: &Path, len: u64, total: Option<u64>) -> Result<()> {
    let dir = durable::parent(path);
    let (Some(total), Ok(stat)) = (total, rustix::fs::statvfs(dir)) else { return Ok(()) };
    let (needed, free) = (total.saturating_sub(len), stat.f_bavail.saturating_mul(stat.f_frsize));
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::HostDiskFull,
        format!("expected {} of free space in {}, but found {}", human(needed), dir.display(), human(free)),
    )
    .with_help(durable::FREE_SPACE_HELP))
}

fn attempts_exhausted(cause: Error, attempts: u32, part: &PartialDownload) -> Error {
    let times = if attempts == 1 { "1 attempt".to_owned() } else { format!("{attempts} attempts") };
    let error = Error::new(cause.kind(), format!("the download failed after {times}"));
    let help = match cause.help() {
        Some(help) => help.to_owned(),
        None if part.len() > 0 && part.is_resumable() => {
            format!(
                "try again later: the download resumes after the {} that were received",
                human(part.len())
            )
        }
        None => "try again later".to_owned(),
    };
    error.with_help(help).with_source(cause)
}
