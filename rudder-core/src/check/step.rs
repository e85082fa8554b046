//! Checks of provisioners: the type, the block of that type, and that no other block is present.

use super::{
    access, codes,
    files::Names,
    findings::{Findings, Zero},
    scripts,
};
use crate::{
    hardware::GuestShell,
    manifest::{FileStep, Provisioner, ShellStep, ValuePath},
    visible::Quoted,
};

/// Maximum length of the name of a step, in characters.
const MAX_NAME: usize = 200;

/// The kind of a provisioner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StepKind {
    Shell,
    File,
    Reboot,
    WindowsUpdate,
    Handbuild,
}

impl StepKind {
    const ALL: [Self; 5] = [Self::Shell, Self::File, Self::Reboot, Self::WindowsUpdate, Self::Handbuild];
    const TYPES: [&str; 5] = ["shell", "file", "reboot", "windows-update", "handbuild"];

    /// Returns the value of `type` for this kind.
    pub(crate) fn name(self) -> &'static str {
        Self::TYPES[self as usize]
    }

    /// Returns the field that holds the block of this kind.
    fn block(self) -> &'static str {
        match self {
            Self::WindowsUpdate => "windowsUpdate",
            other => other.name(),
        }
    }

    fn is_in(self, step: &Provisioner) -> bool {
        match self {
            Self::Shell => step.shell.is_some(),
            Self::File => step.file.is_some(),
            Self::Reboot => step.reboot.is_some(),
            Self::WindowsUpdate => step.windows_update.is_some(),
            Self::Handbuild => step.handbuild.is_some(),
        }
    }
}

/// Returns the kind that the `type` of a provisioner selects.
pub(crate) fn step_kind(step: &Provisioner) -> Option<StepKind> {
    let name = step.r#type.as_deref()?;
    StepKind::ALL.into_iter().find(|kind| kind.name() == name)
}

pub(super) fn step(
    findings: &mut Findings<'_>,
    step: &Provisioner,
    at: &ValuePath<'_>,
    names: &Names<'_>,
    guest: Option<GuestShell>,
) {
    let kind = step_kind(step);
    match (step.r#type.as_deref(), kind) {
        (None, _) => {
            findings.missing(at, "type", "use shell, file, reboot, windows-update or handbuild");
        }
        (Some(other), None) => findings.unknown_value(&at.key("type"), other, &StepKind::TYPES),
        (Some(_), Some(kind)) => blocks(findings, step, kind, at),
    }
    if let Some(name) = step.name.as_deref()
        && name.chars().count() > MAX_NAME
    {
        findings.report(
            &codes::INVALID_VALUE,
            &at.key("name"),
            format!(
                "expected a name of at most {MAX_NAME} characters, but found {name:?}",
                name = Quoted(name)
            ),
        );
    }
    findings.duration(step.step_timeout.as_ref(), &at.key("stepTimeout"), Zero::Refused);
    if let Some(block) = &step.shell {
        shell(findings, block, &at.key("shell"), guest);
    }
    if let Some(block) = &step.file {
        file(findings, block, &at.key("file"), names, guest);
    }
    if let Some(block) = &step.reboot
        && block.command.as_deref().is_some_and(|command| command.trim().is_empty())
    {
        let at = at.key("reboot");
        findings
            .report(&codes::INVALID_VALUE, &at.key("command"), "expected a command, but found empty text")
            .help = Some("leave it out to use the default command of the guest".to_owned());
    }
    if let Some(block) = &step.windows_update {
        let at = at.key("windowsUpdate");
        if let Some(limit) = block.update_limit
            && !(1..=100_000).contains(&limit)
        {
            findings.report(
                &codes::INVALID_VALUE,
                &at.key("updateLimit"),
                format!("expected 1 to 100000 updates, but found {limit}"),
            );
        }
        let filters = at.key("filters");
        for (index, filter) in block.filters.iter().enumerate() {
            if !filter.starts_with("include:") && !filter.starts_with("exclude:") {
                findings.report(
                    &codes::INVALID_VALUE,
                    &filters.index(index),
                    format!(
                        "expected `include:` or `exclude:` and an expression, but found {filter:?}",
                        filter = Quoted(filter)
                    ),
                );
            }
        }
    }
    if let Some(block) = &step.handbuild {
        let at = at.key("handbuild");
        if block.instructions.as_deref().is_none_or(|text| text.trim().is_empty()) {
            findings.missing(
                &at,
                "instructions",
                "describe every click, key and value, so that the next person can repeat the step",
            );
        }
    }
    if kind == Some(StepKind::Handbuild) {
        findings
            .report(
                &codes::NOT_REPEATABLE,
                &at.key("type"),
                "a handbuild step waits for a person: the build cannot be repeated from its manifest alone",
            )
            .help = Some("write a script for it where possible".to_owned());
    }
}

