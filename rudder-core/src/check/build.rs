//! Checks of the top level: the resource around a spec, files, the file server, timeouts.

use super::{
    boot, codes, files,
    findings::{Findings, Zero},
    network, vm,
};
use crate::manifest::{BuildSpec, Resource, ValuePath};

/// Checks the `metadata` of a resource. Its `apiVersion` and `kind` select the parser, and are checked there.
pub(super) fn envelope<S>(findings: &mut Findings<'_>, resource: &Resource<S>, root: &ValuePath<'_>) {
    if let Some(metadata) = &resource.metadata {
        findings.optional_name(metadata.name.as_deref(), &root.key("metadata").key("name"));
    }
}

/// Checks the spec of a build.
pub(super) fn spec(findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>) {
    let vms = at.key("vms");
    if spec.vms.is_empty() && !findings.written(false, &vms) {
        findings.missing(at, "vms", "list at least one VM with `name`, `source` and `resources`");
    }
    files::declared(findings, spec, at);
    let network = network::Declared::new(spec.network.as_ref());
    if let Some(declared) = &spec.network {
        network::network(findings, declared, &at.key("network"));
    }
    let file_names = files::Names::of(spec);
    findings.unique("VM", &vms, spec.vms.iter().map(|vm| vm.name.as_deref()));
    for (index, one) in spec.vms.iter().enumerate() {
        vm::vm(findings, one, &vms.index(index), &file_names, &network);
    }
    if let Some(directory) = &spec.http_directory {
        files::references(findings, directory, &at.key("httpDirectory"), &file_names);
    }
    boot::unserved(findings, spec, at);
    files::unused(findings, spec, at, &file_names);
    network::overrides(findings, spec, at, &network);
    network::addresses(findings, spec, at);

    findings.duration(spec.timeout.as_ref(), &at.key("timeout"), Zero::Refused);
    findings.duration(spec.iso_cache_ttl.as_ref(), &at.key("isoCacheTTL"), Zero::Allowed);
    if let Some(retries) = spec.retries
        && !(0..=100).contains(&retries)
    {
        findings.report(
            &codes::INVALID_VALUE,
            &at.key("retries"),
            format!("expected 0 to 100 retries, but found {retries}"),
        );
    }
    if spec.output.is_some() {
        findings
            .report(
                &codes::DEPRECATED_FIELD,
                &at.key("output"),
                "`output` has no effect: every VM of a build is captured",
            )
            .help = Some("remove the field".to_owned());
    }
}
