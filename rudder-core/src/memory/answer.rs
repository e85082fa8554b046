//! How a guest responds to a script: scripts of the core are recognised, all others are answered by the rules of the
//! test.

use super::{
    files::{Node, may_write, parent},
    machine::{Boot, MachineCore},
    rules::{Act, Execution},
};
use crate::{
    guest::{CoreScript, DENIED, IS_DIRECTORY, NOT_WRITTEN, Script},
    step,
};

/// Commands that reboot and power off a guest unless a rule overrides them, with or without `sudo` in front.
const REBOOT: [&str; 3] = ["reboot", "systemctl reboot", "shutdown -r now"];
const POWER_OFF: [&str; 4] = ["poweroff", "systemctl poweroff", "shutdown -h now", "shutdown -P now"];

/// Returns what a guest does when a user runs a script that reads this input.
pub(super) fn answer(
    machine: &MachineCore,
    boot: &Boot,
    user: &str,
    script: &str,
    input: Vec<u8>,
) -> Vec<Act> {
    match CoreScript::read(script, &input) {
        Some(CoreScript::BootIdentity) => vec![Act::Stdout(format!("{}\n", boot.id).into())],
        Some(CoreScript::PowerOff) => vec![Act::PowerOff],
        Some(CoreScript::CleanUp) => Vec::new(),
        Some(CoreScript::Create(path)) => {
            let is_free = machine.with_files(|tree| tree.get(&path).is_none());
            vec![if is_free == Some(true) { write(machine, user, &path, Vec::new()) } else { Act::Exit(1) }]
        }
        Some(CoreScript::Write(path)) => vec![write(machine, user, &path, input)],
        Some(CoreScript::Copy { from, to }) => {
            let content = machine.with_files(|tree| tree.read(&from).map(<[u8]>::to_vec)).flatten();
            vec![content.map_or(Act::Exit(NOT_WRITTEN), |content| write(machine, "root", &to, content))]
        }
        Some(CoreScript::Remove(path, directories)) => {
            let removed = machine.with_files(|tree| {
                let removed = tree.remove(&path, user);
                for directory in &directories {
                    // As with `rmdir`, a directory that is not empty stays.
                    let _ = tree.remove(directory, user);
                }
                removed
            });
            vec![Act::Exit(u32::from(removed != Some(Ok(()))))]
        }
        Some(CoreScript::Run(script)) => {
            let Script { text, env, execute_command } = script;
            let (user, script) = (user.to_owned(), text.to_string());
            by_rule(machine, boot, Execution { user, script, env, execute_command })
        }
        None => {
            let (user, script) = (user.to_owned(), step::command_of(script).to_owned());
            let (env, execute_command) = Default::default();
            by_rule(machine, boot, Execution { user, script, env, execute_command })
        }
    }
}

/// Writes a file as the core's script does, and returns how that would end.
fn write(machine: &MachineCore, user: &str, path: &str, content: Vec<u8>) -> Act {
    let written = machine.with_files(|tree| {
        if tree.get(path).is_some_and(Node::is_dir) {
            return IS_DIRECTORY;
        }
        if !may_write(path, user) {
            return DENIED;
        }
        tree.make_dirs(parent(path), 0o755);
        if tree.write(path, content).is_ok() { 0 } else { NOT_WRITTEN }
    });
    Act::Exit(written.unwrap_or(NOT_WRITTEN))
}

fn by_rule(machine: &MachineCore, boot: &Boot, execution: Execution) -> Vec<Act> {
    let answer = boot.guest.rules.iter().find_map(|rule| rule.answer(&execution));
    let command = execution.script.trim();
    let command = command.strip_prefix("sudo ").unwrap_or(command);
    let answer = answer.unwrap_or_else(|| {
        if REBOOT.contains(&command) {
            vec![Act::Reboot]
        } else if POWER_OFF.contains(&command) {
            vec![Act::PowerOff]
        } else {
            Vec::new()
        }
    });
    machine.shared.executed(&machine.spec.name, execution);
    answer
}
