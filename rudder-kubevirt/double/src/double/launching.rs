//! Starts the machine of an instance on the node: a new one, or that of an earlier instance of the same VirtualMachine.

use super::{
    datavolumes::bind,
    faults::Fault,
    objects::{InstanceSpec, Key, controller, uid, virtual_machines},
    runs::{Definition, Run},
    seed,
    shared::{Shared, failed},
    texts::STATE_LABEL,
    translate::{self, Attached, Attachments},
    volumes::{Origin, StoredVolume},
};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::{
    api::{ListParams, PostParams},
    core::DynamicObject,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{Machine, Progress},
    digest::Digest,
};
use serde_json::{from_value, json};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

/// Size of the claim with the TPM and firmware state of a machine.
const STATE_SIZE: u64 = 10 << 20;
/// The name that a state has among the disks of its machine.
const STATE: &str = "state";

/// Starts the machine of an instance whose claims have this content.
pub(super) async fn launch(
    shared: &Arc<Shared>,
    instance: &DynamicObject,
    spec: &InstanceSpec,
    claims: &HashMap<String, Arc<StoredVolume>>,
    pod: &str,
) -> Result<Arc<Run>> {
    let key = Key::of(instance);
    let refused = shared.faults.take(&key.namespace, |fault| match fault {
        Fault::LaunchFails { message } => Some(message.clone()),
        _ => None,
    });
    if let Some(message) = refused {
        return Err(Error::new(ErrorKind::LaunchFailed, message));
    }
    let attachments = translate::attachments(spec, claims)?;
    let ports = &shared.options.ports;
    let mut machine = translate::machine_spec(&shared.node, &key, spec, &attachments, ports).await?;
    if let Some(source) = attachments.seed {
        machine.seed = Some(seed::seed(shared, &key, spec, source).await?);
    }
    let state = if keeps_state(spec) { Some(state_claim(shared, instance).await?) } else { None };
    let owner = match controller(instance, "VirtualMachine") {
        Some(_) => instance.metadata.owner_references.iter().flatten().map(|owner| owner.uid.as_str()).next(),
        None => None,
    };
    let owner = owner.unwrap_or_else(|| uid(instance));
    let image = machine.seed.as_ref().map(|seed| Digest::of(&seed.image).to_string());
    let fingerprint = format!("{machine:?} {image:?}");
    let defined = shared.runs.definition(owner).filter(|definition| definition.fingerprint == fingerprint);
    let machine = match defined {
        Some(definition) => definition.machine,
        None => {
            if let Some(state) = &state
                && let Origin::State(of) = state.copy(&shared.node, &Progress::none()).await?
            {
                machine.state_of = of;
            }
            let machine = shared.node.create_machine(machine).await?;
            shared.runs.define(owner, Definition { machine: machine.clone(), fingerprint });
            machine
        }
    };
    let volumes = occupy(pod, &attachments, state, &machine).await;
    let run = Run::new((key, uid(instance), pod), machine, volumes, next_address());
    if let Err(error) = run.machine.start().await {
        run.volumes.iter().for_each(|volume| volume.released_by(pod));
        return Err(error);
    }
    let run = Arc::new(run);
    shared.runs.insert(run.clone());
    shared.spawn(run.clone().watch(shared.clone()));
    Ok(run)
}

/// Records which volumes a pod uses, and returns them.
async fn occupy(
    pod: &str,
    attachments: &Attachments<'_>,
    state: Option<Arc<StoredVolume>>,
    machine: &Arc<dyn Machine>,
) -> Vec<Arc<StoredVolume>> {
    let mut volumes = Vec::new();
    for (disk, attached) in &attachments.disks {
        if let Attached::Claim(volume) = attached {
            volume.used_by(pod, Some((machine, &disk.name))).await;
            volumes.push(volume.clone());
        }
    }
    for (_, attached) in &attachments.cdroms {
        if let Attached::Claim(volume) = attached {
            volume.used_by(pod, None).await;
            volumes.push(volume.clone());
        }
    }
    if let Some(state) = state {
        state.used_by(pod, Some((machine, STATE))).await;
        volumes.push(state);
    }
    volumes
}

/// Returns whether an instance keeps the state of its TPM or its firmware in a claim.
fn keeps_state(spec: &InstanceSpec) -> bool {
    let tpm = spec.domain.devices.tpm.as_ref();
    let tpm = tpm.is_some_and(|tpm| tpm.persistent == Some(true) && tpm.enabled != Some(false));
    let efi = spec.domain.firmware.bootloader.efi.as_ref();
    tpm || efi.is_some_and(|efi| efi.persistent == Some(true))
}

/// Returns the volume with the state of an instance: the claim that is labelled with the name of the instance, or a new one.
async fn state_claim(shared: &Shared, instance: &DynamicObject) -> Result<Arc<StoredVolume>> {
    let key = Key::of(instance);
    let api = shared.claims_in(&key.namespace);
    let labelled = ListParams::default().labels(&format!("{STATE_LABEL}={}", key.name));
    let found = api.list(&labelled).await.map_err(failed("find the state of an instance"))?;
    let claim = match found.items.into_iter().next() {
        Some(claim) => claim,
        None => {
            let mut owners = instance.metadata.owner_references.clone().unwrap_or_default();
            owners.retain(|owner| owner.kind == virtual_machines().kind);
            let claim = json!({
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {
                    "generateName": format!("persistent-state-for-{}-", key.name),
                    "namespace": key.namespace,
                    "labels": {STATE_LABEL: key.name},
                    "ownerReferences": owners,
                },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": STATE_SIZE.to_string()}},
                },
            });
            let claim: PersistentVolumeClaim = from_value(claim)
                .map_err(|error| Error::new(ErrorKind::Internal, "cannot make a claim").with_source(error))?;
            let created = api.create(&PostParams::default(), &claim).await;
            let created = created.map_err(failed("create the claim for the state of an instance"))?;
            bind(shared, &created).await?.unwrap_or(created)
        }
    };
    let of_claim = Key::of(&claim);
    if let Some(volume) = shared.volumes.get(&of_claim) {
        return Ok(volume);
    }
    shared.volumes.insert(StoredVolume::new(of_claim.clone(), uid(&claim), STATE_SIZE, Origin::State(None)));
    shared.volumes.get(&of_claim).ok_or_else(|| {
        Error::new(ErrorKind::Conflict, format!("claim {of_claim} was deleted while it was being created"))
    })
}

/// Returns an address of the pod network, which nothing but the double reaches.
fn next_address() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(2);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("10.244.{}.{}", (number >> 8) & 0xff, number & 0xff)
}
