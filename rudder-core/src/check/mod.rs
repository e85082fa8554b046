//! The rules of a manifest. Checking reports all findings at once, each with its location, and never stops at the
//! first.
//!
//! There is one file per subject. Wrong types, unknown and duplicate keys, and YAML mistakes are found while parsing
//! ([`crate::manifest`]). What depends on a backend, limits or inputs is found while planning ([`crate::plan`]).
//! Everything else is checked here. The codes of all findings are listed in [`codes`].

mod access;
mod boot;
mod build;
mod clone;
pub mod codes;
mod files;
mod findings;
mod floppy;
mod network;
mod scripts;
mod step;
mod vm;

pub(crate) use access::shell;
pub(crate) use files::{checked_url, unpinned, unpinned_image};
pub(crate) use findings::{Findings, duration, quantity};
#[cfg(feature = "engine")]
pub(crate) use floppy::{FloppyUse, TOO_LARGE_HELP as FLOPPY_HELP};
pub(crate) use network::{DEFAULT_SUBNET, model};
pub(crate) use scripts::{script, user_data};
pub(crate) use step::{StepKind, step_kind};
pub(crate) use vm::{DEFAULT_DISK, DEFAULT_DISK_SIZE, SourceKind, bus, source_kind};

use crate::{
    diagnostic::Diagnostic,
    manifest::{Document, Manifest, ValuePath},
};

/// Returns all findings about a document that do not depend on where it will be built, in source order.
#[must_use]
pub fn check(document: &Document) -> Vec<Diagnostic> {
    let mut findings = Findings::new(document);
    run(&mut findings);
    findings.finish()
}

pub(crate) fn run(findings: &mut Findings<'_>) {
    let root = ValuePath::root();
    match findings.manifest() {
        Manifest::Resource(resource) => {
            build::envelope(findings, resource, root);
            match &resource.spec {
                Some(spec) => build::spec(findings, spec, &root.key("spec")),
                None => findings.missing(root, "spec", "add `spec`, which describes the build"),
            }
        }
        Manifest::Bare(bare) => {
            findings.optional_name(bare.name.as_deref(), &root.key("name"));
            build::spec(findings, &bare.spec, root);
        }
        Manifest::Clone(resource) => {
            build::envelope(findings, resource, root);
            match &resource.spec {
                Some(spec) => clone::spec(findings, spec, &root.key("spec")),
                None => findings.missing(root, "spec", "add `spec`, which describes the clone"),
            }
        }
    }
}
