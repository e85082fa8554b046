//! Checks of clones, without access to the module that is cloned.

use super::{
    codes,
    findings::{Findings, Zero},
    network, vm,
};
use crate::{
    manifest::{CloneSpec, ValuePath},
    units::is_name,
    visible::Quoted,
};

pub(super) fn spec(findings: &mut Findings<'_>, spec: &CloneSpec, at: &ValuePath<'_>) {
    match spec.template_name.as_deref() {
        None => findings.missing(at, "templateName", "name the module to clone"),
        Some(name) if !is_name(name) => findings.optional_name(Some(name), &at.key("templateName")),
        Some(_) => {}
    }
    let declared = network::Declared::new(spec.network.as_ref());
    if let Some(network) = &spec.network {
        network::network(findings, network, &at.key("network"));
    }
    let overrides = at.key("vmOverrides");
    findings.unique("VM", &overrides, spec.vm_overrides.iter().map(|vm| vm.name.as_deref()));
    for (index, one) in spec.vm_overrides.iter().enumerate() {
        let at = overrides.index(index);
        findings.required_name(one.name.as_deref(), &at, "name a VM of the module");
        if let Some(resources) = &one.resources {
            vm::resources(findings, resources, &at.key("resources"), vm::Required::No);
        }
        // A clone without a network of its own gets that of the template, which is not known here.
        network::nics(findings, &one.nics, &at, spec.network.is_some().then_some(&declared));
    }
    findings.duration(spec.timeout.as_ref(), &at.key("timeout"), Zero::Refused);
    findings.duration(spec.ttl.as_ref(), &at.key("ttl"), Zero::Refused);
    if let Some(anchor) = spec.age_anchor.as_deref()
        && anchor.parse::<jiff::Timestamp>().is_err()
    {
        findings
            .report(
                &codes::INVALID_VALUE,
                &at.key("ageAnchor"),
                format!(
                    "expected a time as defined by RFC 3339, but found {anchor:?}",
                    anchor = Quoted(anchor)
                ),
            )
            .help = Some("for example `2026-01-31T12:00:00Z`".to_owned());
    }
}
