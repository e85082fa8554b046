//! Fills the claim of a DataVolume: what CDI's importer and cloner pods do, with what CDI reports about them.

use super::{
    conditions::{Conditions, now},
    datavolumes::DataVolume,
    events::{self, Reporter, Severity},
    faults::Fault,
    objects::{self, ClaimSource, HttpSource, Key},
    shared::Shared,
    status,
    texts::{import_failure, innermost, wrong_status},
    volumes::{Origin, StoredVolume},
};
use http::StatusCode;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Progress, ProgressEvent},
    plan::{PlannedSource, PlannedUrl},
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Time between two reports of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// Time until a failed importer is started again, as the kubelet restarts containers: it doubles up to the limit.
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const BACKOFF_LIMIT: Duration = Duration::from_secs(300);

/// The imports that run, by the UID of their DataVolume.
#[derive(Debug, Default)]
pub(super) struct Imports {
    running: Mutex<HashMap<String, CancellationToken>>,
}

impl Imports {
    fn running(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether an import is to be started, and counts it as running.
    pub(super) fn begin(&self, uid: &str) -> bool {
        let mut running = self.running();
        let is_new = !running.contains_key(uid);
        if is_new {
            running.insert(uid.to_owned(), CancellationToken::new());
        }
        is_new
    }

    /// Runs an import that has [begun](Self::begin).
    pub(super) fn spawn(
        &self,
        shared: &Arc<Shared>,
        uid: &str,
        task: impl Future<Output = Result<()>> + Send + 'static,
    ) {
        let Some(cancelled) = self.running().get(uid).cloned() else { return };
        let (of, uid) = (shared.clone(), uid.to_owned());
        shared.spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                outcome = task => if let Err(error) = outcome {
                    tracing::debug!(%error, uid, "an import could not be completed");
                }
            }
            of.imports.running().remove(&uid);
        });
    }

    /// Returns whether an import runs.
    pub(super) fn runs(&self, uid: &str) -> bool {
        self.running().contains_key(uid)
    }

    /// Cancels the imports of DataVolumes that do not exist any more.
    pub(super) fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.running().iter().filter(|(uid, _)| !exists(uid)).for_each(|(_, cancelled)| cancelled.cancel());
    }

    /// Cancels an import, because its DataVolume was deleted.
    pub(super) fn cancel(&self, uid: &str) {
        if let Some(cancelled) = self.running().get(uid) {
            cancelled.cancel();
        }
    }
}

/// What is being done to fill a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Import,
    Clone,
}

impl Transfer {
    fn scheduled(self) -> &'static str {
        match self {
            Self::Import => "ImportScheduled",
            Self::Clone => "CloneScheduled",
        }
    }

    fn in_progress(self) -> &'static str {
        match self {
            Self::Import => "ImportInProgress",
            Self::Clone => "CloneInProgress",
        }
    }

    fn complete(self) -> &'static str {
        match self {
            Self::Import => "Import Complete",
            Self::Clone => "Clone Complete",
        }
    }
}

/// Writes the status of one DataVolume.
struct Report<'a> {
    shared: &'a Shared,
    volume: &'a DataVolume,
    transfer: Transfer,
    conditions: Conditions,
    restarts: u32,
}

