//! Checks of texts for the guest: scripts, their environment, and user data for cloud-init. What cannot work or would
//! be ignored is reported at its line, not in the middle of a build.

use super::{codes, findings::Findings};
use crate::{
    hardware::GuestShell,
    manifest::{ValuePath, YamlMapping},
    visible::Quoted,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_yaml::Value;

/// Maximum size of a variable with its value: Linux's `MAX_ARG_STRLEN`, less the `=` and the terminator (execve(2)).
const MAX_VARIABLE: usize = 128 * 1024 - 2;
/// Maximum size of an environment: half of what Linux allows for arguments and environment with an 8 MiB stack.
const MAX_ENVIRONMENT: usize = 1024 * 1024;

/// Read-only variables of shells: to `export` one ends the shell (bash(1), dash(1)).
const READ_ONLY: [&str; 7] = ["BASHOPTS", "BASH_VERSINFO", "EUID", "OPTIND", "PPID", "SHELLOPTS", "UID"];
/// Variables that shells set themselves, overriding the environment.
const SET_BY_SHELL: [&str; 16] = [
    "_",
    "BASHPID",
    "BASH_ARGC",
    "BASH_ARGV",
    "BASH_COMMAND",
    "BASH_LINENO",
    "BASH_SOURCE",
    "BASH_SUBSHELL",
    "DIRSTACK",
    "FUNCNAME",
    "GROUPS",
    "HISTCMD",
    "IFS",
    "LINENO",
    "PIPESTATUS",
    "SHLVL",
];

/// Checks the text of a script.
pub(crate) fn script(findings: &mut Findings<'_>, text: &str, at: &ValuePath<'_>, guest: Option<GuestShell>) {
    if text.contains('\0') {
        findings.report(
            &codes::INVALID_VALUE,
            at,
            "expected a script without NUL characters, which no shell reads, but found one",
        );
    }
    if guest == Some(GuestShell::Powershell) {
        return;
    }
    let mut lines = text.split('\n').peekable();
    // If the first line ends with CR LF, all line endings are converted.
    let is_dos = lines.peek().is_some_and(|first| first.ends_with('\r')) && text.contains('\n');
    let wrong = lines.enumerate().find(|(_, line)| match is_dos {
        true => line.trim_end_matches('\r').contains('\r'),
        false => line.contains('\r'),
    });
    if let Some((line, _)) = wrong {
        findings
            .report(
                &codes::LINE_ENDS,
                at,
                format!(
                    "expected every line of the script to end with LF, but found a CR in line {}: the shell \
                     takes it as part of the command",
                    line + 1
                ),
            )
            .help = Some(
            "save the script with LF; it is converted only if its first line ends with CR LF".to_owned(),
        );
    }
}

/// Checks the environment of a script.
pub(super) fn environment(
    findings: &mut Findings<'_>,
    env: &YamlMapping,
    at: &ValuePath<'_>,
    guest: Option<GuestShell>,
) {
    let mut size = 0usize;
    for (name, value) in env.entries() {
        let Some(name) = name.as_str() else {
            findings
                .report(
                    &codes::INVALID_VALUE,
                    at,
                    "expected text as the names of variables, but found a key of another type",
                )
                .help = Some("write the name in quotes".to_owned());
            continue;
        };
        let at = at.key(name);
        variable_name(findings, name, &at, guest);
        let length = match value {
            Value::String(text) => {
                if text.contains('\0') {
                    findings.report(&codes::INVALID_VALUE, &at, "expected text without NUL, but found one");
                }
                text.len()
            }
            Value::Number(_) | Value::Bool(_) => 32,
            other => {
                let found = match other {
                    Value::Null => "nothing",
                    Value::Sequence(_) => "a list",
                    _ => "a mapping",
                };
                findings
                    .report(
                        &codes::INVALID_VALUE,
                        &at,
                        format!(
                            "expected text, a number or a boolean for the variable {name:?}, but found {found}",
                            name = Quoted(name)
                        ),
                    )
                    .help = Some("write an empty value as `\"\"`".to_owned());
                0
            }
        };
        let length = name.len() + length;
        size = size.saturating_add(length + 2);
        if length > MAX_VARIABLE {
            too_large(findings, &at, "a variable", MAX_VARIABLE, length);
        }
    }
    if size > MAX_ENVIRONMENT {
        too_large(findings, at, "an environment", MAX_ENVIRONMENT, size);
    }
}

fn too_large(findings: &mut Findings<'_>, at: &ValuePath<'_>, what: &str, limit: usize, found: usize) {
    findings
        .report(
            &codes::INVALID_VALUE,
            at,
            format!(
                "expected {what} of at most {limit} bytes, but found {found}: the guest could not start \
                 any command"
            ),
        )
        .help = Some("put large texts into the guest with a file step".to_owned());
}

/// Checks that a shell can export the name. A process may have variables with other names, but shells do not pass them
/// on reliably.
fn variable_name(findings: &mut Findings<'_>, name: &str, at: &ValuePath<'_>, guest: Option<GuestShell>) {
    let is_shell_name = !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if guest == Some(GuestShell::Powershell) {
        if name.is_empty() || name.contains(['=', '\0', '\n']) {
            let message = format!(
                "expected the name of an environment variable, but found {name:?}",
                name = Quoted(name)
            );
            findings.report(&codes::INVALID_VALUE, at, message);
        }
    } else if !is_shell_name {
        findings
            .report(
                &codes::INVALID_VALUE,
                at,
                format!(
                    "expected a variable name of letters, digits and `_` that does not begin with a digit, \
                     but found {name:?}",
                    name = Quoted(name)
                ),
            )
            .help = Some(match shell_name_from(name) {
            Some(near) if name.contains('=') => format!("for example `{near}`"),
            Some(near) => format!(
                "for example `{near}`; or set it inside the script: `env '{name}=…' \
                 command`"
            ),
            None => "shells cannot export other names".to_owned(),
        });
    } else if READ_ONLY.contains(&name) {
        findings
            .report(
                &codes::INVALID_VALUE,
                at,
                format!(
                    "expected a variable that can be set, but found {name}, which is reserved by the \
                     shell"
                ),
            )
            .help = Some("rename the variable".to_owned());
    } else if SET_BY_SHELL.contains(&name) {
        findings
            .report(
                &codes::INEFFECTIVE_FIELD,
                at,
                format!("the variable {name} has no effect: the shell sets it itself"),
            )
            .help = Some("rename the variable".to_owned());
    }
}

/// Converts `spring.profiles.active` to `SPRING_PROFILES_ACTIVE`, which Spring and others accept instead.
fn shell_name_from(name: &str) -> Option<String> {
    if name.len() > 80 || name.chars().any(char::is_control) || name.contains('\'') {
        return None;
    }
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    let like: String = name.chars().map(letter).collect();
    let like = like.trim_start_matches(|c: char| c.is_ascii_digit());
    like.contains(|c: char| c != '_').then(|| like.to_owned())
}

/// Prefixes of user data that cloud-init knows (cloud-init documentation, user data formats), in lower case.
const HEADERS: [&str; 9] = [
    "#!",
    "#cloud-config",
    "#cloud-boothook",
    "#include",
    "#part-handler",
    "#upstart-job",
    "## template: jinja",
    "## template:jinja",
    "##template: jinja",
];

/// Reports user data that cloud-init would ignore.
pub(crate) fn user_data(findings: &mut Findings<'_>, text: &str, at: &ValuePath<'_>) {
    if let Some((message, help)) = ignored(text) {
        findings.report(&codes::USER_DATA_IGNORED, at, format!("{message}: cloud-init ignores it")).help =
            Some(help);
    }
}

/// Returns why cloud-init would ignore user data, and what to do about it. Quotes nothing of the text, which may hold
/// secrets.
fn ignored(text: &str) -> Option<(String, String)> {
    if text.trim().is_empty() {
        return None;
    }
    let found = |message: &str, help: &str| Some((message.to_owned(), help.to_owned()));
    if text.starts_with('\u{feff}') {
        let message = "expected user data that begins with a header, but found a byte order mark before it";
        return found(message, "save it as UTF-8 without a byte order mark");
    }
    let start = text.trim_start();
    let head = start[..start.floor_char_boundary(4096)].to_ascii_lowercase();
    if is_mime(&head) {
        return None;
    }
    if !HEADERS.iter().any(|header| head.starts_with(header)) {
        let message =
            "expected user data that begins with `#cloud-config`, `#!` or another header, but found none";
        let help = match encoded(start) {
            true => "write it as it is, not in base64".to_owned(),
            false => "begin it with the line `#cloud-config`, or with `#!` and the interpreter of a script"
                .to_owned(),
        };
        return Some((message.to_owned(), help));
    }
    if head.starts_with("#!") && start.len() < text.len() {
        return found(
            "expected `#!` at the very beginning of the script, but found blank lines before it",
            "remove them: in YAML, begin the text in the line after `|`",
        );
    }
    let is_config = head.strip_prefix("#cloud-config").is_some_and(|rest| !rest.starts_with('-'));
    if !is_config || start.len() > 1 << 20 {
        return None;
    }
    match serde_yaml::from_str::<Value>(start) {
        Ok(Value::Mapping(_) | Value::Null) => None,
        Ok(_) => found(
            "expected a mapping after `#cloud-config`, but found something else",
            "write `key: value` lines",
        ),
        // In cloud-init the last of several equal keys wins.
        Err(error) if error.to_string().contains("duplicate") => None,
        Err(error) => {
            let line = error
                .location()
                .map(|location| format!(" in line {} of the user data", location.line()))
                .unwrap_or_default();
            Some((
                format!("expected valid YAML after `#cloud-config`, but found an error{line}"),
                "check its indentation and quotes".to_owned(),
            ))
        }
    }
}

/// Whether this is a MIME archive as cloud-init detects one; `head` is in lower case.
fn is_mime(head: &str) -> bool {
    let is_header = |line: &str| {
        line.starts_with("from ")
            || line.split_once(':').is_some_and(|(name, _)| {
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            })
    };
    head.contains("mime-version:") && head.lines().next().is_some_and(is_header)
}

/// Whether a text is user data in base64, compressed or not.
fn encoded(text: &str) -> bool {
    let digits: String = text.chars().filter(|c| !c.is_whitespace()).take(16).collect();
    digits.len() == 16
        && BASE64_STANDARD.decode(&digits).is_ok_and(|bytes| {
            bytes.starts_with(b"#") || bytes.starts_with(&[0x1f, 0x8b]) || bytes.starts_with(b"Content-")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_that_cloud_init_ignores_is_reported() {
        for text in [
            "#cloud-config\npackages: [vim]\n",
            "#cloud-config",
            "\n\n#cloud-config\n{}\n",
            "#Cloud-Config\na: 1\n",
            "#cloud-config\r\na: 1\r\n",
            "#!/bin/sh\necho\n",
            "#cloud-config-archive\n- x\n",
            "#include\nhttp://x\n",
            "#include-once\nhttp://x\n",
            "#cloud-boothook\n",
            "#part-handler\n",
            "## template: jinja\n#cloud-config\n{{ x }}: [\n",
            "MIME-Version: 1.0\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n",
            "Content-Type: multipart/mixed; boundary=x\nMIME-Version: 1.0\n\n--x\n",
            "",
            "  \n",
            "#cloud-config\na: 1\na: 2\n",
        ] {
            assert_eq!(ignored(text), None, "{text:?}");
        }
        for text in [
            "\u{feff}#cloud-config\na: 1\n",
            "packages: [vim]\n",
            "# cloud-config\na: 1\n",
            "cloud-config\na: 1\n",
            "---\n#cloud-config\na: 1\n",
            "echo hello\n",
            "\n#!/bin/sh\n",
            "#cloud-config\n- a\n",
            "#cloud-config\na: [\n",
            "#cloud-config\n\ta: 1\n",
            "I2Nsb3VkLWNvbmZpZwphOiAxCg==\n",
            "H4sIAAAAAAAAA1NOzskvTdFNzs9Ly0znAgB\n",
            "{}",
            "# mime-version: 1.0\n",
        ] {
            assert!(ignored(text).is_some(), "{text:?}");
        }
        let help = |text: &str| ignored(text).map(|(_, help)| help).unwrap_or_default();
        assert!(help("I2Nsb3VkLWNvbmZpZwphOiAxCg==\n").contains("base64"));
        assert!(!format!("{:?}", ignored("password: hunter2\n")).contains("hunter2"));
    }

    #[test]
    fn a_variable_name_that_shells_accept_is_suggested() {
        assert_eq!(shell_name_from("spring.profiles.active").as_deref(), Some("SPRING_PROFILES_ACTIVE"));
        assert_eq!(shell_name_from("9a-b").as_deref(), Some("A_B"));
        assert_eq!(shell_name_from("..."), None);
        assert_eq!(shell_name_from("a\nb"), None);
    }
}