/// Reports a missing block if the type requires one, and any block of another type.
fn blocks(findings: &mut Findings<'_>, step: &Provisioner, kind: StepKind, at: &ValuePath<'_>) {
    let others: Vec<StepKind> =
        StepKind::ALL.into_iter().filter(|other| *other != kind && other.is_in(step)).collect();
    for other in &others {
        findings
            .report(
                &codes::STEP_MISMATCH,
                &at.key(other.block()),
                format!(
                    "expected the block `{}` in a step of type {}, but found `{}`",
                    kind.block(),
                    kind.name(),
                    other.block()
                ),
            )
            .help = Some(format!("write `type: {}`, or remove the block", other.name()));
    }
    let needed = matches!(kind, StepKind::Shell | StepKind::File | StepKind::Handbuild);
    if needed && !kind.is_in(step) && others.is_empty() {
        findings.missing(
            at,
            kind.block(),
            &format!("add the block, which configures a step of type {}", kind.name()),
        );
    }
}

fn shell(findings: &mut Findings<'_>, step: &ShellStep, at: &ValuePath<'_>, guest: Option<GuestShell>) {
    match (&step.inline, &step.script_from) {
        (Some(_), Some(_)) => findings.exclusive(at, "inline", "scriptFrom"),
        (None, None) if !findings.written(false, &at.key("scriptFrom")) => {
            findings.missing(
                at,
                "inline",
                "give the script as text or as a list of lines, or use `scriptFrom`",
            );
        }
        _ => {}
    }
    if let Some(from) = &step.script_from {
        access::value_from(findings, from, &at.key("scriptFrom"));
    }
    if let Some(command) = step.execute_command.as_deref() {
        execute_command(findings, command, &at.key("executeCommand"));
    }
    if let Some(lines) = &step.inline {
        scripts::script(findings, &lines.text(), &at.key("inline"), guest);
    }
    if let Some(env) = &step.env {
        scripts::environment(findings, env, &at.key("env"), guest);
    }
}

/// Checks that `executeCommand` contains the path of the script, and no unknown variable.
fn execute_command(findings: &mut Findings<'_>, command: &str, at: &ValuePath<'_>) {
    let mut rest = command;
    let mut names_script = false;
    while let Some(start) = rest.find("{{") {
        let Some(length) = rest[start..].find("}}") else { break };
        let found = &rest[start..start + length + 2];
        rest = &rest[start + length + 2..];
        if found[2..found.len() - 2].trim() == ".Command" {
            names_script = true;
        } else {
            findings
                .report(
                    &codes::INVALID_VALUE,
                    at,
                    format!("expected no variable other than {{{{ .Command }}}}, but found {found}"),
                )
                .help = Some("set environment variables in `env`".to_owned());
            return;
        }
    }
    if !names_script {
        findings
            .report(
                &codes::INVALID_VALUE,
                at,
                "expected {{ .Command }}, the path of the uploaded script, but found none",
            )
            .help = Some("for example `sudo bash {{ .Command }}`".to_owned());
    }
}

fn file(
    findings: &mut Findings<'_>,
    step: &FileStep,
    at: &ValuePath<'_>,
    names: &Names<'_>,
    guest: Option<GuestShell>,
) {
    match (step.file_ref.as_deref(), &step.source) {
        (Some(_), Some(_)) => findings.exclusive(at, "fileRef", "source"),
        (None, None) if !findings.written(false, &at.key("source")) => {
            findings.missing(at, "fileRef", "name an entry in `files`, or use `source`");
        }
        _ => {}
    }
    if let Some(name) = step.file_ref.as_deref() {
        names.refer(findings, name, &at.key("fileRef"));
    }
    if let Some(from) = &step.source {
        access::value_from(findings, from, &at.key("source"));
    }
    let Some(destination) = step.destination.as_deref() else {
        findings.missing(at, "destination", "give an absolute path in the guest");
        return;
    };
    let at = at.key("destination");
    let example = match guest {
        Some(GuestShell::Powershell) => r"C:\setup\app.msi",
        _ => "/etc/motd",
    };
    let drive = |text: &str| {
        let mut characters = text.chars();
        characters.next().is_some_and(|c| c.is_ascii_alphabetic())
            && characters.next() == Some(':')
            && matches!(characters.next(), Some('/' | '\\'))
    };
    let absolute = match guest {
        Some(GuestShell::Bash) => destination.starts_with('/'),
        Some(GuestShell::Powershell) => drive(destination),
        None => true,
    };
    if !absolute {
        findings
            .report(
                &codes::DESTINATION_NOT_ABSOLUTE,
                &at,
                format!(
                    "expected an absolute path in the guest, but found {destination:?}",
                    destination = Quoted(destination)
                ),
            )
            .help = Some(format!("for example `{example}`"));
    } else if destination.contains('\0') || destination.ends_with(['/', '\\']) {
        findings
            .report(
                &codes::INVALID_VALUE,
                &at,
                format!(
                    "expected the path of a file, but found {destination:?}",
                    destination = Quoted(destination)
                ),
            )
            .help = Some(format!("end it with the name of the file, for example `{example}`"));
    }
}
