//! The digest of a plan: sha256 over everything that shapes the result, in an encoding of its own.
//!
//! It covers the plan, not the text of the manifest: comments, key order, explicitly written defaults and the form of
//! the document make no difference. It leaves out what affects whether and how fast a build succeeds, but not what it
//! produces: timeouts, retries, names of steps and files in messages, files that nothing uses. Parents are covered by
//! their digest. A download is covered by its checksum alone if it has one, else by its URL. Secrets are included.
//!
//! Every struct is destructured without `..`, so that a new field cannot be forgotten. A value is encoded as its label,
//! its length and its bytes. An absent value is not encoded, so that a new optional field does not change existing
//! digests.

use super::{
    BootAction, Hardware, Plan, PlannedBuildRef, PlannedCloudInit, PlannedCommunicator, PlannedContent,
    PlannedDisk, PlannedFile, PlannedMachine, PlannedNetwork, PlannedNic, PlannedSource, PlannedStep,
    PlannedSubnet, PlannedUrl, PlannedVpc, StepAction,
};
use crate::digest::{Digest, Digester};
use serde::Serialize;
use std::collections::HashMap;

/// Computes the digest of what this plan produces; the plan's own `digest` field is ignored.
pub(super) fn digest(plan: &Plan) -> Digest {
    let mut shape = Shape::default();
    let Plan {
        name,
        digest: _,
        manifest: _,
        machines,
        network,
        template_network,
        http_files,
        files,
        timeout: _,
        retries: _,
        iso_cache_ttl: _,
        secrets: _,
        not_repeatable: _,
    } = plan;
    shape.text("rudder plan", "1");
    shape.text("name", name);
    shape.list("machines", machines, Shape::machine);
    shape.group("network", |shape| shape.network(network));
    shape.group("template-network", |shape| shape.network(template_network));
    let files: HashMap<&str, &PlannedFile> = files.iter().map(|file| (file.name.as_str(), file)).collect();
    shape.list("http-files", http_files, |shape, name| shape.named_file(name, &files));
    for machine in machines {
        shape.list("floppy", &machine.floppy, |shape, name| shape.named_file(name, &files));
    }
    shape.0.finish()
}

#[derive(Default)]
struct Shape(Digester);

impl Shape {
    fn bytes(&mut self, label: &str, value: &[u8]) {
        for part in [label.as_bytes(), value] {
            self.0.update(&(part.len() as u64).to_be_bytes());
            self.0.update(part);
        }
    }

    fn text(&mut self, label: &str, value: &str) {
        self.bytes(label, value.as_bytes());
    }

    fn maybe(&mut self, label: &str, value: Option<impl AsRef<str>>) {
        if let Some(value) = value {
            self.text(label, value.as_ref());
        }
    }

    fn number(&mut self, label: &str, value: u64) {
        self.text(label, &value.to_string());
    }

    /// Encodes a flag, only when it is true.
    fn flag(&mut self, label: &str, value: bool) {
        if value {
            self.text(label, "true");
        }
    }

    /// Encodes the string that a unit variant is serialised as.
    fn keyword(&mut self, label: &str, value: impl Serialize) {
        let keyword = serde_json::to_string(&value).unwrap_or_default();
        self.text(label, &keyword);
    }

    fn group(&mut self, label: &str, write: impl FnOnce(&mut Self)) {
        let mut inner = Self::default();
        write(&mut inner);
        self.bytes(label, inner.0.finish().as_bytes());
    }

    fn list<T>(&mut self, label: &str, values: &[T], mut write: impl FnMut(&mut Self, &T)) {
        for value in values {
            self.group(label, |shape| write(shape, value));
        }
    }

    fn machine(&mut self, machine: &PlannedMachine) {
        let PlannedMachine {
            name,
            source,
            hardware,
            template,
            isos,
            floppy: _, // by content, beside the machines
            cloud_init,
            communicator,
            boot_command,
            steps,
            invisible,
        } = machine;
        self.text("name", name);
        self.group("source", |shape| shape.source(source));
        self.group("hardware", |shape| shape.hardware(hardware));
        self.group("template", |shape| shape.hardware(template));
        self.list("iso", isos, Self::url);
        if let Some(PlannedCloudInit { user_data, network_data }) = cloud_init {
            self.group("cloud-init", |shape| {
                shape.maybe("user-data", user_data.as_deref());
                shape.maybe("network-data", network_data.as_deref());
            });
        }
        let PlannedCommunicator { shell, username, port, password, private_key, timeout: _ } = communicator;
        self.keyword("shell", shell);
        self.text("username", username);
        self.number("port", (*port).into());
        self.maybe("password", password.as_ref().map(crate::secret::Secret::expose));
        self.maybe("private-key", private_key.as_ref().map(crate::secret::Secret::expose));
        self.list("boot-command", boot_command, Self::boot_action);
        self.list("step", steps, Self::step);
        self.flag("invisible", *invisible);
    }

