//! Scripts: how they get into the guest, run there as files, and are removed afterwards.
//!
//! One channel does it all. A small command makes a private directory and reads a *bundle* from its standard input: a
//! prelude of shell lines followed by the script. When all of it has arrived, the prelude extracts the script into a
//! separate file, exports the environment, and replaces itself (`exec`) with the interpreter, so its exit status is
//! that of the script. No part of the environment or the script is on a command line, where every user of the guest
//! could read it.
//!
//! A second channel removes the directory afterwards; if the run is dropped before its end, it also ends the processes.

use super::{Guest, exec::quote};
use crate::{
    Error, ErrorKind, Result,
    event::{CommandStatus, OutputStream},
};
use bytes::Bytes;
use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

/// Parents for a private directory, tried in this order: a file system may be read-only, full, or mounted `noexec`. The
/// user's home is tried last.
const PARENTS: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// A script and how it is run. `Debug` shows neither the text nor the values of the environment.
#[derive(Clone)]
#[non_exhaustive]
pub struct Script {
    /// The text. A `#!` first line selects the interpreter; without one, it is bash with `set -e`, or sh where there is
    /// no bash. If the first line ends with CR LF, line endings are converted to those of Unix; a byte order mark is
    /// removed.
    pub text: Arc<str>,
    /// The environment. Names are those of shell variables.
    pub env: BTreeMap<String, String>,
    /// A line of shell that runs the script, with `{{ .Command }}` for its path.
    pub execute_command: Option<String>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Script").field("env", &self.env.keys()).finish_non_exhaustive()
    }
}

impl Script {
    /// Returns a script with no environment of its own, run directly.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self { text: text.into(), env: BTreeMap::new(), execute_command: None }
    }

    /// Sets the environment.
    #[must_use]
    pub fn env(mut self, env: BTreeMap<String, String>) -> Self {
        self.env = env;
        self
    }

    /// Sets the line of shell that runs the script.
    #[must_use]
    pub fn execute_command(mut self, command: Option<String>) -> Self {
        self.execute_command = command;
        self
    }

    /// Returns what is sent: shell lines, followed by the script.
    pub(super) fn bundle(&self, directory: &RunDirectory) -> Result<Bytes> {
        let text = self.unix_text();
        let mut exports = String::new();
        for (name, value) in &self.env {
            let name_ok = name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
                && !name.starts_with(|c: char| c.is_ascii_digit())
                && !name.is_empty();
            if !name_ok {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "expected the name of an environment variable such as HTTP_PROXY, but found {name:?}"
                    ),
                ));
            }
            if value.contains('\0') {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "the environment variable {name} contains a NUL character, which no process can receive"
                    ),
                ));
            }
            let _ = writeln!(exports, "export {name}={}", single_quote(value));
        }
        let (dir, inner, marker) = (&directory.dir, directory.inner(), &directory.marker);
        let (script, pid) = (format!("{inner}/script"), format!("{dir}/pid"));
        // Whatever the script's environment must not affect (through PATH, for instance) is resolved before the
        // environment is exported.
        let shell = "if command -v bash >/dev/null 2>&1; then s=bash; else s=sh; fi\n";
        let run = match shebang(&text) {
            Some((interpreter, Some(argument))) => {
                format!("exec {} {} {script}", single_quote(interpreter), single_quote(argument))
            }
            Some((interpreter, None)) => format!("exec {} {script}", single_quote(interpreter)),
            None => format!("exec \"$s\" -e {script}"),
        };
        let failed = format!("{{ echo \"{marker}: failed: cannot write into {dir}\" >&2; exit 125; }}");
        let body = match &self.execute_command {
            None => {
                // `s` is resolved to a path before the environment is exported, since that may change PATH.
                format!("{shell}s=$(command -v \"$s\")\necho $$ >{pid} || {failed}\n{exports}{run}\n")
            }
            Some(command) => {
                let command = command.replace("{{ .Command }}", "{{.Command}}");
                let command = command.replace("{{.Command}}", &format!("{inner}/run"));
                let end = format!("END_{}", directory.token);
                format!(
                    "{{\ncat >{inner}/run <<'{end}'\n#!/bin/sh\n{shell}s=$(command -v \"$s\")\n{exports}{run} \"$@\"\n{end}\n\
                     }} || {failed}\n\
                     {{\ncat >{dir}/command <<'{end}'\n{command}\n{end}\n}} || {failed}\n\
                     chmod 755 {inner} {inner}/run {inner}/script && chmod 711 {dir} || {failed}\n\
                     umask 022\n{shell}echo $$ >{pid} || {failed}\nexec \"$s\" {dir}/command\n"
                )
            }
        };
        let make = if inner == *dir { String::new() } else { format!("mkdir {inner} || {failed}\n") };
        // The umask of the private directory must not apply to the script.
        let restore = if self.execute_command.is_none() { "umask \"$1\"\n" } else { "" };
        let prelude = |cut: usize| {
            format!(
                "{make}tail -n +{cut} {dir}/bundle >{script} || {failed}\nchmod 700 {script} || {failed}\n\
                 rm -f {dir}/bundle\n{restore}{body}exit 126\n"
            )
        };
        let lines = prelude(0).matches('\n').count();
        let mut bundle = prelude(lines + 1);
        bundle.push_str(&text);
        Ok(Bytes::from(bundle))
    }

    fn unix_text(&self) -> std::borrow::Cow<'_, str> {
        // With a byte order mark before `#!`, the kernel does not recognise it.
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        match text.split_once('\n') {
            Some((first, _)) if first.ends_with('\r') => text.replace("\r\n", "\n").into(),
            _ => text.into(),
        }
    }
}

