//! Imports: sources become volumes of a lab. The cluster downloads each source once, into a cached volume that labs share, and
//! every lab gets copies of its own.

use crate::{
    cluster::{Cluster, annotation, metadata},
    data_volume::{Filling, checks_content, data_volume, filled},
    errors::{is_conflict, request_failed},
    lab_context::LabContext,
    modules,
    names::{KEEP_UNTIL, Kind, NAME, SOURCE, VM, lab_labels, label_value, labels, object_name, selector},
    objects::DataVolume,
    probe::probe,
};
use k8s_openapi::{
    api::core::v1::PersistentVolumeClaim,
    apimachinery::pkg::api::resource::Quantity,
    jiff::{SignedDuration, Timestamp},
};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, PostParams, Preconditions},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{ImportRequest, Imported, Progress, ReapReport, Volume, VolumeKind},
    content::{Content, ContentId},
    digest::Digest,
    module::{InputRecord, InputRole},
    plan::{PlannedBuildRef, PlannedSource, PlannedUrl},
    secret::public_url,
    units,
};
use serde_json::json;
use std::time::Duration;

/// How long a cached import stays at least after its last use: nothing of an import or a copy that is in progress is removed.
const KEPT_AT_LEAST: Duration = Duration::from_secs(3600);

/// A source that labs share.
#[derive(Debug)]
struct Shared {
    filling: Filling,
    /// The source for people, without secrets.
    public: String,
    /// What identifies the import: the same for the same source.
    key: String,
    /// Size of the disk in bytes.
    size: u64,
    /// Size of the bytes as served, where known.
    served: Option<u64>,
    sha256: Option<Digest>,
}

/// Imports a source as a volume of the lab.
pub(crate) async fn import(
    lab: &LabContext,
    request: &ImportRequest,
    progress: &Progress,
) -> Result<Imported> {
    if request.kind == VolumeKind::Cdrom && !matches!(request.source, PlannedSource::Url(_)) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "expected the URL of a CD-ROM, but found another source",
        ));
    }
    let imported = match &request.source {
        PlannedSource::Blank => {
            let size = request.size.ok_or_else(|| {
                Error::new(ErrorKind::InvalidInput, "expected the size of a blank disk, but found none")
            })?;
            Imported::new(new_volume(lab, request, &Filling::Blank, size, progress).await?, None)
        }
        PlannedSource::Url(url) => {
            import_shared(lab, request, shared_url(url, request).await?, progress).await?
        }
        PlannedSource::ContainerDisk { image } => {
            import_shared(lab, request, shared_image(image, request)?, progress).await?
        }
        PlannedSource::BuildRef(parent) => import_module(lab, request, parent, progress).await?,
        PlannedSource::SourcePvc { name, namespace } => {
            import_claim(lab, request, name, namespace.as_deref(), progress).await?
        }
        other => {
            let message = format!("expected a source that the KubeVirt backend imports, but found {other:?}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    Ok(imported)
}

async fn shared_url(url: &PlannedUrl, request: &ImportRequest) -> Result<Shared> {
    let public = public_url(&url.url);
    match url.url.scheme() {
        "http" | "https" => {}
        scheme => {
            let message =
                format!("expected a URL that the cluster can request, but found {scheme}: in {public}");
            return Err(Error::new(ErrorKind::Unsupported, message)
                .with_help("serve the image over HTTP where the cluster reaches it"));
        }
    }
    if !url.url.username().is_empty() || url.url.password().is_some() {
        let message = format!("expected a URL without credentials, but found some in {public}");
        return Err(Error::new(ErrorKind::Unsupported, message)
            .with_help("everyone who may read volumes of the namespace could read them: serve the image to the cluster without"));
    }
    let probed = probe(&url.url).await?;
    let known = probed.and_then(|probed| probed.virtual_size);
    let wanted = (request.kind == VolumeKind::Disk).then_some(request.size).flatten();
    let size = known.or(wanted).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("expected the size of the disk, because the image does not say it: {public}"),
        )
        .with_help("set the size of the disk in the manifest")
    })?;
    let sha256 = url.sha256;
    Ok(Shared {
        filling: Filling::Http {
            url: url.url.to_string(),
            checksum: sha256.map(|digest| format!("sha256:{digest}")),
        },
        key: format!(
            "{}\0{}\0{}",
            url.url,
            sha256.map(|digest| digest.to_string()).unwrap_or_default(),
            size
        ),
        public,
        size,
        served: probed.and_then(|probed| probed.served),
        sha256,
    })
}

