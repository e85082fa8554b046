//! The rules of a manifest: each finding with its place, all of them in one go, never stopping at the first.
//!
//! A file per subject. Wrong types, unknown and duplicate keys, and mistakes of YAML itself are found while parsing
//! ([`crate::manifest`]); what depends on a backend, on limits or on inputs is found while planning
//! ([`crate::plan`]). Everything else is here. The codes of all of them are listed in [`codes`].

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
    manifest::{Document, Manifest, Path},
};

/// Every finding about a document that can be made without knowing where it will be built, in the order of the text.
#[must_use]
pub fn check(document: &Document) -> Vec<Diagnostic> {
    let mut findings = Findings::new(document);
    run(&mut findings);
    findings.finish()
}

pub(crate) fn run(findings: &mut Findings<'_>) {
    let root = Path::root();
    match findings.manifest() {
        Manifest::Resource(resource) => {
            build::envelope(findings, resource, root);
            match &resource.spec {
                Some(spec) => build::spec(findings, spec, &root.key("spec")),
                None => findings.missing(root, "spec", "it says what is to be built"),
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
                None => findings.missing(root, "spec", "it says what is to be cloned"),
            }
        }
    }
}
