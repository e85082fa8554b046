//! Checks of a VM: its source, resources, disks, and everything that has no module of its own.

use super::{
    access, boot, codes,
    files::{self, Names},
    findings::{Findings, quantity},
    floppy,
    network::{self, Declared},
    step,
};
use crate::{
    hardware::Bus,
    manifest::{Disk, Resources, Scalar, Source, ValuePath, Vm},
    visible::Quoted,
};

/// Name of the disk of a VM that declares none.
pub(crate) const DEFAULT_DISK: &str = "rootdisk";

/// Size of a disk without `size`: 20Gi.
pub(crate) const DEFAULT_DISK_SIZE: u64 = 20 << 30;

/// Maximum number of NICs of a VM.
pub(crate) const MAX_NICS: usize = 9;

/// Less memory or disk space than this (1Mi) means that the unit was forgotten.
const LEAST_BYTES: u64 = 1 << 20;

/// The kind of source of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKind {
    Url,
    Blank,
    BuildRef,
    ContainerDisk,
    SourcePvc,
}

impl SourceKind {
    /// Returns the field of this kind.
    pub(crate) fn field(self) -> &'static str {
        match self {
            Self::Url => "url",
            Self::Blank => "blank",
            Self::BuildRef => "buildRef",
            Self::ContainerDisk => "containerDisk",
            Self::SourcePvc => "sourcePvc",
        }
    }
}

/// Returns all kinds that a source names; exactly one is correct.
fn kinds(source: &Source) -> impl Iterator<Item = SourceKind> {
    [
        (source.url.is_some(), SourceKind::Url),
        (source.blank == Some(true), SourceKind::Blank),
        (source.build_ref.is_some(), SourceKind::BuildRef),
        (source.container_disk.is_some(), SourceKind::ContainerDisk),
        (source.source_pvc.is_some(), SourceKind::SourcePvc),
    ]
    .into_iter()
    .filter_map(|(there, kind)| there.then_some(kind))
}

/// Returns the kind of a source, if it names exactly one.
pub(crate) fn source_kind(source: &Source) -> Option<SourceKind> {
    let mut kinds = kinds(source);
    kinds.next().filter(|_| kinds.next().is_none())
}

pub(super) fn vm(
    findings: &mut Findings<'_>,
    vm: &Vm,
    at: &ValuePath<'_>,
    names: &Names<'_>,
    network: &Declared<'_>,
) {
    findings.required_name(vm.name.as_deref(), at, "name the VM; other VMs of the build resolve this name");
    match &vm.source {
        Some(one) => source(findings, one, &at.key("source")),
        None => {
            let field = at.key("source");
            if !findings.written(false, &field) {
                findings.report(&codes::NO_SOURCE, at, "expected a `source`, but the VM has none").help =
                    Some(NO_SOURCE_HELP.to_owned());
            }
        }
    }
    match &vm.resources {
        Some(one) => resources(findings, one, &at.key("resources"), Required::Yes),
        None => findings.missing(at, "resources", "add `resources` with `cpu` and `memory`"),
    }
    disks(findings, vm, at);
    access::communicator(findings, vm, at);
    access::cloud_init(findings, vm, at);
    network::nics(findings, &vm.nics, at, Some(network));
    boot::command(findings, &vm.boot_command, &at.key("bootCommand"));
    files::isos(findings, &vm.isos, &at.key("isos"));
    if let Some(one) = &vm.floppy {
        floppy::floppy(findings, one, &at.key("floppy"), names);
    }
    let steps = at.key("provisioners");
    let shell = access::shell(vm);
    for (index, one) in vm.provisioners.iter().enumerate() {
        step::step(findings, one, &steps.index(index), names, shell);
    }
}

const NO_SOURCE_HELP: &str = "add one of `url`, `blank: true`, `buildRef`, `containerDisk`, `sourcePvc`";

fn source(findings: &mut Findings<'_>, source: &Source, at: &ValuePath<'_>) {
    let named: Vec<SourceKind> = kinds(source).collect();
    match named.as_slice() {
        [] => {
            let all = ["url", "blank", "buildRef", "containerDisk", "sourcePvc"];
            if !all.iter().any(|field| findings.written(false, &at.key(field))) {
                findings
                    .report(&codes::NO_SOURCE, at, "expected exactly one kind of source, but found none")
                    .help = Some(NO_SOURCE_HELP.to_owned());
            }
        }
        [_] => {}
        several => {
            let fields: Vec<String> = several.iter().map(|kind| format!("`{}`", kind.field())).collect();
            findings
                .report(
                    &codes::SEVERAL_SOURCES,
                    at,
                    format!("expected exactly one kind of source, but found {}", fields.join(" and ")),
                )
                .help = Some("keep one of them".to_owned());
        }
    }
    if let Some(url) = source.url.as_deref() {
        files::download(findings, "the source image", url, source.checksum.as_deref(), at);
    } else if source.checksum.is_some() {
        files::checksum_of_nothing(findings, at);
    }
    if let Some(build) = &source.build_ref {
        let at = at.key("buildRef");
        findings.required_name(build.name.as_deref(), &at, "name a module that has been built");
        findings.optional_name(build.vm_name.as_deref(), &at.key("vmName"));
    }
    if let Some(image) = source.container_disk.as_deref() {
        container_disk(findings, image, &at.key("containerDisk"));
    }
    if let Some(pvc) = &source.source_pvc
        && pvc.name.as_deref().is_none_or(str::is_empty)
    {
        findings.missing(&at.key("sourcePvc"), "name", "name a PersistentVolumeClaim");
    }
}

