//! The lease of a lab: who owns it, until when, and how long it lives.
//!
//! The owner renews the lease while it lives. A lab whose lease has expired is reaped, from any host. All times are those of the API
//! server, so that a wrong clock of a host neither kills a lab nor keeps one.

use crate::{
    cluster::{Cluster, annotation, created_at, metadata},
    errors::{is_conflict, is_not_found, request_failed},
    names::{Kind, NAME, PARENTS, RETENTION, lab_labels, object_name, selector},
};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference},
    jiff::{SignedDuration, Timestamp},
};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    core::Resource as _,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabId, LabInfo, LabSpec, LabState, Retention},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The parts of a lease's duration after which it is renewed.
const RENEWALS: u32 = 4;

/// How long a lab lives, as its lease says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Lifetime {
    /// Whether the lab may be kept.
    pub(crate) keepable: bool,
    /// Whether the lab outlives its owner.
    pub(crate) kept: bool,
    /// When a kept lab expires; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires: Option<SystemTime>,
}

impl Lifetime {
    /// The lifetime of a lab while it is opened, and until its owner keeps it.
    pub(crate) fn of(retention: Retention) -> Self {
        Self { keepable: retention != Retention::EndWithOwner, kept: false, expires: None }
    }
}

/// Returns the name of a lab's lease.
pub(crate) fn lease_name(lab: &LabId) -> String {
    object_name(&["lab", lab.as_str()])
}

/// A lease that this process holds or, for an attached lab, only knows.
#[derive(Debug)]
pub(crate) struct Ownership {
    cluster: Cluster,
    name: String,
    owner: OwnerReference,
    clock: Option<Clock>,
    lifetime: Mutex<Lifetime>,
    parents: tokio::sync::Mutex<BTreeSet<String>>,
    /// Why the lab was lost, once it was.
    lost: watch::Receiver<Option<String>>,
    renewal: Mutex<Option<DropGuard>>,
}

