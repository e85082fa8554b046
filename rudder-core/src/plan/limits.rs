//! Checks the limits of the embedding program. An error names both the limit and the value found.

use super::{Limits, PlanContext};
use crate::{
    check::{DEFAULT_DISK_SIZE, Findings, SourceKind, codes, quantity, source_kind},
    manifest::{BuildSpec, Resources, ValuePath, Vm},
    units::human_bytes,
};

pub(super) fn limits(
    findings: &mut Findings<'_>,
    spec: &BuildSpec,
    at: &ValuePath<'_>,
    context: &PlanContext,
) {
    let limits = &context.limits;
    let vms = at.key("vms");
    over(findings, &vms, "VMs", spec.vms.len() as u64, limits.max_vms.map(|n| n as u64), |n| n.to_string());
    for (index, vm) in spec.vms.iter().enumerate() {
        let at = vms.index(index);
        if let Some(one) = &vm.resources {
            resources(findings, one, &at.key("resources"), limits);
        }
        disks(findings, vm, &at, limits, context);
    }
    let Some(overrides) = &spec.build_overrides else { return };
    let at = at.key("buildOverrides");
    let vms = at.key("vms");
    for (index, vm) in overrides.vms.iter().enumerate() {
        if let Some(one) = &vm.resources {
            resources(findings, one, &vms.index(index).key("resources"), limits);
        }
    }
}

fn resources(findings: &mut Findings<'_>, one: &Resources, at: &ValuePath<'_>, limits: &Limits) {
    if let Some(Ok(cpu)) = one.cpu.as_ref().map(quantity) {
        over(findings, &at.key("cpu"), "cores", cpu.ceil().max(1), limits.max_cpu, |n| n.to_string());
    }
    if let Some(Ok(memory)) = one.memory.as_ref().map(quantity) {
        over(findings, &at.key("memory"), "memory", memory.ceil(), limits.max_memory, human_bytes);
    }
}

fn disks(findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>, limits: &Limits, context: &PlanContext) {
    let at = at.key("disks");
    let source = vm.source.as_ref();
    let inherits = source.and_then(source_kind) == Some(SourceKind::BuildRef);
    let inherited = source
        .and_then(|source| super::reference::parent(source.build_ref.as_ref()?, context))
        .map_or(0, |(_, machine)| machine.disks.len());
    let count = if vm.disks.is_empty() && !inherits { 1 } else { vm.disks.len() + inherited } as u64;
    over(findings, &at, "disks of a VM", count, limits.max_disks.map(|n| n as u64), |n| n.to_string());
    let default = (vm.disks.is_empty() && !inherits).then_some(DEFAULT_DISK_SIZE);
    if let Some(size) = default {
        over(findings, &at, "disk", size, limits.max_disk_size, human_bytes);
    }
    for (index, disk) in vm.disks.iter().enumerate() {
        let size = match disk.size.as_ref().map(quantity) {
            None => DEFAULT_DISK_SIZE,
            Some(Ok(size)) => size.ceil(),
            Some(Err(_)) => continue,
        };
        let at = at.index(index);
        over(findings, &at.key("size"), "disk", size, limits.max_disk_size, human_bytes);
    }
}

fn over(
    findings: &mut Findings<'_>,
    at: &ValuePath<'_>,
    what: &str,
    found: u64,
    limit: Option<u64>,
    show: impl Fn(u64) -> String,
) {
    if let Some(limit) = limit.filter(|limit| found > *limit) {
        let (limit, found) = (show(limit), show(found));
        let message = match what {
            "disk" => format!("expected a disk of at most {limit}, but found {found}"),
            "memory" => format!("expected at most {limit} of memory, but found {found}"),
            _ => format!("expected at most {limit} {what}, but found {found}"),
        };
        findings.report(&codes::OVER_LIMIT, at, message).help =
            Some("stay below the limit, which this program sets".to_owned());
    }
}
