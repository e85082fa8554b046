//! Keeping the machines of a failed build for a person to look at.

use super::attempt::Attempt;
use crate::{Error, Result, backend::KeptLab};
use std::path::PathBuf;

/// Keeps the lab, and says how to log in to each machine: with the build's key, which is written for that, or with the one that
/// the author gave.
pub(super) async fn keep(attempt: &Attempt) -> Result<KeptLab> {
    let mut kept = attempt.lab.keep().await?;
    let mut written: Option<PathBuf> = None;
    let machines = super::log::lock(&attempt.machines).clone();
    let mut access = Vec::new();
    for planned in &attempt.plan.machines {
        let communicator = &planned.communicator;
        let Some(machine) = machines.iter().find(|machine| machine.name() == planned.name) else { continue };
        let Some(address) = machine.reachable_at(communicator.port) else { continue };
        let identity = match (&communicator.private_key, &written) {
            (Some(_), _) => "THE_KEY_OF_THE_MANIFEST".to_owned(),
            (None, Some(path)) => word(&path.display().to_string()),
            (None, None) => {
                let path = write_key(attempt).await?;
                let shown = word(&path.display().to_string());
                written = Some(path);
                shown
            }
        };
        // Host keys were pinned for the build only; asking a person to confirm one on loopback would protect nothing.
        access.push(format!(
            "{}: ssh -i {identity} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             -p {} {}@{}",
            planned.name,
            address.port(),
            word(&communicator.username),
            address.ip(),
        ));
    }
    access.append(&mut kept.access);
    kept.access = access;
    Ok(kept)
}

async fn write_key(attempt: &Attempt) -> Result<PathBuf> {
    let dir = attempt.options.report_dir.clone().unwrap_or_else(std::env::temp_dir);
    let made = tokio::fs::create_dir_all(&dir).await;
    made.map_err(|error| Error::io(format_args!("make the directory {}", dir.display()), error))?;
    let path = dir.join(format!("{}.key", attempt.lab.id()));
    attempt.key.write(&path).await?;
    Ok(path)
}

/// A word of a POSIX shell that stands for exactly this text.
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