impl Ownership {
    /// Creates the lease of a new lab, and renews it from then on.
    pub(crate) async fn take(cluster: &Cluster, spec: &LabSpec, duration: Duration) -> Result<Arc<Self>> {
        let lifetime = Lifetime::of(spec.retention);
        let name = lease_name(&spec.id);
        let annotations =
            [(NAME, spec.name.clone()), (RETENTION, encode(&lifetime)?), (PARENTS, "[]".to_owned())];
        let seconds = i32::try_from(duration.as_secs().max(1)).unwrap_or(i32::MAX);
        let lease = Lease {
            metadata: metadata(&name, lab_labels(Kind::Lab, &spec.id, &spec.name), annotations, None),
            spec: Some(LeaseSpec {
                holder_identity: Some(holder()),
                lease_duration_seconds: Some(seconds),
                ..LeaseSpec::default()
            }),
        };
        let began = Instant::now();
        let created = cluster.api::<Lease>().create(&Default::default(), &lease).await;
        let created = created.map_err(|error| match is_conflict(&error) {
            true => Error::new(
                ErrorKind::Conflict,
                format!("expected the lab id {} to be free, but a lab has it", spec.id),
            ),
            false => request_failed(error, "open a lab"),
        })?;
        let clock = Clock { server: created_at(&created.metadata)?, local: began };
        let (reason, lost) = watch::channel(None);
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let ownership = Self::new(cluster, created, lifetime, lost, Some((clock, guard)))?;
        let renewal = Renewal {
            cluster: cluster.clone(),
            name,
            uid: ownership.owner.uid.clone(),
            duration,
            clock,
            reason,
        };
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = renewal.run() => {}
            }
        });
        Ok(ownership)
    }

    /// Returns the lease of a kept lab, of which this process is not the owner.
    pub(crate) fn of_kept(cluster: &Cluster, lease: Lease) -> Result<Arc<Self>> {
        let lifetime = lifetime(&lease).ok_or_else(|| damaged(&lease))?;
        let (_, lost) = watch::channel(None);
        Self::new(cluster, lease, lifetime, lost, None)
    }

    fn new(
        cluster: &Cluster,
        lease: Lease,
        lifetime: Lifetime,
        lost: watch::Receiver<Option<String>>,
        renewal: Option<(Clock, DropGuard)>,
    ) -> Result<Arc<Self>> {
        let (clock, renewal) = renewal.unzip();
        let owner = lease.owner_ref(&()).ok_or_else(|| damaged(&lease))?;
        let parents = annotation(&lease.metadata, PARENTS).and_then(|text| serde_json::from_str(text).ok());
        Ok(Arc::new(Self {
            cluster: cluster.clone(),
            name: lease.name_any(),
            owner,
            clock,
            lifetime: Mutex::new(lifetime),
            parents: tokio::sync::Mutex::new(parents.unwrap_or_default()),
            lost,
            renewal: Mutex::new(renewal),
        }))
    }

    /// Returns the reference that makes the lease the owner of an object.
    pub(crate) fn owner(&self) -> &OwnerReference {
        &self.owner
    }

    /// Returns the time of the API server.
    pub(crate) async fn now(&self) -> Result<Timestamp> {
        match &self.clock {
            Some(clock) => Ok(clock.now()),
            None => self.cluster.now().await,
        }
    }

    pub(crate) fn lifetime(&self) -> Lifetime {
        *self.lifetime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the lab builds on a module.
    pub(crate) async fn builds_on(&self, module: &str) -> Result<()> {
        let mut parents = self.parents.lock().await;
        if parents.contains(module) {
            return Ok(());
        }
        let mut all = parents.clone();
        all.insert(module.to_owned());
        self.annotate(PARENTS, &encode(&all)?).await?;
        *parents = all;
        Ok(())
    }

    /// Lets the lab outlive this process, until it is removed or has expired.
    pub(crate) async fn keep(&self, expires: Option<SystemTime>) -> Result<()> {
        let kept = Lifetime { kept: true, expires, ..self.lifetime() };
        self.annotate(RETENTION, &encode(&kept)?).await?;
        *self.lifetime.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        // A kept lab lives without a renewed lease.
        self.stop_renewing();
        Ok(())
    }

    async fn annotate(&self, key: &str, value: &str) -> Result<()> {
        // The UID guards against a lease of the same name that another process made after this one was taken away.
        let patch = json!({"metadata": {"uid": self.owner.uid, "annotations": {key: value}}});
        self.cluster.patch::<Lease>(&self.name, &patch, "the lease of the lab").await.map(drop)
    }

    /// Waits until the lab was lost, and returns why. Never completes for a lab that cannot be lost.
    pub(crate) async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        let reason = lost.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    pub(crate) fn stop_renewing(&self) {
        drop(self.renewal.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Stops renewing, and deletes the lease and with it what it owns.
    pub(crate) async fn give_up(&self) -> Result<()> {
        self.stop_renewing();
        self.cluster.delete::<Lease>(&self.name, "the lease of the lab").await.map(drop)
    }
}

/// The time of the API server, read once, and the moment at which it was read.
#[derive(Debug, Clone, Copy)]
struct Clock {
    server: Timestamp,
    local: Instant,
}

impl Clock {
    fn now(&self) -> Timestamp {
        let passed = SignedDuration::try_from(self.local.elapsed()).unwrap_or(SignedDuration::ZERO);
        self.server.checked_add(passed).unwrap_or(Timestamp::MAX)
    }
}

/// What renews a lease.
struct Renewal {
    cluster: Cluster,
    name: String,
    uid: String,
    duration: Duration,
    clock: Clock,
    reason: watch::Sender<Option<String>>,
}

impl Renewal {
    /// Renews the lease until it is lost.
    async fn run(self) {
        let mut renewed = self.clock.local;
        let mut pause = Duration::ZERO;
        loop {
            tokio::time::sleep(pause).await;
            let began = Instant::now();
            let left = self.duration.saturating_sub(renewed.elapsed());
            let lost = match tokio::time::timeout(left, self.renew()).await {
                Ok(Ok(())) => {
                    renewed = began;
                    pause = self.duration / RENEWALS;
                    continue;
                }
                Ok(Err(error)) if is_not_found(&error) || is_conflict(&error) => {
                    "another process removed it, because its lease had expired".to_owned()
                }
                Ok(Err(error)) if !left.is_zero() => {
                    tracing::debug!(%error, lease = self.name, "cannot renew the lease of a lab");
                    pause = (self.duration / (4 * RENEWALS)).min(left);
                    continue;
                }
                _ => format!("its lease was not renewed for {:?}: the cluster did not answer", self.duration),
            };
            self.reason.send_replace(Some(lost));
            return;
        }
    }

    async fn renew(&self) -> Result<(), kube::Error> {
        let patch =
            json!({"metadata": {"uid": self.uid}, "spec": {"renewTime": MicroTime(self.clock.now())}});
        let api = self.cluster.api::<Lease>();
        api.patch(&self.name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
    }
}

/// The lease of a lab, as any process reads it.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) lease: Lease,
    pub(crate) info: LabInfo,
    pub(crate) parents: BTreeSet<String>,
}

/// Lists the labs, sorted by id.
pub(crate) async fn labs(cluster: &Cluster) -> Result<Vec<Listed>> {
    let leases = cluster.list::<Lease>(&selector(Kind::Lab), "labs").await?;
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let now = cluster.now().await?;
    let mut labs: Vec<Listed> = leases.into_iter().filter_map(|lease| listed(lease, now)).collect();
    labs.sort_by(|a, b| a.info.id.cmp(&b.info.id));
    Ok(labs)
}

/// Finds a lab by its id.
pub(crate) async fn lab(cluster: &Cluster, id: &LabId) -> Result<Listed> {
    let lease = cluster.find::<Lease>(&lease_name(id), "the lease of a lab").await?;
    let missing = || Error::new(ErrorKind::NotFound, format!("expected a lab {id}, but there is none"));
    let lease = lease.ok_or_else(missing)?;
    let now = cluster.now().await?;
    listed(lease, now).ok_or_else(missing)
}

/// Deletes the lease of an abandoned lab, and with it what it owns, unless its owner has renewed it meanwhile. Returns whether it
/// was deleted.
pub(crate) async fn remove_unrenewed(cluster: &Cluster, lease: &Lease) -> Result<bool> {
    let preconditions = Preconditions {
        uid: lease.metadata.uid.clone(),
        resource_version: lease.metadata.resource_version.clone(),
    };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..crate::cluster::background() };
    match cluster.api::<Lease>().delete(&lease.name_any(), &parameters).await {
        Ok(_) => Ok(true),
        Err(error) if is_not_found(&error) || is_conflict(&error) => Ok(false),
        Err(error) => Err(request_failed(error, "delete the lease of a lab")),
    }
}

fn listed(lease: Lease, now: Timestamp) -> Option<Listed> {
    let id = LabId::parse(lease.labels().get(crate::names::LAB)?).ok()?;
    let name = annotation(&lease.metadata, NAME).unwrap_or_default();
    let info = LabInfo::new(id, name, state(&lease, now));
    let parents = annotation(&lease.metadata, PARENTS).and_then(|text| serde_json::from_str(text).ok());
    Some(Listed { parents: parents.unwrap_or_default(), info, lease })
}

fn state(lease: &Lease, now: Timestamp) -> LabState {
    let Some(lifetime) = lifetime(lease) else { return LabState::Damaged };
    if lifetime.kept {
        return match lifetime.expires {
            Some(expires) if expires <= SystemTime::from(now) => LabState::Abandoned,
            expires => LabState::Kept { expires },
        };
    }
    let Some(spec) = &lease.spec else { return LabState::Damaged };
    let created = lease.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let renewed = spec.renew_time.as_ref().map(|time| time.0).or(created);
    match (renewed, spec.lease_duration_seconds) {
        (Some(renewed), Some(seconds)) => {
            let valid =
                renewed.checked_add(SignedDuration::from_secs(seconds.into())).unwrap_or(Timestamp::MAX);
            if valid < now { LabState::Abandoned } else { LabState::Owned }
        }
        _ => LabState::Damaged,
    }
}

fn lifetime(lease: &Lease) -> Option<Lifetime> {
    serde_json::from_str(annotation(&lease.metadata, RETENTION)?).ok()
}

fn encode(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| {
        Error::new(ErrorKind::Internal, "cannot encode the record of a lab").with_source(error)
    })
}

