//! Plans machines: turns a checked spec into what will be done.
//!
//! Everything here reads values that were already checked; a `None` would mean that a check is missing.

use super::{
    BootAction, Hardware, PlanContext, PlannedBuildRef, PlannedCloudInit, PlannedCommunicator,
    PlannedContent, PlannedDisk, PlannedFile, PlannedMachine, PlannedNetwork, PlannedNic, PlannedSource,
    PlannedStep, PlannedUrl, StepAction, context::InputKind, network::Macs, reference, support::Support,
};
use crate::{
    capability::Capability,
    check::{
        DEFAULT_DISK, DEFAULT_DISK_SIZE, SourceKind, StepKind, bus, duration, quantity, shell, source_kind,
        step_kind, unpinned, unpinned_image,
    },
    hardware::{Bus, Firmware, GuestShell},
    keys::{BootToken, parse_boot_command},
    manifest::{
        BuildSpec, Communicator, FileNames, FileStep, Provisioner, Resources, ShellStep, ValueFrom, Vm,
        VmOverride, YamlMapping,
    },
    secret::{Secret, secrets_of, values},
};
use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

/// Default of `sshTimeout`.
const SSH_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Plans the machines of one build, and collects their secrets, and the reasons why the build cannot be repeated.
#[derive(Debug)]
pub(super) struct Planner<'m> {
    pub(super) context: &'m PlanContext,
    pub(super) support: Support<'m>,
    pub(super) spec: &'m BuildSpec,
    pub(super) macs: Macs<'m>,
    pub(super) secrets: Vec<Secret>,
    pub(super) known_secrets: HashSet<Secret>,
    /// The overrides of each VM, and the index of each file, by name.
    pub(super) overrides: HashMap<&'m str, Vec<&'m VmOverride>>,
    pub(super) file_indices: HashMap<String, usize>,
    pub(super) not_repeatable: Vec<String>,
    pub(super) files: Vec<PlannedFile>,
}

