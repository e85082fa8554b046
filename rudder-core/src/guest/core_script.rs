//! Recognises the scripts that the core itself runs in guests, for a guest without a shell, such as that of the memory
//! backend.
//!
//! A script is parsed and generated again by the same functions that generate it for real guests; if a single character
//! differs, it is not recognised. So a test double understands exactly what is sent to real guests.

use super::{
    exec::is_plain,
    power::{BOOT_IDENTITY, POWER_OFF},
    script::{CLEAN_UP, RunDirectory, Script, clean_up_script},
    upload::{as_root, create, remove, write_and_verify},
};
use std::collections::BTreeMap;

/// A script of the core.
#[derive(Debug)]
pub(crate) enum CoreScript {
    /// Prints the boot identity.
    BootIdentity,
    /// Powers the guest off.
    PowerOff,
    /// Runs a script in a private directory.
    Run(Script),
    /// Ends the remaining processes of a run and removes its directory.
    CleanUp,
    /// Creates an empty file; fails if the file exists.
    Create(String),
    /// Writes its standard input to a file and creates the file's parent directories.
    Write(String),
    /// Copies a file, as root, and creates the parent directories of the copy.
    Copy {
        /// The file to copy.
        from: String,
        /// The path of the copy.
        to: String,
    },
    /// Removes a file, and directories if they are empty.
    Remove(String, Vec<String>),
}

impl CoreScript {
    /// Recognises a script by its text and its standard input; `None` for any other script.
    pub(crate) fn read(script: &str, input: &[u8]) -> Option<Self> {
        match script {
            BOOT_IDENTITY => return Some(Self::BootIdentity),
            POWER_OFF => return Some(Self::PowerOff),
            _ => {}
        }
        read_run(script, input)
            .or_else(|| read_clean_up(script))
            .or_else(|| read_create(script))
            .or_else(|| read_write(script))
            .or_else(|| read_copy(script))
            .or_else(|| read_remove(script))
    }
}

fn read_run(bootstrap: &str, bundle: &[u8]) -> Option<CoreScript> {
    let dir = bootstrap.strip_prefix("u=$(umask); umask 077; mkdir ")?.split(' ').next()?;
    let (parent, token) = dir.rsplit_once("/rudder-")?;
    let bundle = std::str::from_utf8(bundle).ok()?;
    let mut directory = RunDirectory::new(parent, token, false);
    let hidden = bundle.strip_prefix(&format!("mkdir {dir}/")).and_then(|rest| rest.split(' ').next());
    directory.hidden = hidden.map(str::to_owned);
    if directory.bootstrap(bundle.len()) != bootstrap {
        return None;
    }
    // The number of the line at which the script begins.
    let first: usize = bundle.split_once("tail -n +")?.1.split(' ').next()?.parse().ok()?;
    let (end, _) = bundle.match_indices('\n').nth(first.checked_sub(2)?)?;
    let (prelude, text) = bundle.split_at(end + 1);

    let mut exports = prelude.split_once("\ns=$(command -v \"$s\")\n")?.1;
    if hidden.is_none() {
        // The line that writes the process id.
        exports = exports.split_once('\n')?.1;
    }
    let mut env = BTreeMap::new();
    while let Some(export) = exports.strip_prefix("export ") {
        let (name, value) = export.split_once('=')?;
        let (value, rest) = unquote(value)?;
        env.insert(name.to_owned(), value);
        exports = rest.strip_prefix('\n')?;
    }
    let execute_command = hidden.and_then(|_| {
        let (_, command) = prelude.split_once(&format!("cat >{dir}/command <<'END_{token}'\n"))?;
        let (command, _) = command.split_once(&format!("\nEND_{token}\n"))?;
        Some(command.replace(&format!("{}/run", directory.inner()), "{{.Command}}"))
    });
    let script = Script::new(text).env(env).execute_command(execute_command);
    (script.bundle(&directory).ok()? == bundle).then_some(CoreScript::Run(script))
}

fn read_clean_up(script: &str) -> Option<CoreScript> {
    let (dir, how) = unquote(script.strip_suffix(CLEAN_UP.trim())?.strip_prefix("set -- ")?)?;
    (clean_up_script(&dir, how.trim()) == script).then_some(CoreScript::CleanUp)
}

fn read_create(script: &str) -> Option<CoreScript> {
    let path = script.rsplit_once('>')?.1;
    (path.chars().all(is_plain) && create(path) == script).then(|| CoreScript::Create(path.to_owned()))
}

fn read_write(script: &str) -> Option<CoreScript> {
    let (source, path) = read_write_and_verify(script)?;
    (source == "cat").then_some(CoreScript::Write(path))
}

fn read_copy(script: &str) -> Option<CoreScript> {
    let (inner, _) = unquote(script.strip_prefix("sudo -n /bin/sh -c ")?)?;
    let (source, to) = read_write_and_verify(&inner)?;
    let from = source.strip_prefix("cat ")?.to_owned();
    (as_root(&inner) == script).then_some(CoreScript::Copy { from, to })
}