impl Report<'_> {
    async fn write(
        &mut self,
        phase: &str,
        progress: &str,
        running: (&str, &str, &str),
        ready: &str,
    ) -> Result<()> {
        let name = &self.volume.key.name;
        self.conditions.set("Bound", "True", "Bound", &format!("PVC {name} Bound"));
        self.conditions.set("Running", running.0, running.1, running.2);
        let transferring = if running.0 == "True" { "TransferRunning" } else { "" };
        self.conditions.set("Ready", ready, transferring, "");
        let status = json!({
            "phase": phase,
            "progress": progress,
            "claimName": name,
            "restartCount": self.restarts,
            "conditions": with_heartbeats(self.conditions.clone().into_value()),
        });
        status::of_data_volume(self.shared, &self.volume.key, status).await.map(drop)
    }

    async fn event(&self, severity: Severity, reason: &str, message: &str) {
        let kind = objects::data_volumes();
        let event = (severity, reason, message);
        events::publish(self.shared, &*self.volume.object, &kind, Reporter::DataVolumes, event).await;
    }

    async fn scheduled(&mut self) -> Result<()> {
        self.write(self.transfer.scheduled(), "N/A", ("False", "ContainerCreating", ""), "False").await
    }

    async fn in_progress(&mut self) -> Result<()> {
        let (phase, name) = (self.transfer.in_progress(), &self.volume.key.name);
        let message = match self.transfer {
            Transfer::Import => format!("Import into {name} in progress"),
            Transfer::Clone => format!("Cloning into {} in progress", self.volume.key),
        };
        self.event(Severity::Normal, phase, &message).await;
        self.write(phase, "N/A", ("True", "Pod is running", ""), "False").await
    }

    async fn progress(&self, percent: f64) -> Result<()> {
        let status = json!({"progress": format!("{percent:.2}%")});
        status::of_data_volume(self.shared, &self.volume.key, status).await.map(drop)
    }

    async fn failed(&mut self, message: &str) -> Result<()> {
        self.event(Severity::Warning, "Error", message).await;
        self.write(self.transfer.in_progress(), "N/A", ("False", "Error", message), "False").await
    }

    async fn succeeded(&mut self) -> Result<()> {
        let name = &self.volume.key.name;
        let (reason, message) = match self.transfer {
            Transfer::Import => ("ImportSucceeded", format!("Successfully imported into PVC {name}")),
            Transfer::Clone => ("CloneSucceeded", format!("Successfully cloned into {}", self.volume.key)),
        };
        self.event(Severity::Normal, reason, &message).await;
        let complete = self.transfer.complete();
        self.write("Succeeded", "100.0%", ("False", "Completed", complete), "True").await
    }
}

/// CDI also writes when it looked at a condition last.
fn with_heartbeats(mut conditions: Value) -> Value {
    for condition in conditions.as_array_mut().into_iter().flatten() {
        condition["lastHeartbeatTime"] = now().into();
    }
    conditions
}

/// Fills the claim of a DataVolume, and tries again as often as it fails.
pub(super) async fn run(shared: Arc<Shared>, volume: DataVolume, claim_uid: String, size: u64) -> Result<()> {
    let source = &volume.spec.source;
    let transfer = if source.pvc.is_some() { Transfer::Clone } else { Transfer::Import };
    let conditions = Conditions::of(&volume.object);
    let mut report = Report { shared: &shared, volume: &volume, transfer, conditions, restarts: 0 };
    report.scheduled().await?;
    let Some((filler, url)) = filler(&mut report, size).await? else {
        // What cannot succeed is not tried again, and stays as it is until the DataVolume is deleted.
        return std::future::pending().await;
    };
    let of_http = if url.is_empty() { None } else { Some(&volume.key.namespace) };
    let status = of_http.and_then(|namespace| {
        shared.faults.take(namespace, |fault| match fault {
            Fault::ImportFails { status } => Some(*status),
            _ => None,
        })
    });
    let mut backoff = FIRST_BACKOFF;
    loop {
        report.in_progress().await?;
        let stored = |origin| StoredVolume::new(volume.key.clone(), claim_uid.clone(), size, origin);
        let outcome = match status {
            Some(status) => Err(wrong_status(&with_reason(status))),
            None => filled(&report, &filler, stored).await.map_err(|error| match transfer {
                Transfer::Import => import_failure(&error, &url, size),
                Transfer::Clone => format!("Unable to clone data: {}", innermost(&error)),
            }),
        };
        let message = match outcome {
            Ok(content) => {
                shared.volumes.insert(content);
                return report.succeeded().await;
            }
            Err(message) => message,
        };
        report.failed(&message).await?;
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_LIMIT);
        report.restarts += 1;
    }
}

/// What a claim is filled from.
enum Filler {
    /// A source that the node imports.
    Source(PlannedSource),
    /// The volume of another claim.
    Claim(Arc<StoredVolume>),
}

/// Finds out what to fill a claim from, with the URL if there is one. Returns `None` when it cannot be filled, which was reported.
async fn filler(report: &mut Report<'_>, size: u64) -> Result<Option<(Filler, String)>> {
    let volume = report.volume;
    let source = &volume.spec.source;
    if let Some(from) = &source.pvc {
        let from = source_volume(report, from, size).await?;
        return Ok(from.map(|from| (Filler::Claim(from), String::new())));
    }
    match (&source.http, &source.blank) {
        (Some(http), _) => match planned(http) {
            Ok(url) => return Ok(Some((Filler::Source(PlannedSource::Url(url)), http.url.clone()))),
            Err(error) => report.failed(&format!("Unable to process data: {error}")).await?,
        },
        (None, Some(_)) => return Ok(Some((Filler::Source(PlannedSource::Blank), String::new()))),
        (None, None) => {
            let message = "Unable to process data: the double of CDI has no importer for this source";
            report.failed(message).await?;
        }
    }
    Ok(None)
}