    fn source(&mut self, source: &PlannedSource) {
        match source {
            PlannedSource::Url(url) => self.url(url),
            PlannedSource::Blank => self.flag("blank", true),
            PlannedSource::BuildRef(PlannedBuildRef { module: _, digest, vm }) => {
                self.text("module", &digest.to_string());
                self.text("vm", vm);
            }
            PlannedSource::ContainerDisk { image } => self.text("image", image),
            PlannedSource::SourcePvc { name, namespace } => {
                self.text("pvc", name);
                self.maybe("namespace", namespace.as_deref());
            }
        }
    }

    fn url(&mut self, url: &PlannedUrl) {
        let PlannedUrl { url, sha256 } = url;
        match sha256 {
            Some(sha256) => self.text("sha256", &sha256.to_string()),
            None => self.text("url", url.as_str()),
        }
    }

    fn hardware(&mut self, hardware: &Hardware) {
        let Hardware { cpus, memory, firmware, tpm, disks, nics } = hardware;
        self.number("cpus", (*cpus).into());
        self.number("memory", *memory);
        self.keyword("firmware", firmware);
        self.flag("tpm", *tpm);
        self.list("disk", disks, |shape, disk| {
            let PlannedDisk { name, size, bus, storage_class, inherited } = disk;
            shape.text("name", name);
            shape.maybe("size", size.map(|size| size.to_string()));
            shape.keyword("bus", bus);
            shape.maybe("storage-class", storage_class.as_deref());
            shape.flag("inherited", *inherited);
        });
        self.list("nic", nics, |shape, nic| {
            let PlannedNic { name, subnet, slot, slot_pinned, ip, mac, model } = nic;
            shape.text("name", name);
            shape.text("subnet", subnet);
            shape.number("slot", (*slot).into());
            shape.flag("slot-pinned", *slot_pinned);
            shape.maybe("ip", ip.map(|ip| ip.to_string()));
            shape.text("mac", &mac.to_string());
            shape.keyword("model", model);
        });
    }

    fn network(&mut self, network: &PlannedNetwork) {
        let PlannedNetwork { declared, vpcs, subnets } = network;
        self.flag("declared", *declared);
        self.list("vpc", vpcs, |shape, vpc| {
            let PlannedVpc { name, internet } = vpc;
            shape.text("name", name);
            shape.flag("internet", *internet);
        });
        self.list("subnet", subnets, |shape, subnet| {
            let PlannedSubnet { name, vpc, cidr, dhcp, dns, unmanaged } = subnet;
            shape.text("name", name);
            shape.text("vpc", vpc);
            shape.text("cidr", &cidr.to_string());
            shape.flag("dhcp", *dhcp);
            shape.list("dns", dns, |shape, server| shape.text("server", &server.to_string()));
            shape.flag("unmanaged", *unmanaged);
        });
    }

    fn named_file(&mut self, name: &str, files: &HashMap<&str, &PlannedFile>) {
        self.text("name", name);
        if let Some(PlannedFile { name: _, content }) = files.get(name) {
            self.content(content);
        }
    }

    fn content(&mut self, content: &PlannedContent) {
        match content {
            PlannedContent::Inline(bytes) => self.bytes("inline", bytes),
            PlannedContent::Url(url) => self.url(url),
        }
    }

    fn boot_action(&mut self, action: &BootAction) {
        match action {
            BootAction::Type(text) => self.text("type", text),
            BootAction::Press(key) => self.number("press", (*key).into()),
            BootAction::Hold(key) => self.number("hold", (*key).into()),
            BootAction::Release(key) => self.number("release", (*key).into()),
            BootAction::Wait(duration) => self.text("wait", &duration.as_nanos().to_string()),
            // The limit affects whether there is a result, but not which.
            BootAction::WaitText { text, limit: _ } => self.text("wait-text", text),
            BootAction::WaitSerial { text, limit: _ } => self.text("wait-serial", text),
        }
    }

    fn step(&mut self, step: &PlannedStep) {
        let PlannedStep { name: _, timeout: _, action } = step;
        match action {
            StepAction::Shell { script, env, execute_command } => {
                self.text("shell", script);
                for (name, value) in env {
                    self.text("env", name);
                    self.text("value", value);
                }
                self.maybe("execute", execute_command.as_deref());
            }
            StepAction::File { content, label: _, destination } => {
                self.text("file", destination);
                self.content(content);
            }
            StepAction::Reboot { command } => self.text("reboot", command),
            StepAction::WindowsUpdate { search_criteria, filters, update_limit } => {
                self.number("windows-update", (*update_limit).into());
                self.maybe("search", search_criteria.as_deref());
                self.list("filter", filters, |shape, filter| shape.text("filter", filter));
            }
            StepAction::Handbuild { instructions } => self.text("handbuild", instructions),
        }
    }
}