fn container_disk(findings: &mut Findings<'_>, image: &str, at: &ValuePath<'_>) {
    if image.is_empty() || image.chars().any(|c| c.is_whitespace() || c.is_control()) || image.contains("://")
    {
        findings
            .report(
                &codes::INVALID_VALUE,
                at,
                format!("expected a reference to an OCI image, but found {image:?}", image = Quoted(image)),
            )
            .help = Some("for example `quay.io/containerdisks/debian:12`, without a scheme".to_owned());
    } else if let Some(unpinned) = files::unpinned_image(image) {
        findings.report(&codes::UNPINNED_URL, at, format!("the image {unpinned}")).help =
            Some("name it by its digest: `IMAGE@sha256:…`".to_owned());
    }
}

/// Whether both fields of `resources` are required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Required {
    /// Both are required.
    Yes,
    /// An override: omitted fields keep their values.
    No,
}

/// Checks `cpu` and `memory`.
pub(super) fn resources(
    findings: &mut Findings<'_>,
    one: &Resources,
    at: &ValuePath<'_>,
    required: Required,
) {
    match &one.cpu {
        None if required == Required::Yes => {
            findings.missing(at, "cpu", "give the number of cores, such as `2`");
        }
        None => {}
        Some(cpu) => {
            let at = at.key("cpu");
            match quantity(cpu) {
                Err(error) => {
                    findings.invalid(&codes::INVALID_QUANTITY, &at, &error);
                }
                Ok(cores) if cores.milli() == 0 || cores.ceil() > 4096 => {
                    findings.report(
                        &codes::INVALID_QUANTITY,
                        &at,
                        format!("expected more than 0 and at most 4096 cores, but found {cpu}"),
                    );
                }
                Ok(_) => {}
            }
        }
    }
    match &one.memory {
        None if required == Required::Yes => {
            findings.missing(at, "memory", "give the memory of the guest, such as `2Gi`");
        }
        None => {}
        Some(memory) => bytes(findings, "memory", memory, &at.key("memory")),
    }
}

/// Checks a quantity of bytes: at least 1Mi, at most 1Ei.
fn bytes(findings: &mut Findings<'_>, what: &str, scalar: &Scalar, at: &ValuePath<'_>) {
    match quantity(scalar) {
        Err(error) => {
            findings.invalid(&codes::INVALID_QUANTITY, at, &error).help = Some(
                "use the units Ki, Mi, Gi, Ti (powers of 1024) or k, M, G, T (powers of 1000)".to_owned(),
            );
        }
        Ok(quantity) if quantity.ceil() < LEAST_BYTES => {
            let bytes = quantity.ceil();
            findings
                .report(
                    &codes::INVALID_QUANTITY,
                    at,
                    format!("expected at least 1Mi of {what}, but found {scalar}, which is {bytes} bytes"),
                )
                .help = Some("write the unit, as in `512Mi` or `2Gi`".to_owned());
        }
        Ok(quantity) if quantity.ceil() > 1 << 60 => {
            findings.report(
                &codes::INVALID_QUANTITY,
                at,
                format!("expected at most 1Ei of {what}, but found {scalar}"),
            );
        }
        Ok(_) => {}
    }
}

fn disks(findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>) {
    let at = at.key("disks");
    findings.unique("disk", &at, vm.disks.iter().map(|disk| disk.name.as_deref()));
    // With `buildRef` the boot disk is inherited, and none of these disks boots.
    let inherits = vm.source.as_ref().and_then(source_kind) == Some(SourceKind::BuildRef);
    for (index, one) in vm.disks.iter().enumerate() {
        let boots = index == 0 && !inherits;
        disk(findings, one, &at.index(index), boots);
    }
}

fn disk(findings: &mut Findings<'_>, disk: &Disk, at: &ValuePath<'_>, boots: bool) {
    findings.required_name(disk.name.as_deref(), at, "name the disk; the captured disk has this name");
    if let Some(size) = &disk.size {
        bytes(findings, "disk", size, &at.key("size"));
    }
    let Some(written) = disk.bus.as_deref() else { return };
    let at = at.key("bus");
    match bus(written) {
        None => {
            findings.unknown_value(&at, written, BUSES);
        }
        Some(Bus::Usb) if boots => {
            findings
                .report(&codes::BOOT_DISK_ON_USB, &at, "expected the boot disk on another bus, but found usb")
                .help = Some("use virtio, scsi, sata or ide, or put another disk first".to_owned());
        }
        Some(_) => {}
    }
}

const BUSES: &[&str] = &["virtio", "scsi", "sata", "usb", "ide"];

/// Returns the bus with this name.
pub(crate) fn bus(name: &str) -> Option<Bus> {
    Some(match name {
        "virtio" => Bus::Virtio,
        "scsi" => Bus::Scsi,
        "sata" => Bus::Sata,
        "usb" => Bus::Usb,
        "ide" => Bus::Ide,
        _ => return None,
    })
}
