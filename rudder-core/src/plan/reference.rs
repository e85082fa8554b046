//! Resolves what a manifest refers to outside itself: existing modules and named inputs.

use super::{PlanContext, context::InputKind};
use crate::{
    check::{self, Findings, codes},
    manifest::{BuildRef, BuildSpec, KeyRef, ValueFrom, ValuePath, Vm},
    module::{Module, TemplateMachine},
    visible::Quoted,
};

/// Returns the module and VM that a `buildRef` names, if they exist.
pub(super) fn parent<'c>(
    reference: &BuildRef,
    context: &'c PlanContext,
) -> Option<(&'c Module, &'c TemplateMachine)> {
    let module = context.modules.get(reference.name.as_deref()?)?;
    let machine = match (reference.vm_name.as_deref(), module.machines.as_slice()) {
        (None, [only]) => only,
        (None, _) => return None,
        (Some(name), machines) => machines.iter().find(|machine| machine.name == name)?,
    };
    Some((module, machine))
}

/// Returns the kind of object that a reference names, and the key in it.
pub(super) fn input(from: &ValueFrom) -> Option<(InputKind, &KeyRef, &'static str)> {
    match (&from.config_map_ref, &from.secret_ref) {
        (Some(reference), None) => Some((InputKind::ConfigMap, reference, "configMapRef")),
        (None, Some(reference)) => Some((InputKind::Secret, reference, "secretRef")),
        _ => None,
    }
}

/// Whether an input is used as text or as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Bytes,
}

/// Reports every reference that cannot be resolved.
pub(super) fn references(
    findings: &mut Findings<'_>,
    spec: &BuildSpec,
    at: &ValuePath<'_>,
    context: &PlanContext,
) {
    let vms = at.key("vms");
    for (index, vm) in spec.vms.iter().enumerate() {
        let at = vms.index(index);
        if let Some(reference) = vm.source.as_ref().and_then(|source| source.build_ref.as_ref()) {
            build_ref(findings, reference, &at.key("source").key("buildRef"), context);
            inherited_disks(findings, vm, reference, &at, context);
        }
        if let Some(reference) = vm.communicator.as_ref().and_then(|c| c.ssh_private_key_secret.as_ref()) {
            let at = at.key("communicator");
            key_ref(
                findings,
                InputKind::Secret,
                reference,
                &at.key("sshPrivateKeySecret"),
                Form::Text,
                context,
            );
        }
        if let Some(from) = vm.cloud_init.as_ref().and_then(|cloud_init| cloud_init.user_data_from.as_ref()) {
            let at = at.key("cloudInit");
            let at = at.key("userDataFrom");
            value_from(findings, from, &at, Form::Text, context);
            if let Some(text) = text(from, context) {
                check::user_data(findings, text, &at);
            }
        }
        let steps = at.key("provisioners");
        let shell = check::shell(vm);
        for (index, step) in vm.provisioners.iter().enumerate() {
            let at = steps.index(index);
            if let Some(from) = step.shell.as_ref().and_then(|shell| shell.script_from.as_ref()) {
                let at = at.key("shell");
                let at = at.key("scriptFrom");
                value_from(findings, from, &at, Form::Text, context);
                if let Some(text) = text(from, context) {
                    check::script(findings, text, &at, shell);
                }
            }
            if let Some(from) = step.file.as_ref().and_then(|file| file.source.as_ref()) {
                value_from(findings, from, &at.key("file").key("source"), Form::Bytes, context);
            }
        }
    }
}