/// The private directory of a run.
pub(super) struct RunDirectory {
    token: String,
    dir: String,
    // With an execute command: an inner directory whose name other users cannot list.
    pub(super) hidden: Option<String>,
    // Prefix of the lines that are Rudder's own and not the script's output.
    marker: String,
}

impl RunDirectory {
    pub(super) fn new(parent: &str, token: &str, hidden: bool) -> Self {
        Self {
            token: token.to_owned(),
            dir: format!("{parent}/rudder-{token}"),
            hidden: hidden.then(|| format!("{:016x}", rand::random::<u64>())),
            marker: format!("rudder-{token}"),
        }
    }

    pub(super) fn inner(&self) -> String {
        match &self.hidden {
            Some(hidden) => format!("{}/{hidden}", self.dir),
            None => self.dir.clone(),
        }
    }

    /// Returns the command that makes the directory, reads the bundle, checks that it is complete, and replaces itself
    /// with it.
    pub(super) fn bootstrap(&self, size: usize) -> String {
        let (dir, marker) = (&self.dir, &self.marker);
        let probe = if self.hidden.is_some() {
            format!("printf '#!/bin/sh\\n' >{dir}/probe && chmod 755 {dir}/probe && {dir}/probe && ")
        } else {
            String::new()
        };
        format!(
            "u=$(umask); umask 077; mkdir {dir} && {probe}cat >{dir}/bundle || \
             {{ rm -rf {dir}; echo \"{marker}: unusable\" >&2; exit 125; }}; \
             [ $(wc -c <{dir}/bundle) -eq {size} ] || {{ rm -rf {dir}; echo \"{marker}: cut\" >&2; exit 125; }}; \
             exec /bin/sh {dir}/bundle \"$u\""
        )
    }
}

/// Ends the remaining processes of a run in a guest and removes its directory: first as the user, then with sudo where
/// that is allowed.
pub(super) const CLEAN_UP: &str = r#"
d=$1; how=$2
as() { "$@" 2>/dev/null || sudo -n "$@" 2>/dev/null; }
look() { l=; read -r l <"/proc/$1/stat" || return 1; set -- ${l##*) }; state=$1; parent=$2; session=$4; }
alive() { for v in $victims; do [ -d "/proc/$v" ] && look "$v" && [ "$state" != Z ] && return 0; done 2>/dev/null; return 1; }
if [ "$how" = kill ] && read -r p <"$d/pid" && look $$; then
    mine=$session
    if look "$p"; then
        theirs=$session; victims=" $p "; before=
        [ "$theirs" = "$mine" ] && theirs=none
        while [ "$victims" != "$before" ]; do
            before=$victims
            for f in /proc/[0-9]*; do
                q=${f#/proc/}
                case $victims in *" $q "*) continue ;; esac
                look "$q" || continue
                if [ "$session" = "$theirs" ]; then victims="$victims$q "
                else case $victims in *" $parent "*) victims="$victims$q " ;; esac; fi
            done
        done
        as kill -TERM $victims
        for i in 1 2 3 4 5 6 7 8 9 10; do alive || break; sleep 0.2 || sleep 1; done
        alive && as kill -KILL $victims
    fi
fi 2>/dev/null
rm -rf "$d" 2>/dev/null
[ ! -e "$d" ] || sudo -n rm -rf "$d"
"#;

/// Ends a run and removes its directory when dropped before it was finished.
struct CleanUpOnDrop {
    guest: Guest,
    dir: Option<String>,
}

impl CleanUpOnDrop {
    async fn remove(mut self) {
        if let Some(dir) = self.dir.take() {
            clean_up(self.guest.clone(), dir, "leave").await;
        }
    }
}

impl Drop for CleanUpOnDrop {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let guest = self.guest.clone();
            self.guest.shared.cleanups.spawn_on(clean_up(guest, dir, "kill"), &runtime);
        }
    }
}

pub(super) fn clean_up_script(dir: &str, how: &str) -> String {
    format!("set -- {} {how}\n{}", quote(dir), CLEAN_UP.trim())
}