fn shared_image(image: &str, request: &ImportRequest) -> Result<Shared> {
    let size = request.size.ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("expected the size of the disk, because {image} does not say it"),
        )
        .with_help("set the size of the disk in the manifest")
    })?;
    let url = format!("docker://{image}");
    Ok(Shared {
        key: format!("{url}\0{size}"),
        filling: Filling::Registry { url: url.clone() },
        public: url,
        size,
        served: None,
        sha256: None,
    })
}

/// Imports a source once for all labs, and copies it.
async fn import_shared(
    lab: &LabContext,
    request: &ImportRequest,
    shared: Shared,
    progress: &Progress,
) -> Result<Imported> {
    let size = checked_size(request, shared.size)?;
    let cached = cached(lab, request, &shared, progress)
        .await
        .map_err(|error| error.with_context("source", &shared.public))?;
    let filling = Filling::Volume { namespace: lab.cluster.namespace().to_owned(), name: cached.name_any() };
    let volume = new_volume(lab, request, &filling, size, &Progress::none()).await?;
    let content = match shared.sha256 {
        Some(sha256) => Content::identified(ContentId::Sha256(sha256)),
        None => Content::identified(ContentId::Cluster(format!(
            "datavolume/{}",
            cached.uid().unwrap_or_default()
        ))),
    };
    let content = sized(content, shared.served);
    let role = match request.kind {
        VolumeKind::Cdrom => InputRole::Iso,
        _ => InputRole::source(&request.machine),
    };
    Ok(Imported::new(volume, InputRecord::new(role, shared.public, content)))
}

fn sized(mut content: Content, size: Option<u64>) -> Content {
    content.size = size;
    content
}

/// Returns the cached volume of a source, which is filled. Requests for the same source share it.
async fn cached(
    lab: &LabContext,
    request: &ImportRequest,
    shared: &Shared,
    progress: &Progress,
) -> Result<DataVolume> {
    let cluster = &lab.cluster;
    let name = object_name(&["cache", &shared.key]);
    // The readable part of the name would be the URL; the digest is enough.
    let name = format!("rudder-cache-{}", name.rsplit('-').next().unwrap_or_default());
    let now = lab.ownership.now().await?;
    let until = later(now, request.keep_for.max(KEPT_AT_LEAST));
    let annotations = [(SOURCE, shared.public.clone()), (KEEP_UNTIL, until.to_string())];
    let wanted = data_volume(
        metadata(&name, labels(Kind::Cache), annotations, None),
        &shared.filling,
        shared.size,
        None,
    );
    let what = "the import of a source";
    let found = match cluster.api::<DataVolume>().create(&PostParams::default(), &wanted).await {
        Ok(created) => created,
        Err(error) if is_conflict(&error) => {
            let found = cluster.find::<DataVolume>(&name, what).await?;
            let found = found.ok_or_else(|| {
                Error::new(ErrorKind::Conflict, "the import was removed meanwhile").with_retryable(true)
            })?;
            if kept_until(&found).is_none_or(|kept| kept < until) {
                let patch =
                    json!({"metadata": {"uid": found.uid(), "annotations": {KEEP_UNTIL: until.to_string()}}});
                cluster.patch::<DataVolume>(&name, &patch, what).await?
            } else {
                found
            }
        }
        Err(error) => return Err(request_failed(error, "import a source")),
    };
    if shared.sha256.is_some() && !checks_content(&found) {
        forget(cluster, &found).await?;
        return Err(Error::new(
            ErrorKind::Unsupported,
            "this version of CDI does not compare an import with its checksum",
        )
        .with_help(
            "update CDI, or remove the checksum from the manifest: the build is then not repeatable",
        ));
    }
    let task = format!("download {}", shared.public);
    let filled =
        filled(cluster, &name, what, progress, Some((&task, shared.served.unwrap_or(shared.size)))).await;
    if filled.is_err()
        && let Err(error) = forget(cluster, &found).await
    {
        // The next request finds the failed import, and fails the same way until it can be removed.
        tracing::debug!(error = %error.report(), name, "cannot remove a failed import");
    }
    filled
}

