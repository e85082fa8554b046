//! Modules: the captured disks of halted machines, and a record, a ConfigMap with `module.json`.
//!
//! Each version of a module is a ConfigMap that owns the volumes of that version. Which version counts is said by one other
//! ConfigMap, the module's pointer; changing it is what publishes a module. A version to which no pointer points is not complete, or
//! was replaced, and is removed.

use crate::{
    cluster::{Cluster, annotation, metadata},
    errors::{is_conflict, request_failed},
    lab_context::LabContext,
    lease,
    names::{BUILD, Kind, LAB, NAME, VM, label_value, labels, object_name, selector},
    objects::{DataVolume, VirtualMachine},
};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{ResourceExt as _, api::PostParams, core::Resource as _};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{LabState, ModuleDraft, ReapReport},
    module::{DamagedModule, Module},
    plan::PlannedBuildRef,
};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};

/// The key of a version's record.
const RECORD: &str = "module.json";
/// The key of a pointer's version.
const VERSION: &str = "version";
/// The lab that is publishing a version, as a label of the version; a version of a living lab is not removed.
const PUBLISHING: &str = "rudder-vm.github.io/publishing";

fn pointer_name(module: &str) -> String {
    object_name(&["module", module])
}

/// Publishes a module of disks that the lab has captured.
pub(crate) async fn publish(lab: &LabContext, draft: ModuleDraft) -> Result<Module> {
    let cluster = &lab.cluster;
    let digest = Module::content_digest(&draft.name, &draft.machines, &draft.network)?;
    let module = draft.into_module(digest);
    let version =
        object_name(&["module", &module.name, lab.id.as_str(), &lab.next().to_string(), &digest.to_string()]);
    let mut marks = labels(Kind::Module);
    marks.insert(BUILD.to_owned(), label_value(&module.name));
    let mut of_version = marks.clone();
    of_version.insert(PUBLISHING.to_owned(), lab.id.as_str().to_owned());
    let record = ConfigMap {
        metadata: metadata(&version, of_version, [(NAME, module.name.clone())], None),
        data: Some([(RECORD.to_owned(), module.to_record()?)].into()),
        ..ConfigMap::default()
    };
    let created = cluster.create(&record, &format!("module {}", module.name)).await?;
    let owner = created
        .owner_ref(&())
        .ok_or_else(|| Error::new(ErrorKind::Protocol, "the cluster returned an object without a UID"))?;
    for machine in &module.machines {
        for disk in &machine.disks {
            // The volume changes its owner: it no longer goes with the lab.
            let patch = json!({"metadata": {
                "ownerReferences": [owner],
                "labels": {
                    crate::names::KIND: Kind::Module.label(),
                    LAB: null,
                    BUILD: label_value(&module.name),
                    VM: label_value(&machine.name),
                },
            }});
            cluster.patch::<DataVolume>(&disk.file, &patch, "a volume of the module").await?;
        }
        let mut template = template(&module, machine, &marks, &version)?;
        template.metadata.owner_references = Some(vec![owner.clone()]);
        cluster.create(&template, &format!("template {} of module {}", machine.name, module.name)).await?;
    }
    if let Some(replaced) = point(cluster, &module.name, &version, &marks).await? {
        remove_version(cluster, &replaced).await?;
    }
    Ok(module)
}

/// Makes a version the one that counts. Returns the name of the version that counted before, if there was one. Others are not touched:
/// another lab may be publishing one.
async fn point(
    cluster: &Cluster,
    module: &str,
    version: &str,
    marks: &BTreeMap<String, String>,
) -> Result<Option<String>> {
    let name = pointer_name(module);
    let what = "the version of a module";
    let data = [(VERSION.to_owned(), version.to_owned())];
    let pointer = ConfigMap {
        metadata: metadata(&name, marks.clone(), [(NAME, module.to_owned())], None),
        data: Some(data.into()),
        ..ConfigMap::default()
    };
    match cluster.api::<ConfigMap>().create(&PostParams::default(), &pointer).await {
        Ok(_) => Ok(None),
        Err(error) if is_conflict(&error) => {
            let before = cluster.find::<ConfigMap>(&name, what).await?;
            cluster.patch::<ConfigMap>(&name, &json!({"data": {VERSION: version}}), what).await?;
            Ok(before.and_then(|pointer| pointer.data?.remove(VERSION)))
        }
        Err(error) => Err(request_failed(error, &format!("publish module {module}"))),
    }
}

/// Returns the halted machine of a template, which a person may look at. Clones are made of it; it is never started itself.
fn template(
    module: &Module,
    machine: &rudder_core::module::TemplateMachine,
    marks: &BTreeMap<String, String>,
    version: &str,
) -> Result<VirtualMachine> {
    let name = object_name(&[version, &machine.name]);
    let mut labels = marks.clone();
    labels.insert(VM.to_owned(), label_value(&machine.name));
    let disks: Vec<_> = machine
        .disks
        .iter()
        .enumerate()
        .map(|(index, disk)| Ok(json!({"name": format!("disk{index}"), "bootOrder": index + 1, "disk": {"bus": crate::specification::bus(disk.bus)?}})))
        .collect::<Result<_>>()?;
    let volumes: Vec<_> = machine
        .disks
        .iter()
        .enumerate()
        .map(|(index, disk)| json!({"name": format!("disk{index}"), "persistentVolumeClaim": {"claimName": disk.file}}))
        .collect();
    let specification = json!({
        "runStrategy": "Halted",
        "template": {"spec": {
            "domain": {
                "cpu": {"cores": machine.cpus, "sockets": 1, "threads": 1},
                "memory": {"guest": machine.memory.to_string()},
                "devices": {"disks": disks},
            },
            "volumes": volumes,
        }},
    });
    let annotations = [(NAME, format!("{}/{}", module.name, machine.name))];
    Ok(VirtualMachine::new(metadata(&name, labels, annotations, None), specification))
}