async fn clean_up(guest: Guest, dir: String, how: &'static str) {
    let command = clean_up_script(&dir, how);
    let mut ignore = |_: OutputStream, _: &str| {};
    let cleaning = guest.shell("cleaning up", &command, Bytes::new(), &mut ignore);
    // The time is limited, since a guest may have gone down.
    let done = tokio::time::timeout(Duration::from_secs(30), cleaning).await;
    if !matches!(done, Ok(Ok(_))) {
        tracing::debug!(dir, "could not clean up in the guest");
    }
}

impl Guest {
    /// Runs a script, and passes on its output line by line while it runs; see [`MAX_LINE`](super::MAX_LINE) for long
    /// lines. The script has no input. If a signal ended it, the exit status may be what shells report: 128 plus the
    /// number of the signal. Its directory is removed before this returns; a process that it left in the background
    /// continues.
    ///
    /// Dropping the future ends the script and its children, and removes its directory: [`settle`](Guest::settle) waits
    /// for that.
    ///
    /// # Errors
    /// `GuestUnreachable` when the connection breaks; `InvalidInput` for an environment that no process can receive;
    /// `StepFailed` when the guest has no usable directory for the script. A script that fails is not an error here.
    pub async fn run(
        &self,
        script: &Script,
        mut output: impl FnMut(OutputStream, &str) + Send,
    ) -> Result<CommandStatus> {
        let token = format!("{:016x}", rand::random::<u64>());
        let mut why = Vec::new();
        for parent in PARENTS {
            if let Some(status) = self.run_in(parent, &token, script, &mut output, &mut why).await? {
                return Ok(status);
            }
        }
        let home = self.command("cd && pwd").await?;
        let home = home.stdout.trim();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        if home.starts_with('/')
            && home.chars().all(plain)
            && let Some(status) = self.run_in(home, &token, script, &mut output, &mut why).await?
        {
            return Ok(status);
        }
        Err(Error::new(
            ErrorKind::StepFailed,
            format!("the guest has no directory in which user {:?} can create and run a script", self.user()),
        )
        .with_source(Error::new(ErrorKind::StepFailed, why.join("; ")))
        .with_help(
            "check whether its disk is full, or whether /tmp, /var/tmp and the home directory are \
             read-only or mounted noexec",
        ))
    }

    /// Runs a script in a directory below `parent`. Returns `None` if that cannot be used, with the reason in `why`.
    async fn run_in(
        &self,
        parent: &str,
        token: &str,
        script: &Script,
        output: &mut (impl FnMut(OutputStream, &str) + Send),
        why: &mut Vec<String>,
    ) -> Result<Option<CommandStatus>> {
        let directory = RunDirectory::new(parent, token, script.execute_command.is_some());
        let bundle = script.bundle(&directory)?;
        let bootstrap = directory.bootstrap(bundle.len());
        let clean_up_on_drop = CleanUpOnDrop { guest: self.clone(), dir: Some(directory.dir.clone()) };
        let mut ours = None;
        // Until the bundle is complete, output is about the directory; afterwards it is the script's.
        let mut said = Vec::new();
        let prefix = format!("{}: ", directory.marker);
        let status = self
            .shell("a script ran", &bootstrap, bundle, &mut |stream, text| {
                if let Some(message) = text.strip_prefix(&prefix) {
                    ours = Some(message.to_owned());
                } else if stream == OutputStream::Stderr && text.contains(&directory.dir) && ours.is_none() {
                    // This may be the reason why the directory cannot be used. It is passed on in case it is the
                    // script's own output.
                    said.push(text.to_owned());
                    output(stream, text);
                } else {
                    output(stream, text);
                }
            })
            .await?;
        match ours.as_deref() {
            None => {
                clean_up_on_drop.remove().await;
                Ok(Some(status))
            }
            Some("cut") => Err(Error::new(
                ErrorKind::StepFailed,
                format!("the script could not be written to {parent} in the guest: {}", said.join("; ")),
            )
            .with_help("check whether its disk is full")),
            Some(_) => {
                clean_up_on_drop.remove().await;
                why.push(if said.is_empty() { format!("{parent} cannot be used") } else { said.join("; ") });
                Ok(None)
            }
        }
    }
}

/// Quotes a text, always: a value may begin with any character.
fn single_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Returns the interpreter of a `#!` line and its single argument, as the kernel parses it (execve(2)).
fn shebang(text: &str) -> Option<(&str, Option<&str>)> {
    let line = text.strip_prefix("#!")?.lines().next()?.trim_matches([' ', '\t']);
    let (interpreter, argument) = match line.split_once([' ', '\t']) {
        Some((interpreter, argument)) => (interpreter, Some(argument.trim_matches([' ', '\t']))),
        None => (line, None),
    };
    (!interpreter.is_empty()).then_some((interpreter, argument))
}