/// Deletes exactly this cached import.
async fn forget(cluster: &Cluster, volume: &DataVolume) -> Result<bool> {
    let parameters = DeleteParams {
        preconditions: Some(Preconditions { uid: volume.uid(), resource_version: None }),
        ..crate::cluster::background()
    };
    match cluster.api::<DataVolume>().delete(&volume.name_any(), &parameters).await {
        Ok(_) => Ok(true),
        Err(error) if is_conflict(&error) || crate::errors::is_not_found(&error) => Ok(false),
        Err(error) => Err(request_failed(error, "delete a cached import")),
    }
}

async fn import_module(
    lab: &LabContext,
    request: &ImportRequest,
    parent: &PlannedBuildRef,
    progress: &Progress,
) -> Result<Imported> {
    // Recorded first: a module that a living lab builds on is not removed.
    lab.ownership.builds_on(&parent.module).await?;
    let module = modules::exactly(&lab.cluster, parent).await?;
    let missing = |what: String| Error::new(ErrorKind::NotFound, what).with_context("module", &parent.module);
    let machine = module.machines.iter().find(|machine| machine.name == parent.vm);
    let machine = machine.ok_or_else(|| {
        missing(format!("expected module {} to have a VM {}, but it has none", parent.module, parent.vm))
    })?;
    let disk = match &request.parent_disk {
        Some(name) => machine.disks.iter().find(|disk| disk.name == *name),
        None => machine.disks.first(),
    };
    let wanted = request.parent_disk.as_deref().unwrap_or("for booting");
    let disk = disk.ok_or_else(|| {
        missing(format!("expected VM {} to have a disk {wanted}, but it has none", parent.vm))
    })?;
    let size = checked_size(request, disk.virtual_size)?;
    let filling = Filling::Volume { namespace: lab.cluster.namespace().to_owned(), name: disk.file.clone() };
    let volume = new_volume(lab, request, &filling, size, progress).await?;
    let url = format!("module {}/{}", parent.module, parent.vm);
    Ok(Imported::new(
        volume,
        InputRecord::new(InputRole::source(&request.machine), url, disk.content.clone()),
    ))
}

async fn import_claim(
    lab: &LabContext,
    request: &ImportRequest,
    name: &str,
    namespace: Option<&str>,
    progress: &Progress,
) -> Result<Imported> {
    let namespace = namespace.unwrap_or(lab.cluster.namespace());
    let api = kube::Api::<PersistentVolumeClaim>::namespaced(lab.cluster.client().clone(), namespace);
    let claim = api.get_opt(name).await.map_err(|error| request_failed(error, "read a volume"))?;
    let claim = claim.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("expected a PersistentVolumeClaim {namespace}/{name}, but there is none"),
        )
    })?;
    let size = checked_size(request, capacity(&claim).ok_or_else(|| {
        Error::new(ErrorKind::InvalidInput, format!("expected the PersistentVolumeClaim {namespace}/{name} to be bound, but it has no capacity"))
    })?)?;
    let filling = Filling::Volume { namespace: namespace.to_owned(), name: name.to_owned() };
    let volume = new_volume(lab, request, &filling, size, progress).await?;
    let content = Content::identified(ContentId::Cluster(format!(
        "persistentvolumeclaim/{}",
        claim.uid().unwrap_or_default()
    )));
    Ok(Imported::new(
        volume,
        InputRecord::new(InputRole::source(&request.machine), format!("pvc {namespace}/{name}"), content),
    ))
}