fn damaged(lease: &Lease) -> Error {
    let message = format!("expected the lease of a lab, but {} cannot be read", lease.name_any());
    Error::new(ErrorKind::InvalidInput, message)
        .with_help("delete it: the volumes and machines that it owns go with it")
}

/// Says who owns a lab, for people: the host and the process.
fn holder() -> String {
    let host = std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty());
    let host =
        host.or_else(|| std::fs::read_to_string("/etc/hostname").ok().map(|name| name.trim().to_owned()));
    format!("{}/{}", host.unwrap_or_else(|| "unknown".to_owned()), std::process::id())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn lease(lifetime: Lifetime, renewed: Option<i64>) -> Lease {
        let annotations = [(RETENTION, encode(&lifetime).unwrap())];
        let mut metadata = metadata("x", Default::default(), annotations, None);
        metadata.creation_timestamp = Some(Time(at(0)));
        let spec = LeaseSpec {
            lease_duration_seconds: Some(60),
            renew_time: renewed.map(|second| MicroTime(at(second))),
            ..LeaseSpec::default()
        };
        Lease { metadata, spec: Some(spec) }
    }

    #[test]
    fn a_lab_is_abandoned_once_its_lease_has_expired() {
        let owned = Lifetime::of(Retention::EndWithOwner);
        // Until its first renewal, a lease counts from its creation.
        assert_eq!(state(&lease(owned, None), at(60)), LabState::Owned);
        assert_eq!(state(&lease(owned, None), at(61)), LabState::Abandoned);
        assert_eq!(state(&lease(owned, Some(30)), at(90)), LabState::Owned);
        assert_eq!(state(&lease(owned, Some(30)), at(91)), LabState::Abandoned);
    }

    #[test]
    fn a_kept_lab_lives_without_renewals_until_it_expires() {
        let expires = Some(SystemTime::from(at(100)));
        let kept = |expires| Lifetime { keepable: true, kept: true, expires };
        assert_eq!(state(&lease(kept(None), None), at(1000)), LabState::Kept { expires: None });
        assert_eq!(state(&lease(kept(expires), None), at(99)), LabState::Kept { expires });
        assert_eq!(state(&lease(kept(expires), None), at(100)), LabState::Abandoned);
    }

    #[test]
    fn a_lease_without_its_record_is_damaged() {
        let mut unreadable = lease(Lifetime::of(Retention::MayBeKept), None);
        unreadable.metadata.annotations = None;
        assert_eq!(state(&unreadable, at(1000)), LabState::Damaged);
    }
}
