//! Planning decides what will be done: it fills defaults, applies overrides, resolves references and computes the
//! digest.
//!
//! Planning is pure: it reads a manifest and a [`PlanContext`], and nothing else.
//!
//! ```
//! use rudder_core::{capability::{Capabilities, Capability}, plan::{PlanContext, prepare}};
//!
//! let manifest = b"
//! vms:
//! - name: web
//!   source: {blank: true}
//!   resources: {cpu: 2, memory: 1Gi}
//! ";
//! let capabilities = Capabilities::new("example", [Capability::SourceBlank, Capability::DiskVirtio]);
//! let plans = prepare("site.yaml", manifest, &PlanContext::new(&capabilities)).into_plans()?;
//! assert_eq!(plans[0].name, "site");
//! assert_eq!(plans[0].machines[0].hardware.disks[0].name, "rootdisk");
//! # Ok::<(), rudder_core::Error>(())
//! ```

mod context;
mod debug;
mod limits;
mod machine;
mod network;
mod prepare;
mod reference;
mod shape;
mod support;
mod template;
mod types;
mod urls;

pub use context::{Inputs, Limits, PlanContext};
pub use prepare::{Prepared, prepare};
pub use types::*;

use crate::{
    check::{self, Findings, codes, duration},
    diagnostic::Diagnostic,
    digest::Digest,
    manifest::{BuildSpec, Document, Manifest, ValuePath},
    units::is_name,
    visible::Quoted,
};
use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};
use support::Support;
use urls::relative_urls;

/// Default of `timeout`.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Default of `isoCacheTTL`.
const ISO_CACHE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// A plan, or the reasons why there is none.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Planned {
    /// The plan; `None` when a diagnostic is an error, whether found here or while parsing.
    pub plan: Option<Plan>,
    /// All findings of checking and planning, in source order. Findings of parsing are not repeated here.
    pub diagnostics: Vec<Diagnostic>,
}

/// Checks a document and plans it. All findings are returned at once: mistakes in the manifest, and conflicts with the
/// backend, limits, inputs and modules of the context.
///
/// A document that was parsed with errors may be checked with this function, but its plan lacks what could not be read:
/// see [`Parsed::has_errors`](crate::manifest::Parsed::has_errors), or use [`prepare`].
#[must_use]
pub fn plan(document: &Document, context: &PlanContext) -> Planned {
    let mut findings = Findings::new(document);
    check::run(&mut findings);
    let support = Support::new(context);
    let spec = match document.manifest() {
        Manifest::Clone(_) => {
            support.clone_of_module(&mut findings);
            None
        }
        manifest => manifest.build_spec(),
    };
    let mut plan = None;
    if let Some(spec) = spec {
        let at = document.spec_path();
        let name = name(&mut findings, context);
        support.build(&mut findings, spec, at);
        limits::limits(&mut findings, spec, at, context);
        reference::references(&mut findings, spec, at, context);
        relative_urls(&mut findings, spec, at, context);
        if !findings.has_errors() {
            plan = name.and_then(|name| make(document, spec, &name, support, context));
            // If parsing removed something it has reported that already: a missing plan is then no bug.
            if plan.is_none() && !document.has_pruned() {
                findings
                    .report(
                        &codes::INTERNAL,
                        at,
                        "expected a plan for a manifest without errors, but planning failed",
                    )
                    .help = Some("this is a bug in Rudder: please report it with the manifest".to_owned());
            }
        }
    }
    Planned { plan, diagnostics: findings.finish() }
}

/// Returns the name in the manifest, else that of the context, else the stem of the source's name.
fn name(findings: &mut Findings<'_>, context: &PlanContext) -> Option<String> {
    if let Some(name) = findings.manifest().name() {
        return Some(name.to_owned());
    }
    let document = findings.document();
    let in_metadata = !matches!(document.manifest(), Manifest::Bare(_));
    let metadata = ValuePath::root().key("metadata");
    let field = if in_metadata { metadata.key("name") } else { ValuePath::root().key("name") };
    let stem = document.source_name().and_then(|name| std::path::Path::new(name).file_stem()?.to_str());
    match context.default_name.as_deref().or(stem) {
        Some(name) if is_name(name) => Some(name.to_owned()),
        Some(other) => {
            findings
                .report(
                    &codes::INVALID_NAME,
                    &field,
                    format!(
                        "expected a file name that can name the build, but found {other:?}",
                        other = Quoted(other)
                    ),
                )
                .help = Some(format!("write `{field}: …` with lower-case letters, digits and inner hyphens"));
            None
        }
        None if findings.written(false, &field) => None,
        None => {
            findings
                .report(
                    &codes::MISSING_FIELD,
                    &field,
                    format!("expected the field `{field}`, but it is missing"),
                )
                .help = Some("name the build; a manifest that is not a file has no default name".to_owned());
            None
        }
    }
}

fn make(
    document: &Document,
    spec: &BuildSpec,
    name: &str,
    support: Support<'_>,
    context: &PlanContext,
) -> Option<Plan> {
    let template_network = network::base(spec)?;
    let network = network::overridden(spec, &template_network)?;
    let mut planner = machine::Planner {
        context,
        support,
        spec,
        macs: network::Macs::new(name, spec),
        secrets: Vec::new(),
        known_secrets: HashSet::new(),
        overrides: HashMap::new(),
        file_indices: HashMap::new(),
        not_repeatable: Vec::new(),
        files: Vec::with_capacity(spec.files.len()),
    };
    for one in spec.build_overrides.iter().flat_map(|overrides| &overrides.vms) {
        planner.overrides.entry(one.name.as_deref()?).or_default().push(one);
    }
    planner.files()?;
    let mut machines = Vec::with_capacity(spec.vms.len());
    for vm in &spec.vms {
        machines.push(planner.machine(vm, &template_network, &network)?);
    }
    let machine::Planner { secrets, not_repeatable, files, .. } = planner;
    let manifest = match document.source() {
        Some(text) => text.to_owned(),
        None => document.manifest().to_yaml().ok()?,
    };
    let mut plan = Plan {
        name: name.to_owned(),
        digest: Digest::of(b""),
        manifest,
        machines,
        network,
        template_network,
        http_files: spec.http_directory.as_ref().map_or(Some(Vec::new()), machine::file_names)?,
        files,
        timeout: spec.timeout.as_ref().map_or(Some(TIMEOUT), |timeout| duration(timeout).ok())?,
        retries: u32::try_from(spec.retries.unwrap_or(0)).ok()?,
        iso_cache_ttl: spec.iso_cache_ttl.as_ref().map_or(Some(ISO_CACHE_TTL), |ttl| duration(ttl).ok())?,
        secrets,
        not_repeatable,
    };
    plan.digest = shape::digest(&plan);
    Some(plan)
}