fn build_ref(findings: &mut Findings<'_>, reference: &BuildRef, at: &ValuePath<'_>, context: &PlanContext) {
    let Some(name) = reference.name.as_deref() else { return };
    let Some(module) = context.modules.get(name) else {
        if let Some(reason) = context.damaged_modules.get(name) {
            let message = format!("expected a usable module, but {:?} is damaged: {reason}", Quoted(name));
            findings.report(&codes::UNKNOWN_MODULE, &at.key("name"), message);
            return;
        }
        let near = findings.suggestion(name, context.modules.keys().map(String::as_str));
        let near = near.map(|near| format!("did you mean `{near}`? Otherwise ")).unwrap_or_default();
        findings
            .report(
                &codes::UNKNOWN_MODULE,
                &at.key("name"),
                format!(
                    "expected the name of a module that has been built, but found {name:?}",
                    name = Quoted(name)
                ),
            )
            .help = Some(format!("{near}build the manifest named {name} first"));
        return;
    };
    let names = || module.machines.iter().map(|machine| machine.name.as_str());
    match reference.vm_name.as_deref() {
        None if module.machines.len() > 1 => {
            let message = format!(
                "expected the field `vmName`, because the module {name} has {} VMs, but it is missing",
                module.machines.len()
            );
            findings.report(&codes::MISSING_FIELD, at, message).help =
                Some(format!("use one of: {}", names().collect::<Vec<_>>().join(", ")));
        }
        Some(vm) if !names().any(|name| name == vm) => {
            let what = format!("a VM of the module {name}");
            findings.unknown_reference(&codes::UNKNOWN_VM, &at.key("vmName"), &what, vm, names());
        }
        _ => {}
    }
}

/// Reports a blank disk that has the name of a disk of the parent.
fn inherited_disks(
    findings: &mut Findings<'_>,
    vm: &Vm,
    reference: &BuildRef,
    at: &ValuePath<'_>,
    context: &PlanContext,
) {
    let Some((module, machine)) = parent(reference, context) else { return };
    let disks = at.key("disks");
    for (index, disk) in vm.disks.iter().enumerate() {
        let Some(name) = disk.name.as_deref() else { continue };
        if machine.disks.iter().any(|inherited| inherited.name == name) {
            findings
                .report(
                    &codes::DUPLICATE_NAME,
                    &disks.index(index).key("name"),
                    format!(
                        "expected a unique disk name, but found {name:?}, which is inherited from {} of the \
                         module {}",
                        machine.name,
                        module.name,
                        name = Quoted(name)
                    ),
                )
                .help = Some(
                "rename the disk: with `buildRef`, every listed disk is an additional blank \
                     disk"
                    .to_owned(),
            );
        }
    }
}

/// Returns a named input as text, if it was given and is UTF-8.
fn text<'c>(from: &ValueFrom, context: &'c PlanContext) -> Option<&'c str> {
    let (kind, reference, _) = input(from)?;
    let bytes = context.inputs.get(kind, reference.name.as_deref()?, reference.key.as_deref()?)?;
    std::str::from_utf8(bytes).ok()
}

fn value_from(
    findings: &mut Findings<'_>,
    from: &ValueFrom,
    at: &ValuePath<'_>,
    form: Form,
    context: &PlanContext,
) {
    if let Some((kind, reference, field)) = input(from) {
        key_ref(findings, kind, reference, &at.key(field), form, context);
    }
}

fn key_ref(
    findings: &mut Findings<'_>,
    kind: InputKind,
    reference: &KeyRef,
    at: &ValuePath<'_>,
    form: Form,
    context: &PlanContext,
) {
    let (Some(name), Some(key)) = (reference.name.as_deref(), reference.key.as_deref()) else { return };
    if name.is_empty() || key.is_empty() {
        return;
    }
    let what = kind.name();
    match context.inputs.get(kind, name, key) {
        None => {
            let known = context.inputs.known(kind);
            findings.unknown_reference(
                &codes::UNKNOWN_INPUT,
                at,
                &format!("a key of a {what} that was provided to this build"),
                &format!("{name}/{key}"),
                known.iter().map(String::as_str),
            );
        }
        Some(bytes) if form == Form::Text && std::str::from_utf8(bytes).is_err() => {
            findings.report(
                &codes::INVALID_VALUE,
                at,
                format!("expected text, but the {what} {name}/{key} is not UTF-8"),
            );
        }
        Some(_) => {}
    }
}