/// The ConfigMaps of modules, as the cluster has them at one moment.
struct Listing {
    /// The version that counts, by the exact name of the module.
    pointers: BTreeMap<String, String>,
    versions: BTreeMap<String, ConfigMap>,
}

async fn listing(cluster: &Cluster) -> Result<Listing> {
    let mut found = Listing { pointers: BTreeMap::new(), versions: BTreeMap::new() };
    for map in cluster.list::<ConfigMap>(&selector(Kind::Module), "modules").await? {
        let module = annotation(&map.metadata, NAME).unwrap_or_default().to_owned();
        match map.data.as_ref().and_then(|data| data.get(VERSION)) {
            Some(version) => drop(found.pointers.insert(module, version.clone())),
            None => drop(found.versions.insert(map.name_any(), map)),
        }
    }
    Ok(found)
}

/// Returns the usable modules and the damaged ones, sorted by name.
pub(crate) async fn modules(cluster: &Cluster) -> Result<(Vec<Module>, Vec<DamagedModule>)> {
    let Listing { pointers, versions } = listing(cluster).await?;
    let (mut usable, mut damaged) = (Vec::new(), Vec::new());
    for (name, version) in pointers {
        let read =
            versions.get(&version).map(|map| (map, map.data.as_ref().and_then(|data| data.get(RECORD))));
        let module = match read {
            Some((_, Some(record))) => {
                Module::from_record(Path::new(&version), record.as_bytes()).map_err(|error| error.report())
            }
            Some((map, None)) => Err(format!(
                "expected the record of a module in the ConfigMap {}, but it has none",
                map.name_any()
            )),
            None => Err(format!(
                "expected the ConfigMap {version} of module {name}, but it does not exist; build the module again"
            )),
        };
        match module {
            Ok(module) => usable.push(module),
            Err(reason) => damaged.push(DamagedModule::new(name, reason)),
        }
    }
    usable.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((usable, damaged))
}

/// Returns the version of a module that a plan was made with.
pub(crate) async fn exactly(cluster: &Cluster, parent: &PlannedBuildRef) -> Result<Module> {
    let PlannedBuildRef { module: name, digest, .. } = parent;
    let (modules, _) = modules(cluster).await?;
    let found = modules.into_iter().find(|module| module.name == *name && module.digest == *digest);
    found.ok_or_else(|| {
        let message = format!("expected module {name} ({}), but it does not exist", digest.short());
        Error::new(ErrorKind::NotFound, message).with_context("module", name)
    })
}

/// Removes a module and its volumes.
pub(crate) async fn remove(cluster: &Cluster, name: &str) -> Result<()> {
    for lab in lease::labs(cluster).await? {
        if lab.parents.contains(name) && lab.info.state != LabState::Abandoned {
            let message =
                format!("expected module {name} not to be in use, but lab {} builds on it", lab.info.id);
            return Err(Error::new(ErrorKind::Conflict, message).with_context("module", name));
        }
    }
    let pointer = cluster.find::<ConfigMap>(&pointer_name(name), "a module").await?;
    let missing = || Error::new(ErrorKind::NotFound, format!("expected a module {name}, but there is none"));
    let version = pointer.ok_or_else(missing)?.data.and_then(|mut data| data.remove(VERSION));
    if !cluster.delete::<ConfigMap>(&pointer_name(name), "a module").await? {
        return Err(missing());
    }
    match version {
        Some(version) => remove_version(cluster, &version).await,
        None => Ok(()),
    }
}

/// Deletes a version; the cluster deletes what it owns: templates, and DataVolumes with their claims.
async fn remove_version(cluster: &Cluster, version: &str) -> Result<()> {
    cluster.delete::<ConfigMap>(version, "a version of a module").await.map(drop)
}

/// Removes versions that no pointer names and no living lab is publishing.
pub(crate) async fn reap(cluster: &Cluster, is_alive: impl Fn(&str) -> bool) -> Result<ReapReport> {
    let mut report = ReapReport::default();
    let Listing { pointers, versions } = listing(cluster).await?;
    for (name, map) in versions {
        let current = pointers.values().any(|version| *version == name);
        let publishing = map.labels().get(PUBLISHING).is_some_and(|lab| is_alive(lab));
        if current || publishing {
            continue;
        }
        let module = annotation(&map.metadata, NAME).unwrap_or_default();
        match remove_version(cluster, &name).await {
            Ok(()) => report.removed.push(format!("an incomplete or replaced version of module {module}")),
            Err(error) => report.failed.push(error.report()),
        }
    }
    Ok(report)
}
