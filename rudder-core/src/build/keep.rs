//! Keeps the machines of a failed build for inspection.

use super::{attempt::Attempt, machines::BuildMachine};
use crate::{
    Error, ErrorKind, Result,
    backend::{Backend, KeptLab, KeptLogin},
    guest::{BuildKey, Login},
    secret::Secret,
};
use std::path::PathBuf;

/// Keeps the lab and returns how to log in to each machine: with the build's key, which is written to a file for that, or with the
/// key that the author provided. The record is also written to the lab's directory, for [`Backend::kept_labs`].
pub(super) async fn keep(attempt: &Attempt) -> Result<KeptLab> {
    let mut kept = attempt.lab.keep().await?;
    let machines = attempt.machines.list();
    let mut written: Option<PathBuf> = None;
    let mut access = Vec::new();
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
            Some(path) => word(&path.display().to_string()),
            None => "THE_KEY_OF_THE_MANIFEST".to_owned(),
        };
        if let Some(address) = defined.machine().reachable_at(communicator.port) {
            // Host keys were pinned for the build only; asking a person to confirm one on loopback would protect nothing.
            access.push(format!(
                "{}: ssh -i {identity} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
                 -o UserKnownHostsFile=/dev/null -p {} {}@{}",
                planned.name,
                address.port(),
                word(&login.username),
                address.ip(),
            ));
        } else if let Some(command) = defined.machine().proxy_command(communicator.port) {
            // OpenSSH expands tokens that begin with a percent sign (ssh_config(5)).
            let proxy = word(&format!("ProxyCommand={}", command.replace('%', "%%")));
            access.push(format!(
                "{0}: ssh -i {identity} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
                 -o UserKnownHostsFile=/dev/null -o {proxy} {1}@{0}",
                planned.name,
                word(&login.username),
            ));
        } else if login.key.is_some() {
            access.push(format!("{}: the key of {} is {identity}", planned.name, word(&login.username)));
        }
        kept.logins.push(login);
    }
    access.append(&mut kept.access);
    kept.access = access;
    if let Some(directory) = attempt.lab.directory() {
        let record = kept.clone();
        let writing = tokio::task::spawn_blocking(move || record.write(&directory));
        writing
            .await
            .map_err(|error| Error::new(ErrorKind::Internal, "a task panicked").with_source(error))??;
    }
    Ok(kept)
}

/// Writes the build's key into the lab's directory, so that it is removed with the lab, or else into the report directory.
async fn write_key(attempt: &Attempt) -> Result<PathBuf> {
    let path = match attempt.lab.directory() {
        Some(directory) => directory.join("login.key"),
        None => {
            let dir = attempt.options.report_dir.clone().unwrap_or_else(std::env::temp_dir);
            // `$TMPDIR` may be relative, and the path may be read from another working directory.
            let dir = std::path::absolute(&dir).unwrap_or(dir);
            let made = tokio::fs::create_dir_all(&dir).await;
            made.map_err(|error| Error::io(format_args!("create the directory {}", dir.display()), error))?;
            dir.join(format!("{}.key", attempt.lab.id()))
        }
    };
    attempt.key.write(&path).await?;
    Ok(path)
}

/// Returns the machines of a lab that was kept, by this process or by another, for access to their consoles, and to their guests
/// with the key that was kept with them.
///
/// # Errors
/// `NotFound` when the lab does not exist; `Unsupported` when the backend cannot reach the machines of a kept lab; `Io` or
/// `InvalidInput` when the key cannot be read.
///
/// ```no_run
/// # use rudder_core::{Result, backend::Backend, build::kept_machines};
/// # use std::time::Duration;
/// async fn look_into(backend: &dyn Backend) -> Result<()> {
///     for lab in backend.kept_labs().await? {
///         for machine in kept_machines(backend, &lab).await? {
///             let guest = machine.guest(Duration::from_secs(30)).await?;
///             println!("{}: logged in as {}", machine.name(), guest.user());
///         }
///     }
///     Ok(())
/// }
/// ```
pub async fn kept_machines(backend: &dyn Backend, lab: &KeptLab) -> Result<Vec<BuildMachine>> {
    let machines = backend.kept_machines(&lab.id).await?;
    let known = machines.into_iter().map(|machine| {
        let login = lab.logins.iter().find(|login| login.vm == machine.name());
        let port = login.map_or(22, |login| login.port);
        Ok(BuildMachine::new(machine, port, login.map(login_of).transpose()?.flatten()))
    });
    known.collect()
}

/// Returns the recorded login; `None` if the author has the key.
fn login_of(login: &KeptLogin) -> Result<Option<Login>> {
    let Some(path) = &login.key else { return Ok(None) };
    let failed = |error| Error::io(format_args!("read the key {}", path.display()), error);
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Ok(Some(Login::new(&login.username, BuildKey::import(&Secret::new(text))?)))
}

/// Quotes a text as a single word of a POSIX shell.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::word;

    #[test]
    fn a_word_stays_one_word() {
        assert_eq!(word("/tmp/a-b.key"), "/tmp/a-b.key");
        assert_eq!(word("a b"), "'a b'");
        assert_eq!(word("it's; rm"), r"'it'\''s; rm'");
        assert_eq!(word(""), "''");
    }
}