/// Waits until the claim to copy has content and nothing uses it.
async fn source_volume(
    report: &mut Report<'_>,
    from: &ClaimSource,
    size: u64,
) -> Result<Option<Arc<StoredVolume>>> {
    let (volumes, to) = (&report.shared.volumes, &report.volume.key);
    let from = Key::new(from.namespace.as_ref().unwrap_or(&to.namespace), &from.name);
    if volumes.get(&from).is_none() {
        let message = format!("The source pvc {} doesn't exist", from.name);
        report.event(Severity::Warning, "CloneWithoutSource", &message).await;
    }
    let Some(source) = volumes.wait_for(&from).await else { return Ok(None) };
    if size < source.size {
        let message = "The clone doesn't meet the validation requirements: target resources requests storage size is smaller than the source";
        report.event(Severity::Warning, "CloneValidationFailed", message).await;
        report.write("Pending", "N/A", ("False", "CloneValidationFailed", message), "False").await?;
        return Ok(None);
    }
    if let Some(pod) = source.user() {
        let message = format!("pod {}/{pod} using PersistentVolumeClaim {}", from.namespace, from.name);
        report.event(Severity::Warning, "CloneSourceInUse", &message).await;
        source.unused().await;
    }
    Ok(Some(source))
}

/// Creates the content of a claim on the node.
async fn filled(
    report: &Report<'_>,
    filler: &Filler,
    stored: impl Fn(Origin) -> StoredVolume,
) -> Result<StoredVolume> {
    let node = &report.shared.node;
    report.shared.faults.storage(&report.volume.key.namespace).await;
    let origin = match filler {
        Filler::Source(source) => Origin::Disk(source.clone(), None),
        Filler::Claim(from) => {
            with_progress(report, |progress| async move { from.copy(node, &progress).await }).await?
        }
    };
    let content = stored(origin);
    let filling = &content;
    with_progress(report, |progress| async move { filling.fill(node, &progress).await }).await?;
    Ok(content)
}

/// Does something whose progress is written into the status meanwhile.
async fn with_progress<T, F: Future<Output = Result<T>>>(
    report: &Report<'_>,
    work: impl FnOnce(Progress) -> F,
) -> Result<T> {
    let (percent, mut seen) = watch::channel(0.0_f64);
    let progress = Progress::new(move |event| {
        if let ProgressEvent::Bytes { done, total: Some(total), .. } = event
            && total > 0
        {
            #[allow(clippy::cast_precision_loss, reason = "a percentage needs no 53 bits")]
            let now = done as f64 * 100.0 / total as f64;
            percent.send_if_modified(|last| {
                let grew = now > *last;
                *last = last.max(now);
                grew
            });
        }
    });
    let mut work = pin!(work(progress));
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            Ok(()) = seen.changed() => {}
        }
        let percent = *seen.borrow_and_update();
        // A write that has begun is completed: it must not overtake the next one.
        let mut write = pin!(report.progress(percent));
        tokio::select! {
            outcome = &mut work => {
                let _ = write.await;
                return outcome;
            }
            _ = &mut write => {}
        }
        tokio::select! {
            outcome = &mut work => return outcome,
            () = tokio::time::sleep(PROGRESS_INTERVAL) => {}
        }
    }
}

fn planned(http: &HttpSource) -> Result<PlannedUrl> {
    let url = http.url.parse().map_err(|error| {
        Error::new(ErrorKind::InvalidInput, format!("unable to parse endpoint {:?}", http.url))
            .with_source(error)
    })?;
    let sha256 = match &http.checksum {
        None => None,
        Some(checksum) => {
            Some(checksum.strip_prefix("sha256:").and_then(|hex| hex.parse().ok()).ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("expected a checksum sha256:HEX, but found {checksum:?}"),
                )
            })?)
        }
    };
    Ok(PlannedUrl::new(url).sha256(sha256))
}

/// Writes a status code with its reason phrase.
fn with_reason(status: u16) -> String {
    let reason = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    format!("{status} {}", reason.unwrap_or("Unknown"))
}