impl Planner<'_> {
    pub(super) fn files(&mut self) -> Option<()> {
        for file in &self.spec.files {
            let name = file.name.clone()?;
            let content = match (&file.inline, &file.url) {
                (Some(text), None) => PlannedContent::Inline(text.as_bytes().into()),
                (None, Some(url)) => {
                    PlannedContent::Url(self.url(url, file.checksum.as_deref(), &format!("file {name}"))?)
                }
                _ => return None,
            };
            self.file_indices.insert(name.clone(), self.files.len());
            self.files.push(PlannedFile { name, content });
        }
        Some(())
    }

    /// Resolves a URL that is downloaded for `role`.
    fn url(&mut self, url: &str, checksum: Option<&str>, role: &str) -> Option<PlannedUrl> {
        let url = super::urls::resolve_url(url, self.context).ok()?;
        secrets_of(&url).iter().for_each(|secret| self.remember(secret));
        let sha256 = match checksum {
            Some(checksum) => Some(checksum.parse().ok()?),
            None => {
                self.not_repeatable.push(format!("{role} has no checksum"));
                None
            }
        };
        if let Some(unpinned) = unpinned(&url) {
            self.not_repeatable.push(format!("the URL of {role} {unpinned}"));
        }
        Some(PlannedUrl { url, sha256 })
    }

    /// Returns the value of a named input, and records the values of a Secret as secrets.
    fn input(&mut self, from: &ValueFrom) -> Option<Arc<[u8]>> {
        let (kind, reference, _) = reference::input(from)?;
        let bytes = self.named(kind, reference.name.as_deref()?, reference.key.as_deref()?)?;
        // Scripts, user data and files contain secrets, which may be output on their own.
        if kind == InputKind::Secret
            && let Ok(text) = std::str::from_utf8(&bytes)
        {
            values(text).iter().for_each(|value| self.remember(value));
        }
        Some(bytes)
    }

    fn named(&mut self, kind: InputKind, name: &str, key: &str) -> Option<Arc<[u8]>> {
        let bytes = self.context.inputs.get(kind, name, key)?;
        if kind == InputKind::Secret {
            match std::str::from_utf8(bytes) {
                Ok(text) => self.remember(text),
                // Bytes that are not UTF-8 appear only as base64.
                Err(_) => self.remember(&BASE64_STANDARD_NO_PAD.encode(bytes)),
            }
        }
        Some(bytes.into())
    }

    fn remember(&mut self, secret: &str) {
        let secret = Secret::new(secret.trim_end_matches(['\r', '\n']));
        if !secret.expose().is_empty() && self.known_secrets.insert(secret.clone()) {
            self.secrets.push(secret);
        }
    }

    pub(super) fn machine(
        &mut self,
        vm: &Vm,
        template_network: &PlannedNetwork,
        network: &PlannedNetwork,
    ) -> Option<PlannedMachine> {
        let name = vm.name.clone()?;
        let source = self.source(vm, &name)?;
        let nics = self.macs.plan_nics(&name, &vm.nics, &[], template_network)?;
        let template = self.hardware(vm, nics)?;
        let mut hardware = template.clone();
        for one in self.overrides.get(name.as_str()).into_iter().flatten() {
            if let Some(resources) = &one.resources {
                let (cpus, memory) = amounts(resources)?;
                hardware.cpus = cpus.unwrap_or(hardware.cpus);
                hardware.memory = memory.unwrap_or(hardware.memory);
            }
            if !one.nics.is_empty() {
                hardware.nics = self.macs.plan_nics(&name, &one.nics, &template.nics, network)?;
            }
        }
        let mut isos = Vec::with_capacity(vm.isos.len());
        for (index, iso) in vm.isos.iter().enumerate() {
            let role = format!("ISO {} of VM {name}", index + 1);
            isos.push(self.url(iso.url.as_deref()?, iso.checksum.as_deref(), &role)?);
        }
        let communicator = self.communicator(vm)?;
        let mut steps = Vec::with_capacity(vm.provisioners.len());
        for step in &vm.provisioners {
            steps.push(self.step(step, communicator.shell, &name)?);
        }
        Some(PlannedMachine {
            source,
            hardware,
            template,
            isos,
            floppy: vm.floppy.as_ref().map_or(Some(Vec::new()), file_names)?,
            cloud_init: match &vm.cloud_init {
                None => None,
                Some(cloud_init) => Some(PlannedCloudInit {
                    user_data: match (&cloud_init.user_data, &cloud_init.user_data_from) {
                        (Some(text), _) => Some(text.as_str().into()),
                        (None, Some(from)) => Some(std::str::from_utf8(&self.input(from)?).ok()?.into()),
                        (None, None) => None,
                    },
                    network_data: cloud_init.network_data.clone(),
                }),
            },
            communicator,
            boot_command: boot_command(&vm.boot_command, &name)?,
            steps,
            invisible: vm.invisible.unwrap_or(false),
            name,
        })
    }

    fn source(&mut self, vm: &Vm, name: &str) -> Option<PlannedSource> {
        let source = vm.source.as_ref()?;
        Some(match source_kind(source)? {
            SourceKind::Blank => PlannedSource::Blank,
            SourceKind::Url => {
                let role = format!("source of VM {name}");
                PlannedSource::Url(self.url(source.url.as_deref()?, source.checksum.as_deref(), &role)?)
            }
            SourceKind::BuildRef => {
                let (module, machine) = reference::parent(source.build_ref.as_ref()?, self.context)?;
                if !module.provenance.not_repeatable.is_empty() {
                    let reason =
                        format!("module {}, the source of VM {name}, is not repeatable itself", module.name);
                    self.not_repeatable.push(reason);
                }
                PlannedSource::BuildRef(PlannedBuildRef {
                    module: module.name.clone(),
                    digest: module.digest,
                    vm: machine.name.clone(),
                })
            }
            SourceKind::ContainerDisk => {
                let image = source.container_disk.clone()?;
                if let Some(unpinned) = unpinned_image(&image) {
                    self.not_repeatable.push(format!("the image of VM {name} {unpinned}"));
                }
                PlannedSource::ContainerDisk { image }
            }
            SourceKind::SourcePvc => {
                let pvc = source.source_pvc.as_ref()?;
                self.not_repeatable
                    .push(format!("the source of VM {name} is a volume, which changes over time"));
                PlannedSource::SourcePvc { name: pvc.name.clone()?, namespace: pvc.namespace.clone() }
            }
        })
    }

    fn hardware(&self, vm: &Vm, nics: Vec<PlannedNic>) -> Option<Hardware> {
        let (cpus, memory) = amounts(vm.resources.as_ref()?)?;
        let firmware = match &vm.efi_firmware {
            None => Firmware::Bios,
            Some(efi) if efi.secure_boot == Some(true) => Firmware::UefiSecureBoot,
            Some(_) => Firmware::Uefi,
        };
        let tpm_by_default = firmware != Firmware::Bios && self.support.has(Capability::Tpm);
        Some(Hardware {
            cpus: cpus?,
            memory: memory?,
            firmware,
            tpm: vm.tpm.unwrap_or(tpm_by_default),
            disks: self.disks(vm)?,
            nics,
        })
    }

    fn disks(&self, vm: &Vm) -> Option<Vec<PlannedDisk>> {
        let source = vm.source.as_ref()?;
        let mut disks = Vec::new();
        let inherits = source_kind(source)? == SourceKind::BuildRef;
        if inherits {
            let (_, machine) = reference::parent(source.build_ref.as_ref()?, self.context)?;
            disks.extend(machine.disks.iter().map(|disk| PlannedDisk {
                name: disk.name.clone(),
                size: None,
                bus: disk.bus,
                storage_class: None,
                inherited: true,
            }));
        }
        for disk in &vm.disks {
            disks.push(PlannedDisk {
                name: disk.name.clone()?,
                size: Some(match &disk.size {
                    Some(size) => quantity(size).ok()?.ceil(),
                    None => DEFAULT_DISK_SIZE,
                }),
                bus: bus(disk.bus.as_deref().unwrap_or("virtio"))?,
                storage_class: disk.storage_class.clone(),
                inherited: false,
            });
        }
        if disks.is_empty() {
            disks.push(PlannedDisk {
                name: DEFAULT_DISK.to_owned(),
                size: Some(DEFAULT_DISK_SIZE),
                bus: Bus::Virtio,
                storage_class: None,
                inherited: false,
            });
        }
        Some(disks)
    }

    fn communicator(&mut self, vm: &Vm) -> Option<PlannedCommunicator> {
        let default = Communicator::default();
        let written = vm.communicator.as_ref().unwrap_or(&default);
        if let Some(password) = &written.ssh_password {
            self.remember(password.expose());
        }
        let private_key = match &written.ssh_private_key_secret {
            None => None,
            Some(key) => {
                let bytes = self.named(InputKind::Secret, key.name.as_deref()?, key.key.as_deref()?)?;
                Some(Secret::new(std::str::from_utf8(&bytes).ok()?))
            }
        };
        Some(PlannedCommunicator {
            shell: shell(vm)?,
            username: written.ssh_username.clone().unwrap_or_else(|| "root".to_owned()),
            port: u16::try_from(written.ssh_port.unwrap_or(22)).ok()?,
            password: written.ssh_password.clone(),
            private_key,
            timeout: match &written.ssh_timeout {
                Some(timeout) => duration(timeout).ok()?,
                None => SSH_TIMEOUT,
            },
        })
    }

    fn step(&mut self, step: &Provisioner, shell: GuestShell, vm: &str) -> Option<PlannedStep> {
        let kind = step_kind(step)?;
        let action = match kind {
            StepKind::Shell => self.shell(step.shell.as_ref()?)?,
            StepKind::File => self.file(step.file.as_ref()?)?,
            StepKind::Reboot => {
                let command = step.reboot.as_ref().and_then(|reboot| reboot.command.clone());
                let default = match shell {
                    GuestShell::Bash => "sudo reboot",
                    GuestShell::Powershell => "shutdown /r /f /t 0",
                };
                StepAction::Reboot { command: command.unwrap_or_else(|| default.to_owned()) }
            }
            StepKind::WindowsUpdate => {
                let update = step.windows_update.clone().unwrap_or_default();
                StepAction::WindowsUpdate {
                    search_criteria: update.search_criteria,
                    filters: update.filters,
                    update_limit: u32::try_from(update.update_limit.unwrap_or(1000)).ok()?,
                }
            }
            StepKind::Handbuild => {
                self.not_repeatable.push(format!("VM {vm} has a handbuild step, which needs a person"));
                StepAction::Handbuild { instructions: step.handbuild.as_ref()?.instructions.clone()? }
            }
        };
        Some(PlannedStep {
            name: step.name.clone().unwrap_or_else(|| kind.name().to_owned()),
            timeout: match &step.step_timeout {
                Some(timeout) => Some(duration(timeout).ok()?),
                None => None,
            },
            action,
        })
    }

    fn shell(&mut self, step: &ShellStep) -> Option<StepAction> {
        let script: Arc<str> = match (&step.inline, &step.script_from) {
            (Some(lines), None) => lines.text().into(),
            (None, Some(from)) => std::str::from_utf8(&self.input(from)?).ok()?.into(),
            _ => return None,
        };
        let mut env = BTreeMap::new();
        for (name, value) in step.env.iter().flat_map(YamlMapping::entries) {
            let value = match value {
                serde_yaml::Value::String(text) => text.clone(),
                serde_yaml::Value::Number(number) => number.to_string(),
                serde_yaml::Value::Bool(value) => value.to_string(),
                _ => return None,
            };
            env.insert(name.as_str()?.to_owned(), value);
        }
        Some(StepAction::Shell { script, env, execute_command: step.execute_command.clone() })
    }

    fn file(&mut self, step: &FileStep) -> Option<StepAction> {
        let (content, label) = match (step.file_ref.as_deref(), &step.source) {
            (Some(name), None) => {
                let file = &self.files[*self.file_indices.get(name)?];
                (file.content.clone(), name.to_owned())
            }
            (None, Some(from)) => {
                let (_, reference, _) = reference::input(from)?;
                let label = format!("{}/{}", reference.name.as_deref()?, reference.key.as_deref()?);
                (PlannedContent::Inline(self.input(from)?), label)
            }
            _ => return None,
        };
        Some(StepAction::File { content, label, destination: step.destination.clone()? })
    }
}

