//! Checks of guest access: the communicator, cloud-init, and whether Rudder has any way to log in.

use super::{
    codes,
    findings::{Findings, Zero},
    scripts,
    vm::{SourceKind, source_kind},
};
use crate::{
    hardware::GuestShell,
    manifest::{KeyRef, ValueFrom, ValuePath, Vm},
    visible::Quoted,
};

/// Returns the shell of a VM's guest, or `None` for an unknown one, which `communicator` reports.
pub(crate) fn shell(vm: &Vm) -> Option<GuestShell> {
    match vm.communicator.as_ref().and_then(|communicator| communicator.shell.as_deref()) {
        None | Some("bash") => Some(GuestShell::Bash),
        Some("powershell") => Some(GuestShell::Powershell),
        Some(_) => None,
    }
}

pub(super) fn communicator(findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>) {
    let Some(communicator) = &vm.communicator else { return };
    let at = at.key("communicator");
    if let Some(kind) = communicator.r#type.as_deref()
        && kind != "ssh"
    {
        findings.unknown_value(&at.key("type"), kind, &["ssh"]);
    }
    if let Some(written) = communicator.shell.as_deref()
        && shell(vm).is_none()
    {
        findings.unknown_value(&at.key("shell"), written, &["bash", "powershell"]);
    }
    if let Some(user) = communicator.ssh_username.as_deref()
        && (user.is_empty() || user.len() > 256 || user.chars().any(|c| c.is_control() || c == ':'))
    {
        findings.report(
            &codes::INVALID_VALUE,
            &at.key("sshUsername"),
            format!("expected a user name, but found {user:?}", user = Quoted(user)),
        );
    }
    if let Some(port) = communicator.ssh_port
        && !(1..=65535).contains(&port)
    {
        findings.report(
            &codes::INVALID_VALUE,
            &at.key("sshPort"),
            format!("expected a port from 1 to 65535, but found {port}"),
        );
    }
    if let Some(reference) = &communicator.ssh_private_key_secret {
        key_ref(findings, reference, &at.key("sshPrivateKeySecret"));
    }
    findings.duration(communicator.ssh_timeout.as_ref(), &at.key("sshTimeout"), Zero::Refused);
}

pub(super) fn cloud_init(findings: &mut Findings<'_>, vm: &Vm, at: &ValuePath<'_>) {
    if let Some(cloud_init) = &vm.cloud_init {
        let at = at.key("cloudInit");
        if let Some(from) = &cloud_init.user_data_from {
            if cloud_init.user_data.is_some() {
                findings.exclusive(&at, "userData", "userDataFrom");
            }
            value_from(findings, from, &at.key("userDataFrom"));
        }
        if let Some(text) = cloud_init.user_data.as_deref() {
            scripts::user_data(findings, text, &at.key("userData"));
        }
        return;
    }
    let kind = vm.source.as_ref().and_then(source_kind);
    // A blank disk is installed by its boot command, and the installer creates the user.
    let is_image = !matches!(kind, None | Some(SourceKind::Blank));
    let communicator = vm.communicator.as_ref();
    let can_log_in = communicator.is_some_and(|communicator| {
        communicator.ssh_password.is_some() || communicator.ssh_private_key_secret.is_some()
    });
    let field = at.key("cloudInit");
    if is_image && !can_log_in && !findings.written(false, &field) {
        findings
            .report(
                &codes::NO_LOGIN,
                at,
                "expected `cloudInit`, `sshPassword` or `sshPrivateKeySecret`, but found none of them: the \
                 login over SSH will probably fail",
            )
            .help = Some("add `cloudInit: {}`, which authorises the build's key in the guest".to_owned());
    }
}

/// Checks that exactly one of `configMapRef` and `secretRef` is present.
pub(super) fn value_from(findings: &mut Findings<'_>, from: &ValueFrom, at: &ValuePath<'_>) {
    match (&from.config_map_ref, &from.secret_ref) {
        (None, None) => {
            if !findings.written(false, &at.key("configMapRef")) {
                findings.missing(
                    at,
                    "secretRef",
                    "write `secretRef` or `configMapRef`, with `name` and `key`",
                );
            }
        }
        (Some(_), Some(_)) => findings.exclusive(at, "configMapRef", "secretRef"),
        (Some(reference), None) => key_ref(findings, reference, &at.key("configMapRef")),
        (None, Some(reference)) => key_ref(findings, reference, &at.key("secretRef")),
    }
}

fn key_ref(findings: &mut Findings<'_>, reference: &KeyRef, at: &ValuePath<'_>) {
    if reference.name.as_deref().is_none_or(str::is_empty) {
        findings.missing(at, "name", "name the object");
    }
    if reference.key.as_deref().is_none_or(str::is_empty) {
        findings.missing(at, "key", "name the key in the object");
    }
}
