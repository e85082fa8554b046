//! Plans for tests, built without a manifest: the engine must not depend on where a plan comes from.

use rudder_core::plan::Plan;
use serde_json::{Value, json};

/// Returns a plan of these VMs, with a limit of 30 minutes and no retries.
pub fn plan(machines: Vec<Value>) -> Value {
    json!({
        "name": "web",
        "digest": "11".repeat(32),
        "manifest": "vms: [{name: a}]\n# hunter2\n",
        "machines": machines,
        "network": network(),
        "template_network": network(),
        "http_files": [],
        "files": [],
        "timeout": 30 * 60 * 1000,
        "retries": 0,
        "iso_cache_ttl": 0,
        "secrets": ["hunter2"],
        "not_repeatable": [],
    })
}

/// Converts a plan to the engine's type.
pub fn read(plan: Value) -> Plan {
    serde_json::from_value(plan).unwrap()
}

fn network() -> Value {
    json!({
        "declared": false,
        "vpcs": [{"name": "default", "internet": true}],
        "subnets": [{
            "name": "default", "vpc": "default", "cidr": "10.0.2.0/24", "dhcp": true, "dns": [], "unmanaged": false
        }],
    })
}

/// Returns a VM that starts from an image, with these steps.
pub fn vm(name: &str, steps: Vec<Value>) -> Value {
    let hardware = json!({
        "cpus": 1,
        "memory": 1u64 << 30,
        "firmware": "bios",
        "tpm": false,
        "disks": [
            {"name": "rootdisk", "size": 20u64 << 30, "bus": "virtio", "storage_class": null, "inherited": false},
            {"name": "data", "size": 1u64 << 30, "bus": "scsi", "storage_class": null, "inherited": false},
        ],
        "nics": [{
            "name": "nic1", "subnet": "default", "slot": 1, "slot_pinned": false, "ip": null,
            "mac": "52:54:00:00:00:01", "model": "virtio"
        }],
    });
    let mut template = hardware.clone();
    template["memory"] = json!(2u64 << 30);
    json!({
        "name": name,
        "source": {"url": {"url": "http://images.test/base.qcow2", "sha256": null}},
        "hardware": hardware,
        "template": template,
        "isos": [],
        "floppy": [],
        "cloud_init": {"user_data": null, "network_data": null},
        "communicator": {
            "shell": "bash", "username": "root", "port": 22, "password": null, "private_key": null,
            "timeout": 5 * 60 * 1000
        },
        "boot_command": [],
        "steps": steps,
        "invisible": false,
    })
}

/// Returns a step that runs this script.
pub fn shell(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "timeout": null,
        "action": {"shell": {"script": script, "env": {}, "execute_command": null}},
    })
}

/// Returns a step that copies a file into the guest.
pub fn file(url: &str, destination: &str) -> Value {
    json!({
        "name": "file",
        "timeout": null,
        "action": {"file": {
            "content": {"url": {"url": url, "sha256": null}}, "label": "tool", "destination": destination
        }},
    })
}
