//! The halted domains of a published module, which make it visible to libvirt's tools and can be started there. Their
//! writes are discarded when they end (`transient`), because the files of a module never change.

use crate::{
    connection::{Connection, Refusal, remove_domain},
    devices::{Disk, Serial, Tpm, Uefi, Variables},
    domain::{Domain, Nics},
    host_capabilities::HostCapabilities,
    lab_context::{LabContext, cleanup_error, labelled},
    label::{Label, Owner},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{MachineDisk, MachineSpec, Volume},
    digest::Digest,
    module::{Module, StateKind, TemplateMachine},
};
use rudder_local::{
    lab_storage::blocking,
    machine_state::template_firmware,
    nic_arguments::user_nic_arguments,
    pci_layout::{Chipset, cdrom_bus},
    store::Store,
};
use std::{path::Path, sync::Arc};
use virt::connect::Connect;

/// Defines the domains of a module that was just published from this lab, replacing those of its previous version.
pub(crate) async fn define_published(context: &Arc<LabContext>, module: &Module) -> Result<()> {
    let (context, module) = (Arc::clone(context), module.clone());
    context
        .detached(|context| async move {
            define(&context.connection, &context.host_capabilities, &context.store, &module).await
        })
        .await
}

/// Defines the domains of a module.
pub(crate) async fn define(
    connection: &Arc<Connection>,
    host_capabilities: &HostCapabilities,
    store: &Owner,
    module: &Module,
) -> Result<()> {
    let texts = module
        .machines
        .iter()
        .map(|machine| xml(host_capabilities, store, module, machine))
        .collect::<Result<Vec<_>>>()?;
    let (store, name) = (store.clone(), module.name.clone());
    let replace = move |connect: &Connect| {
        remove(connect, &store, |its, _| its == name)?;
        texts.iter().try_for_each(|text| virt::domain::Domain::define_xml(connect, text).map(drop))
    };
    let replaced = connection.command(replace).await;
    replaced.map_err(|failure| {
        failure
            .into_error(ErrorKind::Io, "define the domains of a module")
            .with_context("module", &module.name)
    })
}

/// Removes the domains of those modules of a store whose name and digest match a predicate; returns the names of the
/// domains.
pub(crate) fn remove(
    connect: &Connect,
    store: &Owner,
    wanted: impl Fn(&str, &Digest) -> bool,
) -> Result<Vec<String>, Refusal> {
    let mut removed = Vec::new();
    for (domain, label) in labelled(connect)? {
        if let Label::Module { name, digest, .. } = &label
            && store.owns(&label)
            && wanted(name, digest)
        {
            let name = domain.get_name().unwrap_or_default();
            remove_domain(&domain)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Reconciles the domains with the modules of the store: removes those of modules that no longer exist, and defines
/// those that a builder could not define any more. Returns what was removed.
pub(crate) async fn reconcile(
    connection: &Arc<Connection>,
    host_capabilities: &HostCapabilities,
    store: &Store,
) -> Result<Vec<String>> {
    let owner = Owner::new(store);
    let own = owner.clone();
    // Domains are listed before modules: a module exists before its domains are defined.
    let defined = connection.query(move |connect| {
        let labels = labelled(connect)?.into_iter().map(|(_, label)| label);
        Ok(labels.filter(|label| own.owns(label)).collect::<Vec<_>>())
    });
    let defined = defined.await.map_err(cleanup_error)?;
    let listing = store.clone();
    let listed = blocking(move || Ok((listing.modules()?, listing.damaged_modules()?)));
    let (modules, damaged) = listed.await?;
    // A module that cannot be read now may still exist, so its domains are kept.
    let is_removed = move |name: &str, digest: &Digest, existing: &[(String, Digest)]| {
        !existing.iter().any(|(its, one)| its == name && one == digest)
            && !damaged.iter().any(|module| module.name == name)
    };
    let is_defined = |module: &Module, machine: &TemplateMachine| {
        defined.iter().any(|label| {
            matches!(label, Label::Module { name, digest, vm, .. }
                if *name == module.name && *digest == module.digest && *vm == machine.name)
        })
    };
    let mut done = Vec::new();
    let existing: Vec<_> = modules.iter().map(|one| (one.name.clone(), one.digest)).collect();
    let stale = defined.iter().any(
        |label| matches!(label, Label::Module { name, digest, .. } if is_removed(name, digest, &existing)),
    );
    if stale {
        let own = owner.clone();
        let removed = connection.command(move |connect| {
            remove(connect, &own, |name, digest| is_removed(name, digest, &existing))
        });
        let removed = removed.await.map_err(cleanup_error)?;
        done.extend(removed.into_iter().map(|domain| format!("domain {domain} of a removed module")));
    }
    // Modules built by another backend have no domains.
    let ours = modules.iter().filter(|module| module.provenance.versions.contains_key("libvirt"));
    for module in ours.filter(|module| module.machines.iter().any(|machine| !is_defined(module, machine))) {
        define(connection, host_capabilities, &owner, module).await?;
    }
    Ok(done)
}

fn xml(
    host_capabilities: &HostCapabilities,
    store: &Owner,
    module: &Module,
    machine: &TemplateMachine,
) -> Result<String> {
    let directory = module.path.as_deref().and_then(Path::parent).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "expected the files of the module, but found none")
            .with_context("module", &module.name)
    })?;
    let mut spec = MachineSpec::new(&machine.name, machine.cpus, machine.memory);
    spec.nics = machine.nics.iter().cloned().map(Into::into).collect();
    spec.firmware = machine.firmware;
    let disk = |bus| MachineDisk::new(String::new(), bus, Volume::new(String::new(), 0));
    spec.disks.extend(machine.disks.iter().map(|captured| disk(captured.bus)));
    let variables = machine.state.iter().find(|state| state.kind == StateKind::FirmwareVariables);
    let having = variables.and_then(|state| Some((state.format.as_str(), state.content.size?)));
    let uefi = match (template_firmware(&host_capabilities.host, &spec, having)?, variables) {
        (Some(flash), Some(state)) => {
            Some(Uefi { flash, variables: Variables::CopyOf(directory.join(&state.file)) })
        }
        _ => None,
    };
    Domain {
        name: &format!("{}.{}", module.name, machine.name),
        title: &format!("{} of module {}", machine.name, module.name),
        label: &Label::Module {
            store: store.of_modules(),
            name: module.name.clone(),
            digest: module.digest,
            vm: machine.name.clone(),
        },
        host_capabilities,
        cpus: machine.cpus,
        memory: machine.memory,
        disks: machine
            .disks
            .iter()
            .map(|disk| Disk { path: directory.join(&disk.file), bus: disk.bus, transient: true })
            .collect(),
        chipset: Chipset::of(&spec),
        cdrom_bus: cdrom_bus(&spec),
        uefi,
        tpm: machine.tpm.then_some(Tpm::OfLibvirt),
        cdroms: Vec::new(),
        floppy: None,
        seed: None,
        serial: Serial::Terminal,
        nics: Nics::Arguments(user_nic_arguments(&spec, &module.network.clone().into())?),
        owner: host_capabilities.owner(),
        lab: None,
    }
    .xml()
}
