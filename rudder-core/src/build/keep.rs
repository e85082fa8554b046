//! Keeps the machines of a failed build for inspection.

use super::{attempt::Attempt, machines::BuildMachine};
use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, KeptLab, KeptLogin, LabInfo},
    guest::{BuildKey, Login},
    secret::Secret,
};
use std::{path::PathBuf, time::SystemTime};

/// The file of a kept lab with the private key that logs in to its machines.
const KEY_FILE: &str = "login.key";

/// Keeps the lab and returns how to log in to each machine: with the build's key, which is written to a file for that, or with the
/// key that the author provided. The record is also stored with the lab, for [`kept_labs`].
pub(super) async fn keep(attempt: &Attempt) -> Result<KeptLab> {
    let expires = attempt.options.keep_for.and_then(|time| SystemTime::now().checked_add(time));
    let notices = attempt.lab.keep(expires).await?;
    let machines = attempt.machines.list();
    let mut kept = KeptLab::new(attempt.lab.id().clone(), Vec::new());
    let mut written: Option<PathBuf> = None;
    for planned in &attempt.plan.machines {
        let communicator = &planned.communicator;
        let Some(defined) = machines.iter().find(|machine| machine.name() == planned.name) else { continue };
        let key = match (&communicator.private_key, &written) {
            (Some(_), _) => None,
            (None, Some(path)) => Some(path.clone()),
            (None, None) => Some(written.insert(write_key(attempt).await?).clone()),
        };
        let login = KeptLogin::new(&planned.name, &communicator.username, communicator.port, key);
        let identity = match &login.key {
            Some(path) => shell_word(&path.display().to_string()),
            None => "THE_KEY_OF_THE_MANIFEST".to_owned(),
        };
        if let Some(address) = defined.machine().reachable_at(communicator.port) {
            // Host keys were pinned for the build only; asking a person to confirm one on loopback would protect nothing.
            kept.access.push(format!(
                "{}: ssh -i {identity} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
                 -o UserKnownHostsFile=/dev/null -p {} {}@{}",
                planned.name,
                address.port(),
                shell_word(&login.username),
                address.ip(),
            ));
        } else if let Some(command) = defined.machine().proxy_command(communicator.port) {
            // OpenSSH expands tokens that begin with a percent sign (ssh_config(5)).
            let proxy = shell_word(&format!("ProxyCommand={}", command.replace('%', "%%")));
            kept.access.push(format!(
                "{0}: ssh -i {identity} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
                 -o UserKnownHostsFile=/dev/null -o {proxy} {1}@{0}",
                planned.name,
                shell_word(&login.username),
            ));
        } else if login.key.is_some() {
            kept.access.push(format!(
                "{}: the key of {} is {identity}",
                planned.name,
                shell_word(&login.username)
            ));
        }
        kept.logins.push(login);
    }
    kept.access.extend(machines.iter().flat_map(|machine| machine.machine().access()));
    kept.access.extend(notices);
    attempt.lab.store_file(KeptLab::FILE, &kept.to_record()?).await?;
    Ok(kept)
}

/// Stores the build's key with the lab, so that it is removed with it. Where programs on this host do not find the files of the
/// lab, the key is also written into the report directory.
async fn write_key(attempt: &Attempt) -> Result<PathBuf> {
    let key = attempt.key.to_openssh()?;
    if let Some(path) = attempt.lab.store_file(KEY_FILE, key.expose().as_bytes()).await? {
        return Ok(path);
    }
    let dir = attempt.options.report_dir.clone().unwrap_or_else(std::env::temp_dir);
    // `$TMPDIR` may be relative, and the path may be read from another working directory.
    let dir = std::path::absolute(&dir).unwrap_or(dir);
    let made = tokio::fs::create_dir_all(&dir).await;
    made.map_err(|error| Error::io(format_args!("create the directory {}", dir.display()), error))?;
    let path = dir.join(format!("{}.key", attempt.lab.id()));
    attempt.key.write(&path).await?;
    Ok(path)
}

/// Returns the kept labs, sorted by id: those that failed builds left for inspection, with their logins, and others, without.
///
/// # Errors
/// Those of [`Backend::labs`]; `Unsupported` and `InvalidInput` for a record that cannot be read.
pub async fn kept_labs(backend: &dyn Backend) -> Result<Vec<KeptLab>> {
    let mut kept = Vec::new();
    for lab in backend.labs().await?.into_iter().filter(LabInfo::is_kept) {
        match backend.lab_file(&lab.id, KeptLab::FILE).await {
            Ok(Some(record)) => kept.push(KeptLab::from_record(&lab.id, &record)?),
            Ok(None) => kept.push(KeptLab::new(lab.id, Vec::new())),
            // It was removed after it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kept)
}

/// Returns the machines of a lab that was kept, by this process or by another, for access to their consoles, and to their guests
/// with the key that was kept with them.
///
/// # Errors
/// Those of [`Backend::attach`]; `Io` or `InvalidInput` when the key cannot be read.
///
/// ```no_run
/// # use rudder_core::{Result, backend::Backend, build::{kept_labs, kept_machines}};
/// # use std::time::Duration;
/// async fn look_into(backend: &dyn Backend) -> Result<()> {
///     for lab in kept_labs(backend).await? {
///         for machine in kept_machines(backend, &lab).await? {
///             let guest = machine.guest(Duration::from_secs(30)).await?;
///             println!("{}: logged in as {}", machine.name(), guest.user());
///         }
///     }
///     Ok(())
/// }
/// ```
pub async fn kept_machines(backend: &dyn Backend, lab: &KeptLab) -> Result<Vec<BuildMachine>> {
    let machines = backend.attach(&lab.id).await?.machines().await?;
    let stored = backend.lab_file(&lab.id, KEY_FILE).await?;
    let known = machines.into_iter().map(|machine| {
        let login = lab.logins.iter().find(|login| login.vm == machine.name());
        let port = login.map_or(22, |login| login.port);
        let known = login.map(|login| login_of(login, stored.as_deref())).transpose()?;
        Ok(BuildMachine::new(machine, port, known.flatten()))
    });
    known.collect()
}

/// Returns the recorded login, with the key that is stored with the lab, or else the one in the recorded file; `None` if the author
/// has the key.
fn login_of(login: &KeptLogin, stored: Option<&[u8]>) -> Result<Option<Login>> {
    let Some(path) = &login.key else { return Ok(None) };
    let text = match stored {
        Some(stored) => String::from_utf8_lossy(stored).into_owned(),
        None => std::fs::read_to_string(path)
            .map_err(|error| Error::io(format_args!("read the key {}", path.display()), error))?,
    };
    Ok(Some(Login::new(&login.username, BuildKey::import(&Secret::new(text))?)))
}

/// Quotes a text as a single word of a POSIX shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::shell_word;

    #[test]
    fn a_quoted_text_is_a_single_shell_word() {
        assert_eq!(shell_word("/tmp/a-b.key"), "/tmp/a-b.key");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's; rm"), r"'it'\''s; rm'");
        assert_eq!(shell_word(""), "''");
    }
}
