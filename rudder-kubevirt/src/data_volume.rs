//! Volumes that CDI fills: how one is requested, and how it is waited for.

use crate::{
    cluster::Cluster,
    errors::request_failed,
    objects::{DataVolume, condition},
};
use futures::TryStreamExt as _;
use kube::{
    ResourceExt as _,
    api::ObjectMeta,
    runtime::{WatchStreamExt as _, watcher},
};
use rudder_core::{Error, ErrorKind, Result, backend::Progress};
use serde_json::{Value, json};

/// Makes CDI fill a volume at once, also where the storage class waits for the first machine that uses it.
const IMMEDIATE: &str = "cdi.kubevirt.io/storage.bind.immediate.requested";
/// Attempts of CDI after which a failure that may be temporary counts as permanent.
const ATTEMPTS: u32 = 3;

/// What a volume is filled with.
#[derive(Debug, Clone)]
pub(crate) enum Filling {
    /// Zeros.
    Blank,
    /// The content of a URL.
    Http {
        url: String,
        /// `sha256:HEX`.
        checksum: Option<String>,
    },
    /// The disk in a containerDisk.
    Registry {
        /// `docker://REFERENCE`.
        url: String,
    },
    /// A copy of another volume.
    Volume { namespace: String, name: String },
}

/// Returns a volume to create. `size` is in bytes.
pub(crate) fn data_volume(
    mut metadata: ObjectMeta,
    filling: &Filling,
    size: u64,
    storage_class: Option<&str>,
) -> DataVolume {
    metadata.annotations.get_or_insert_default().insert(IMMEDIATE.to_owned(), "true".to_owned());
    let source = match filling {
        Filling::Blank => json!({"blank": {}}),
        Filling::Http { url, checksum: None } => json!({"http": {"url": url}}),
        Filling::Http { url, checksum: Some(checksum) } => {
            json!({"http": {"url": url, "checksum": checksum}})
        }
        Filling::Registry { url } => json!({"registry": {"url": url}}),
        Filling::Volume { namespace, name } => json!({"pvc": {"namespace": namespace, "name": name}}),
    };
    let mut storage = json!({"resources": {"requests": {"storage": size.to_string()}}});
    if let Some(class) = storage_class {
        storage["storageClassName"] = class.into();
    }
    DataVolume::new(metadata, json!({"source": source, "storage": storage}))
}

/// Returns whether the cluster kept the checksum of an import: an older CDI does not know the field, and the API server drops it.
pub(crate) fn checks_content(volume: &DataVolume) -> bool {
    !volume.spec.pointer("/source/http/checksum").is_none_or(Value::is_null)
}

/// Waits until a volume is filled. Progress is reported in `total` bytes under `task`, if there is one.
pub(crate) async fn filled(
    cluster: &Cluster,
    name: &str,
    what: &str,
    progress: &Progress,
    task: Option<(&str, u64)>,
) -> Result<DataVolume> {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let events = watcher(cluster.api::<DataVolume>(), config).default_backoff();
    let mut events = std::pin::pin!(events);
    let mut seen = None;
    let mut done = 0;
    loop {
        let event = match events.try_next().await {
            Ok(event) => event,
            // The watcher repeats what failed for a while; what will not change is reported.
            Err(watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) => {
                if let kube::Error::Api(status) = &error
                    && (400..500).contains(&status.code)
                    && status.code != 429
                {
                    return Err(request_failed(error, &format!("watch {what}")));
                }
                continue;
            }
            Err(_) => continue,
        };
        let volume = match event {
            Some(watcher::Event::Apply(volume) | watcher::Event::InitApply(volume)) => volume,
            Some(watcher::Event::Init) => continue,
            Some(watcher::Event::InitDone) if seen.is_some() => continue,
            Some(watcher::Event::InitDone | watcher::Event::Delete(_)) | None => {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("expected {what} to be filled, but it was deleted"),
                ));
            }
        };
        seen = Some(volume.name_any());
        if volume.metadata.deletion_timestamp.is_some() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("expected {what} to be filled, but it was deleted"),
            ));
        }
        if let Some(error) = failure(&volume, what) {
            return Err(error);
        }
        let status = volume.status.clone().unwrap_or_default();
        let finished = status.phase == "Succeeded";
        if let Some((task, total)) = task {
            let now = if finished { total } else { part(&status.progress, total) };
            if now > done || finished {
                done = done.max(now);
                progress.bytes(task, done, Some(total));
            }
        }
        if finished {
            return Ok(volume);
        }
    }
}

/// Returns how many of `total` bytes a progress such as `42.01%` is. Less than all: only the phase says that all is done.
fn part(progress: &str, total: u64) -> u64 {
    let percent: f64 = progress.trim_end_matches('%').parse().unwrap_or(0.0);
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bytes = (total as f64 * (percent / 100.0).clamp(0.0, 1.0)) as u64;
    bytes.min(total.saturating_sub(1))
}