/// Returns the command whose output is written, and the path of the file.
fn read_write_and_verify(script: &str) -> Option<(String, String)> {
    let (path, _) = unquote(script.strip_prefix("f=")?)?;
    let source = script.lines().rev().nth(1)?.split_once(" >\"$f\"")?.0;
    let size = script.rsplit_once(" -eq ")?.1.split(' ').next()?.parse().ok()?;
    (write_and_verify(source, &path, size) == script).then(|| (source.to_owned(), path))
}

fn read_remove(script: &str) -> Option<CoreScript> {
    let (path, mut rest) = unquote(script.strip_prefix("rm -f ")?)?;
    let mut directories = Vec::new();
    while let Some(directory) = rest.strip_prefix("; rmdir ") {
        let (directory, more) = unquote(directory)?;
        directories.push(directory);
        rest = more.strip_prefix(" 2>/dev/null")?;
    }
    (remove(&path, &directories) == script).then_some(CoreScript::Remove(path, directories))
}

/// Parses a word that was quoted for a shell. Returns the word, and the text that follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let Some(mut rest) = text.strip_prefix('\'') else {
        let end = text.find(|c| !is_plain(c)).unwrap_or(text.len());
        return (end > 0).then(|| (text[..end].to_owned(), &text[end..]));
    };
    let mut word = String::new();
    loop {
        let (part, after) = rest.split_once('\'')?;
        word.push_str(part);
        let Some(more) = after.strip_prefix("\\''") else { return Some((word, after)) };
        word.push('\'');
        rest = more;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn scripts_of_users_are_not_recognised() {
        for script in [
            "",
            "reboot",
            "sudo -n reboot",
            "rm -rf /tmp/x",
            "rm -f /tmp/x && true",
            "f=/x; d=/\ncat >\"$f\" && [ 1 -eq 1 ] && exit 0\n",
            "sudo -n /bin/sh -c 'id'",
            "umask 077; set -C; : >/tmp/x; id",
            "set -- /tmp/x leave\nrm -rf \"$d\"",
            "u=$(umask); umask 077; mkdir /tmp/rudder-1 && cat >/tmp/rudder-1/bundle",
        ] {
            assert!(CoreScript::read(script, b"tail -n +2\n").is_none(), "{script}");
        }
    }

    #[test]
    fn scripts_of_the_core_are_recognised() {
        let read = |script: &str| CoreScript::read(script, b"").unwrap();
        assert!(matches!(read(BOOT_IDENTITY), CoreScript::BootIdentity));
        assert!(matches!(read(POWER_OFF), CoreScript::PowerOff));
        for how in ["kill", "leave"] {
            assert!(matches!(read(&clean_up_script("/home/a b/rudder-1", how)), CoreScript::CleanUp));
        }
        let CoreScript::Create(path) = read(&create("/tmp/rudder-1")) else { panic!() };
        assert_eq!(path, "/tmp/rudder-1");
    }

    proptest! {
        #[test]
        fn scripts_with_any_path_are_recognised(
            path in "/[ -~é\n]{1,30}", directories in prop::collection::vec("/[ -~]{1,20}", 0..3), size: u64,
        ) {
            let CoreScript::Write(read) = CoreScript::read(&write_and_verify("cat", &path, size), b"").unwrap() else { panic!() };
            prop_assert_eq!(&read, &path);
            let copy = as_root(&write_and_verify("cat /tmp/rudder-1", &path, size));
            let CoreScript::Copy { from, to } = CoreScript::read(&copy, b"").unwrap() else { panic!() };
            prop_assert_eq!((from.as_str(), &to), ("/tmp/rudder-1", &path));
            let CoreScript::Remove(file, read) = CoreScript::read(&remove(&path, &directories), b"").unwrap() else { panic!() };
            prop_assert_eq!((file, read), (path, directories));
        }

        #[test]
        fn any_script_that_is_run_is_recognised_with_its_environment(
            text in "(#!/bin/(ba)?sh( -eu)?\n)?[ -~\n]{0,60}|export A='b'\n",
            env in prop::collection::btree_map("[A-Z_][A-Z0-9_]{0,5}", "[ -~\n]{0,20}|'[ -~]*\n|export X='", 0..3),
            execute_command in prop::option::of("[ -~]{0,10}\\{\\{\\.Command\\}\\}[ -~\n]{0,10}|export A='b'|sudo"),
        ) {
            let script = Script::new(text.as_str()).env(env.clone()).execute_command(execute_command.clone());
            let directory = RunDirectory::new("/var/tmp", "0123456789abcdef", execute_command.is_some());
            let bundle = script.bundle(&directory).unwrap();
            let Some(CoreScript::Run(read)) = CoreScript::read(&directory.bootstrap(bundle.len()), &bundle) else { panic!() };
            prop_assert_eq!(&*read.text, text);
            prop_assert_eq!((read.env, read.execute_command), (env, execute_command));
            // A truncated bundle is not recognised.
            prop_assert!(CoreScript::read(&directory.bootstrap(bundle.len()), &bundle[1..]).is_none());
        }
    }
}