/// Returns cores and bytes, where set.
fn amounts(resources: &Resources) -> Option<(Option<u32>, Option<u64>)> {
    let cpus = match &resources.cpu {
        Some(cpu) => Some(u32::try_from(quantity(cpu).ok()?.ceil()).ok()?.max(1)),
        None => None,
    };
    let memory = match &resources.memory {
        Some(memory) => Some(quantity(memory).ok()?.ceil()),
        None => None,
    };
    Some((cpus, memory))
}

/// Returns the names in a list of files.
pub(super) fn file_names(list: &FileNames) -> Option<Vec<String>> {
    list.files.iter().map(|file| file.name.clone()).collect()
}

fn boot_command(written: &[String], vm: &str) -> Option<Vec<BootAction>> {
    let (tokens, mistakes) = parse_boot_command(written.iter().map(String::as_str));
    if !mistakes.is_empty() {
        return None;
    }
    let named = |text: &str| text.replace("{{ .Name }}", vm);
    let action = |token| match token {
        // The address of the file server is only known at run time; the name is known now.
        BootToken::Text(text) => BootAction::Type(named(&text)),
        BootToken::Press(key) => BootAction::Press(key),
        BootToken::Hold(key) => BootAction::Hold(key),
        BootToken::Release(key) => BootAction::Release(key),
        BootToken::Wait(duration) => BootAction::Wait(duration),
        BootToken::WaitText { text, limit } => BootAction::WaitText { text: named(&text), limit },
        BootToken::WaitSerial { text, limit } => BootAction::WaitSerial { text: named(&text), limit },
    };
    Some(tokens.into_iter().map(action).collect())
}