/// Returns why a volume will not be filled, if that is certain. CDI repeats a failed import for ever, so its messages decide.
fn failure(volume: &DataVolume, what: &str) -> Option<Error> {
    let status = volume.status.as_ref()?;
    let running = condition(&status.conditions, "Running");
    let bound = condition(&status.conditions, "Bound");
    let said = |kind: ErrorKind, message: &str, help: &'static str| {
        Some(Error::new(kind, format!("cannot fill {what}: {}", message.trim())).with_help(help))
    };
    if let Some(bound) = bound
        && bound.status != "True"
    {
        let message = bound.message.to_lowercase();
        if message.contains("exceeded quota") {
            return said(
                ErrorKind::HostMissing,
                &bound.message,
                "free resources of the namespace, or raise its quota: kubectl describe resourcequota",
            );
        }
        if bound.reason == "ClaimLost" {
            return said(
                ErrorKind::Io,
                &bound.message,
                "check the storage of the cluster: kubectl get pvc,pv",
            );
        }
        if message.contains("no accessmode defined")
            || message.contains("storageprofile") && message.contains("missing")
        {
            return said(
                ErrorKind::HostMissing,
                &bound.message,
                "set a default storage class for virtual machines, or storageClass of the disk: kubectl get storageclass",
            );
        }
    }
    let message =
        running.filter(|running| running.status == "False").map_or("", |running| running.message.as_str());
    let text = message.to_lowercase();
    let failed = status.phase == "Failed";
    let permanent = running.is_some_and(|running| running.reason == "Error");
    if !failed && !permanent {
        return None;
    }
    if ["checksum", "sha256", "digest mismatch"].iter().any(|words| text.contains(words)) {
        return said(
            ErrorKind::ChecksumMismatch,
            message,
            "check the checksum in the manifest against the publisher's",
        );
    }
    if text.contains("404") || text.contains("not found") {
        return said(ErrorKind::NotFound, message, "check the URL: the cluster, not this host, requests it");
    }
    if text.contains("no space left") || text.contains("larger than the reported available") {
        return said(ErrorKind::InvalidInput, message, "raise the size of the disk in the manifest");
    }
    if text.contains("invalid image")
        || text.contains("unable to process data")
        || text.contains("image validation")
        || text.contains("not a valid")
    {
        return said(
            ErrorKind::InvalidImage,
            message,
            "CDI reads qcow2, raw, vmdk, vdi, vhd and vhdx, and raw images in gz and xz",
        );
    }
    if failed || status.restart_count >= ATTEMPTS {
        let message = if message.is_empty() { "it failed without a message" } else { message };
        return said(
            ErrorKind::Download,
            message,
            "look at the pod that imports it: kubectl get pods, kubectl logs",
        );
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::objects::{Condition, DataVolumeStatus};

    fn running(reason: &str, message: &str, restart_count: u32) -> DataVolume {
        let conditions = vec![Condition {
            kind: "Running".to_owned(),
            status: "False".to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
        }];
        let mut volume = data_volume(ObjectMeta::default(), &Filling::Blank, 1, None);
        volume.status = Some(DataVolumeStatus {
            phase: "ImportInProgress".to_owned(),
            conditions,
            restart_count,
            ..Default::default()
        });
        volume
    }

    #[test]
    fn a_failed_import_is_told_apart_by_its_message() {
        let kind = |volume: &DataVolume| failure(volume, "the disk").map(|error| error.kind());
        for (message, expected) in [
            (
                "Unable to connect to http data source: expected status code 200, got 404. Status: 404 Not Found",
                ErrorKind::NotFound,
            ),
            ("Unable to process data: checksum mismatch: expected a, got b", ErrorKind::ChecksumMismatch),
            (
                "Unable to process data: Virtual image size 2 is larger than the reported available storage 1. A larger PVC is required.",
                ErrorKind::InvalidInput,
            ),
            ("Unable to process data: qemu-img: not a valid image", ErrorKind::InvalidImage),
        ] {
            assert_eq!(kind(&running("Error", message, 1)), Some(expected), "{message}");
        }
        // What may pass is given a few attempts.
        assert_eq!(kind(&running("Error", "connection reset by peer", 2)), None);
        assert_eq!(kind(&running("Error", "connection reset by peer", 3)), Some(ErrorKind::Download));
        assert_eq!(kind(&running("Completed", "Import Complete", 0)), None);
    }

    #[test]
    fn progress_reaches_its_total_only_at_the_end() {
        assert_eq!(part("N/A", 1000), 0);
        assert_eq!(part("42.00%", 1000), 420);
        assert_eq!(part("100.0%", 1000), 999);
    }
}
