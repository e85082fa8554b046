//! Reports what a manifest asks for and the backend or the engine cannot do, at its line and before anything starts.

use super::PlanContext;
use crate::{
    capability::{Capabilities, Capability},
    check::{Findings, SourceKind, StepKind, bus, codes, source_kind, step_kind},
    hardware::Bus,
    keys::{BootToken, parse_boot_command},
    manifest::{BuildSpec, Nic, ValuePath, Vm},
};

/// What the backend and the engine can do.
#[derive(Debug)]
pub(super) struct Support<'c> {
    backend: &'c Capabilities,
    engine: Capabilities,
}

impl<'c> Support<'c> {
    pub(super) fn new(context: &'c PlanContext) -> Self {
        Self { backend: &context.capabilities, engine: Capabilities::engine() }
    }

    /// Whether the backend and the engine both provide a capability, as far as each is involved.
    pub(super) fn has(&self, capability: Capability) -> bool {
        self.lacking(capability).is_none()
    }

    /// Returns who lacks a capability, as text for messages, and the capability that is lacking.
    fn lacking(&self, capability: Capability) -> Option<(String, Capability)> {
        use Capability as C;
        // Whether the engine is involved, and the capability that this requires of the backend.
        let (engine, backend) = match capability {
            C::ShellStep | C::FileStep | C::RebootStep | C::WindowsUpdateStep | C::PowerShell => (true, None),
            C::BootCommand | C::HandbuildStep => (true, Some(C::Display)),
            C::CloudInit | C::Isos | C::Floppy | C::HttpDirectory | C::Clone => (true, Some(capability)),
            other => (false, Some(other)),
        };
        if engine && !self.engine.has(capability) {
            return Some((self.engine.of.clone(), capability));
        }
        let needed = backend.filter(|needed| !self.backend.has(*needed))?;
        Some((format!("the {} backend", self.backend.of), needed))
    }

    /// Reports something that needs a capability which is lacking.
    fn need(&self, findings: &mut Findings<'_>, capability: Capability, at: &ValuePath<'_>, what: &str) {
        if let Some((who, capability)) = self.lacking(capability) {
            findings.report(&codes::UNSUPPORTED, at, format!("{who} cannot {what} yet")).help =
                Some(format!("the missing capability is `{capability}`"));
        }
    }

    /// Reports a document that asks for a running clone, if clones are not supported.
    pub(super) fn clone_of_module(&self, findings: &mut Findings<'_>) {
        self.need(findings, Capability::Clone, &ValuePath::root().key("kind"), "run clones of modules");
    }

    /// Checks everything in a build.
    pub(super) fn build(&self, findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>) {
        use Capability as C;
        if let Some(network) = &spec.network {
            let at = at.key("network");
            if !network.vpcs.is_empty() {
                self.need(findings, C::Networks, &at.key("vpcs"), "create declared VPCs");
            }
            let subnets = at.key("subnets");
            if !network.subnets.is_empty() {
                self.need(findings, C::Networks, &subnets, "create declared subnets");
            }
            if self.has(C::Networks) {
                for (index, subnet) in network.subnets.iter().enumerate() {
                    if subnet.unmanaged == Some(true) {
                        let at = subnets.index(index);
                        self.need(
                            findings,
                            C::UnmanagedSubnets,
                            &at.key("unmanaged"),
                            "create unmanaged subnets",
                        );
                    }
                }
            }
        }
        if spec.http_directory.as_ref().is_some_and(|directory| !directory.files.is_empty()) {
            self.need(findings, C::HttpDirectory, &at.key("httpDirectory"), "serve files over HTTP");
        }
        let vms = at.key("vms");
        for (index, one) in spec.vms.iter().enumerate() {
            self.vm(findings, one, &vms.index(index));
        }
        if let Some(overrides) = &spec.build_overrides {
            let at = at.key("buildOverrides");
            let subnets = at.key("subnets");
            for (index, one) in overrides.subnets.iter().enumerate() {
                if one.unmanaged == Some(true) && self.has(C::Networks) {
                    let at = subnets.index(index);
                    self.need(
                        findings,
                        C::UnmanagedSubnets,
                        &at.key("unmanaged"),
                        "create unmanaged subnets",
                    );
                }
            }
            let vms = at.key("vms");
            for (index, one) in overrides.vms.iter().enumerate() {
                self.nics(findings, &one.nics, &vms.index(index).key("nics"));
            }
        }
    }