/// Returns the size of a volume in bytes, as bound.
fn capacity(claim: &PersistentVolumeClaim) -> Option<u64> {
    let Quantity(text) = claim.status.as_ref()?.capacity.as_ref()?.get("storage")?;
    text.parse::<units::Quantity>().ok().map(units::Quantity::ceil)
}

/// Returns the size that a volume gets, given that of its source.
fn checked_size(request: &ImportRequest, source: u64) -> Result<u64> {
    match request.size {
        Some(size) if size < source && request.kind == VolumeKind::Disk => {
            let message =
                format!("expected a size of at least {source} bytes, that of the source, but found {size}");
            Err(Error::new(ErrorKind::InvalidInput, message)
                .with_help("raise the size of the disk in the manifest"))
        }
        Some(size) if request.kind == VolumeKind::Disk => Ok(size),
        _ => Ok(source),
    }
}

/// Creates a volume of the lab, and waits until it is filled.
async fn new_volume(
    lab: &LabContext,
    request: &ImportRequest,
    filling: &Filling,
    size: u64,
    progress: &Progress,
) -> Result<Volume> {
    lab.check_open()?;
    let name = object_name(&[lab.id.as_str(), &request.machine, &request.disk, &lab.next().to_string()]);
    let mut labels = lab_labels(Kind::Volume, &lab.id, &lab.name);
    labels.insert(VM.to_owned(), label_value(&request.machine));
    let annotations = [(NAME, format!("{}/{}", request.machine, request.disk))];
    let wanted = data_volume(
        metadata(&name, labels, annotations, Some(lab.ownership.owner())),
        filling,
        size,
        lab.storage_class.as_deref(),
    );
    let what = format!("disk {} of VM {}", request.disk, request.machine);
    lab.cluster.create(&wanted, &what).await?;
    let task = format!("copy {what}");
    let task = matches!(filling, Filling::Volume { .. }).then_some((task.as_str(), size));
    filled(&lab.cluster, &name, &what, progress, task).await?;
    Ok(Volume::new(name, size))
}

/// Returns until when a cached import is kept, if it says so.
fn kept_until(volume: &DataVolume) -> Option<Timestamp> {
    annotation(&volume.metadata, KEEP_UNTIL)?.parse().ok()
}

fn later(now: Timestamp, by: Duration) -> Timestamp {
    let by = SignedDuration::try_from(by).unwrap_or(SignedDuration::MAX);
    now.checked_add(by).unwrap_or(Timestamp::MAX)
}

/// Removes cached imports that are no longer kept.
pub(crate) async fn collect(cluster: &Cluster) -> Result<ReapReport> {
    let mut report = ReapReport::default();
    let cached = cluster.list::<DataVolume>(&selector(Kind::Cache), "cached imports").await?;
    if cached.is_empty() {
        return Ok(report);
    }
    let now = cluster.now().await?;
    for volume in cached {
        let source = annotation(&volume.metadata, SOURCE).unwrap_or("an unknown source");
        match kept_until(&volume) {
            Some(until) if until >= now => {}
            Some(_) => match forget(cluster, &volume).await {
                Ok(true) => report.removed.push(format!("import of {source}")),
                Ok(false) => {}
                Err(error) => report.failed.push(error.report()),
            },
            None => report.warnings.push(format!(
                "the cached import {} does not say until when it is kept: delete it by hand",
                volume.name_any()
            )),
        }
    }
    Ok(report)
}
