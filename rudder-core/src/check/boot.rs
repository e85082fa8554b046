//! Checks of boot commands. Each mistake is located inside its string if the source holds the string verbatim.

use super::{
    codes::{self, Code},
    findings::Findings,
};
use crate::{
    keys::{
        BOOT_VARIABLES, BootMistake, BootMistakeKind, DEFAULT_WAIT_LIMIT, nearest_token, parse_boot_command,
    },
    manifest::{BuildSpec, ValuePath},
    units::human_duration,
};
use std::ops::Range;

pub(super) fn command(findings: &mut Findings<'_>, command: &[String], at: &ValuePath<'_>) {
    if command.is_empty() {
        return;
    }
    let (_, mistakes) = parse_boot_command(command.iter().map(String::as_str));
    for mistake in mistakes {
        report(findings, &command[mistake.element], &mistake, at);
    }
}

/// Reports templates that refer to the file server when no files are served, at most once per VM.
pub(super) fn unserved(findings: &mut Findings<'_>, spec: &BuildSpec, at: &ValuePath<'_>) {
    let serves = spec.http_directory.as_ref().is_some_and(|directory| !directory.files.is_empty());
    if serves || findings.written(false, &at.key("httpDirectory")) {
        return;
    }
    let vms = at.key("vms");
    for (index, vm) in spec.vms.iter().enumerate() {
        let vm_at = vms.index(index);
        let command = vm_at.key("bootCommand");
        let found = vm.boot_command.iter().enumerate().find_map(|(element, text)| {
            let of_server = |(_, inside): &(Range<usize>, &str)| matches!(*inside, ".HTTPIP" | ".HTTPPort");
            templates(text).find(of_server).map(|(range, _)| (element, text, range))
        });
        let Some((element, text, range)) = found else { continue };
        let message =
            format!("expected files to serve, which {} needs, but found none", &text[range.clone()]);
        let help = "name files in `httpDirectory`".to_owned();
        report_in_element(
            findings,
            &codes::BOOT_COMMAND_VARIABLE,
            (message, help),
            text,
            range,
            &command.index(element),
        );
    }
}

/// Upper bound for the length of a variable name, including surrounding spaces.
const MAX_TEMPLATE: usize = 64;

/// Returns the range of each `{{…}}` in a text, and its trimmed content.
fn templates(text: &str) -> impl Iterator<Item = (Range<usize>, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        loop {
            let start = at + text[at..].find("{{")?;
            // If this is not a template, the next one may begin inside it.
            at = start + 2;
            let window = &text[at..text.floor_char_boundary(at + MAX_TEMPLATE)];
            if let Some(length) = window.find("}}") {
                return Some((start..at + length + 2, window[..length].trim()));
            }
        }
    })
}

fn report(findings: &mut Findings<'_>, text: &str, mistake: &BootMistake, at: &ValuePath<'_>) {
    let BootMistake { found, .. } = mistake;
    let (code, message, help) = match mistake.kind {
        BootMistakeKind::UnknownToken => (
            &codes::BOOT_COMMAND_TOKEN,
            format!("expected a token such as <enter> or <wait5s>, but found {found}"),
            match nearest_token(found) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "to type it as text, end the string after the `<` and begin the next string there"
                    .to_owned(),
            },
        ),
        BootMistakeKind::UnknownVariable => {
            let name = found.trim_matches(|c: char| "{} .".contains(c));
            (
                &codes::BOOT_COMMAND_VARIABLE,
                format!("expected a boot command variable, but found {found}"),
                match super::findings::nearest(name, BOOT_VARIABLES.iter().copied()) {
                    Some(near) => format!("did you mean `{{{{ .{near} }}}}`?"),
                    None => format!("use one of: .{}", BOOT_VARIABLES.join(", .")),
                },
            )
        }
        BootMistakeKind::UnclosedHold => (
            &codes::BOOT_COMMAND_HOLD,
            format!("expected the key of {found} to be released, but it never is"),
            format!("add `{}`", found.replace("On>", "Off>").replace("on>", "off>").replace("ON>", "OFF>")),
        ),
        BootMistakeKind::NotHeld => (
            &codes::BOOT_COMMAND_HOLD,
            format!("expected a held key, but found {found} without an `On` before it"),
            "hold the key first, or remove the token".to_owned(),
        ),
        BootMistakeKind::Untypable => (
            &codes::BOOT_COMMAND_CHARACTER,
            format!("expected characters of a US keyboard, but found {found:?}"),
            "boot commands are typed on a US keyboard".to_owned(),
        ),
        BootMistakeKind::MissingText => (
            &codes::BOOT_COMMAND_WAIT,
            format!("expected the text to wait for, in quotes, but found {found}"),
            "write it as in `<waitText 'login:' 90s>`".to_owned(),
        ),
        BootMistakeKind::UnclosedText => (
            &codes::BOOT_COMMAND_WAIT,
            format!("expected a closing quote and then `>`, but found {found}"),
            "write it as in `<waitText 'login:' 90s>`, and double each quote inside the text".to_owned(),
        ),
        BootMistakeKind::BadLimit => (
            &codes::BOOT_COMMAND_WAIT,
            format!("expected a duration of more than 0, such as 90s or 2m, and then `>`, but found {found}"),
            format!("leave it out to wait at most {}", human_duration(DEFAULT_WAIT_LIMIT)),
        ),
    };
    report_in_element(
        findings,
        code,
        (message, help),
        text,
        mistake.range.clone(),
        &at.index(mistake.element),
    );
}

/// Reports a mistake in a part of an element, at that part.
fn report_in_element(
    findings: &mut Findings<'_>,
    code: &'static Code,
    (message, help): (String, String),
    text: &str,
    range: Range<usize>,
    element: &ValuePath<'_>,
) {
    let finding = findings.report(code, element, message);
    // Deep inside a long text, counting characters to find the column of each mistake would take too long.
    if range.start > 64 * 1024 {
        finding.help = Some(help);
        return;
    }
    finding.help = Some(help);
    if let Some(span) = &mut finding.span {
        // If the source holds the text verbatim, with or without quotes, offsets in the text map to offsets in the
        // source.
        let written = span.end.saturating_sub(span.start);
        let quote =
            written.checked_sub(text.len()).filter(|extra| matches!(extra, 0 | 2)).map(|extra| extra / 2);
        if let Some(quote) = quote
            && !text.contains('\n')
        {
            let before = text.get(..range.start).unwrap_or_default();
            let columns = u32::try_from(before.chars().count() + quote).unwrap_or(u32::MAX);
            span.column = span.column.saturating_add(columns);
            span.end = span.start + quote + range.end;
            span.start += quote + range.start;
        }
    }
}