    fn vm(&self, findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>) {
        use Capability as C;
        if let Some(kind) = vm.source.as_ref().and_then(source_kind) {
            let (capability, what) = match kind {
                SourceKind::Url => (C::SourceUrl, "import images from a URL"),
                SourceKind::Blank => (C::SourceBlank, "start from a blank disk"),
                SourceKind::BuildRef => (C::SourceBuildRef, "start from a module"),
                SourceKind::ContainerDisk => (C::SourceContainerDisk, "import container disks"),
                SourceKind::SourcePvc => (C::SourcePvc, "start from a volume of a cluster"),
            };
            self.need(findings, capability, &at.key("source").key(kind.field()), what);
        }
        self.disks(findings, vm, &at.key("disks"));
        self.nics(findings, &vm.nics, &at.key("nics"));
        if vm.communicator.as_ref().is_some_and(|c| c.shell.as_deref() == Some("powershell")) {
            let at = at.key("communicator");
            self.need(findings, C::PowerShell, &at.key("shell"), "run PowerShell scripts");
        }
        if vm.cloud_init.is_some() {
            self.need(findings, C::CloudInit, &at.key("cloudInit"), "attach a cloud-init seed");
        }
        if !vm.boot_command.is_empty() {
            let at = at.key("bootCommand");
            self.need(findings, C::BootCommand, &at, "type boot commands");
            let (tokens, _) = parse_boot_command(vm.boot_command.iter().map(String::as_str));
            let waits = tokens.iter().any(|token| matches!(token, BootToken::WaitSerial { .. }));
            if waits && self.has(C::BootCommand) {
                self.need(findings, C::Serial, &at, "wait for text on the serial console");
            }
        }
        if let Some(firmware) = &vm.efi_firmware {
            let at = at.key("efiFirmware");
            self.need(findings, C::Uefi, &at, "boot with UEFI");
            if firmware.secure_boot == Some(true) && self.has(C::Uefi) {
                self.need(findings, C::SecureBoot, &at.key("secureBoot"), "enforce Secure Boot");
            }
        }
        if vm.tpm == Some(true) {
            self.need(findings, C::Tpm, &at.key("tpm"), "give a VM a TPM");
        }
        if !vm.isos.is_empty() {
            self.need(findings, C::Isos, &at.key("isos"), "attach CD-ROMs");
        }
        if vm.floppy.as_ref().is_some_and(|floppy| !floppy.files.is_empty()) {
            self.need(findings, C::Floppy, &at.key("floppy"), "attach floppies");
        }
        let steps = at.key("provisioners");
        for (index, step) in vm.provisioners.iter().enumerate() {
            let Some(kind) = step_kind(step) else { continue };
            let capability = match kind {
                StepKind::Shell => C::ShellStep,
                StepKind::File => C::FileStep,
                StepKind::Reboot => C::RebootStep,
                StepKind::WindowsUpdate => C::WindowsUpdateStep,
                StepKind::Handbuild => C::HandbuildStep,
            };
            let at = steps.index(index);
            self.need(findings, capability, &at.key("type"), &format!("run {} steps", kind.name()));
        }
    }

    fn disks(&self, findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>) {
        use Capability as C;
        let capability = |bus| match bus {
            Bus::Virtio => (C::DiskVirtio, "virtio"),
            Bus::Scsi => (C::DiskScsi, "scsi"),
            Bus::Sata => (C::DiskSata, "sata"),
            Bus::Usb => (C::DiskUsb, "usb"),
            Bus::Ide => (C::DiskIde, "ide"),
        };
        // With `buildRef` the disks are those of the parent, whose buses this backend supports.
        let inherits = vm.source.as_ref().and_then(source_kind) == Some(SourceKind::BuildRef);
        if vm.disks.is_empty() && !inherits {
            let (capability, name) = capability(Bus::Virtio);
            self.need(findings, capability, at, &format!("attach disks on {name}"));
        }
        for (index, disk) in vm.disks.iter().enumerate() {
            let Some(bus) = bus(disk.bus.as_deref().unwrap_or("virtio")) else { continue };
            let (capability, name) = capability(bus);
            self.need(findings, capability, &at.index(index).key("bus"), &format!("attach disks on {name}"));
        }
    }

    fn nics(&self, findings: &mut Findings<'_>, nics: &[Nic], at: &ValuePath<'_>) {
        use Capability as C;
        for (index, nic) in nics.iter().enumerate() {
            let at = at.index(index);
            if nic.model.is_some() {
                self.need(findings, C::NicModels, &at.key("model"), "set the model of a NIC");
            }
            if nic.slot.is_some() {
                self.need(findings, C::NicSlots, &at.key("slot"), "pin a NIC to a slot");
            }
            if nic.ip.is_some() {
                self.need(findings, C::Networks, &at.key("ip"), "give a NIC a fixed address");
            }
        }
    }
}
