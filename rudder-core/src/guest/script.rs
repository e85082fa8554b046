//! Scripts: how they get into the guest, run there as files, and leave nothing behind.
//!
//! One channel does it all. A small command makes a private directory and reads a *bundle* from its standard input: a
//! prelude of shell lines with the script behind them. When all of it has come, the prelude cuts off the script into a
//! file of its own, exports the environment, and becomes (`exec`) the interpreter: so its exit status is that of the
//! script. Nothing of the environment or the script is part of a command line, where
//! every user of the guest could read it.
//!
//! A second channel removes the directory afterwards; when the run is dropped before its end, it also ends the processes.

use super::{Guest, exec::quote};
use crate::{
    Error, ErrorKind, Result,
    event::{ExitStatus, OutputStream},
};
use bytes::Bytes;
use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

/// Where a private directory may be made, tried in this order: a file system may be read-only, full, or mounted `noexec`.
/// The user's home is tried last.
const PLACES: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// A script and how it is run. `Debug` shows neither the text nor values of the environment.
#[derive(Clone)]
#[non_exhaustive]
pub struct Script {
    /// The text. A `#!` first line says what runs it; without one bash does with `set -e`, or sh where there is no bash.
    /// A text whose first line ends with CR LF gets the line ends that Unix shells understand; a byte order mark is left out.
    pub text: Arc<str>,
    /// Its environment. Names are those of shell variables.
    pub env: BTreeMap<String, String>,
    /// A line of shell that runs it, with `{{ .Command }}` for the path of the script.
    pub execute_command: Option<String>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Script").field("env", &self.env.keys()).finish_non_exhaustive()
    }
}

impl Script {
    /// A script with no environment of its own, run directly.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self { text: text.into(), env: BTreeMap::new(), execute_command: None }
    }

    /// With this environment.
    #[must_use]
    pub fn with_env(mut self, env: BTreeMap<String, String>) -> Self {
        self.env = env;
        self
    }

    /// Run by this line.
    #[must_use]
    pub fn with_execute_command(mut self, command: Option<String>) -> Self {
        self.execute_command = command;
        self
    }

    /// What is sent: shell lines, and the script behind them.
    pub(super) fn bundle(&self, place: &Place) -> Result<Bytes> {
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
        let (dir, inner, marker) = (&place.dir, place.inner(), &place.marker);
        let (script, pid) = (format!("{inner}/script"), format!("{dir}/pid"));
        // What must not be changed by the script's environment (a PATH, say) is looked up before it is exported.
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
                // `s` is looked up, then the environment takes over; `command -v` gave a name, PATH may have changed.
                format!("{shell}s=$(command -v \"$s\")\necho $$ >{pid} || {failed}\n{exports}{run}\n")
            }
            Some(command) => {
                let command = command.replace("{{ .Command }}", "{{.Command}}");
                let command = command.replace("{{.Command}}", &format!("{inner}/run"));
                let end = format!("END_{}", place.token);
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
        // The umask of the private directory is not that of the script.
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
        // A byte order mark in front of `#!` keeps the kernel from seeing it.
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        match text.split_once('\n') {
            Some((first, _)) if first.ends_with('\r') => text.replace("\r\n", "\n").into(),
            _ => text.into(),
        }
    }
}

/// A private directory of one run.
pub(super) struct Place {
    token: String,
    dir: String,
    // With an execute command: a directory inside whose name nobody can list.
    pub(super) hidden: Option<String>,
    // How the lines of ours begin that are not the script's output.
    marker: String,
}

impl Place {
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

    /// Makes the directory, reads the bundle, checks that all of it came, and becomes it.
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

/// Ends what is left of a run in a guest. As the user first, then with sudo where that is allowed.
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

/// Ends and removes a run when it is dropped before it was finished.
struct Leftover {
    guest: Guest,
    dir: Option<String>,
}

impl Leftover {
    async fn remove(mut self) {
        if let Some(dir) = self.dir.take() {
            clean_up(self.guest.clone(), dir, "leave").await;
        }
    }
}

impl Drop for Leftover {
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
    // A guest that has gone down keeps nobody waiting.
    let done = tokio::time::timeout(Duration::from_secs(30), cleaning).await;
    if !matches!(done, Ok(Ok(_))) {
        tracing::debug!(dir, "could not clean up in the guest");
    }
}

impl Guest {
    /// Runs a script, and hands on its output line by line while it runs; see [`MAX_LINE`](super::MAX_LINE) for long lines.
    /// It has no input. A script that a signal ended may show that as shells do, as exit code 128 + the number of the signal.
    /// Its directory is removed before this returns; a process that it left in the background goes on.
    ///
    /// Dropping the future ends the script and its children, and removes its directory: [`settle`](Guest::settle) waits
    /// for that.
    ///
    /// # Errors
    /// `GuestUnreachable` when the connection breaks; `InvalidInput` for an environment that no process can receive;
    /// `StepFailed` when the guest has no place for the script. How the script ended is no error here.
    pub async fn run(
        &self,
        script: &Script,
        mut output: impl FnMut(OutputStream, &str) + Send,
    ) -> Result<ExitStatus> {
        let token = format!("{:016x}", rand::random::<u64>());
        let mut why = Vec::new();
        for place in PLACES {
            if let Some(status) = self.run_in(place, &token, script, &mut output, &mut why).await? {
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
            format!("the guest has no directory where user {:?} can put a script and run it", self.user()),
        )
        .with_source(Error::new(ErrorKind::StepFailed, why.join("; ")))
        .with_help("is its disk full, or are /tmp, /var/tmp and the home read-only or mounted noexec?"))
    }

    /// `None`: the place cannot be used, and `why` says why.
    async fn run_in(
        &self,
        parent: &str,
        token: &str,
        script: &Script,
        output: &mut (impl FnMut(OutputStream, &str) + Send),
        why: &mut Vec<String>,
    ) -> Result<Option<ExitStatus>> {
        let place = Place::new(parent, token, script.execute_command.is_some());
        let bundle = script.bundle(&place)?;
        let bootstrap = place.bootstrap(bundle.len());
        let leftover = Leftover { guest: self.clone(), dir: Some(place.dir.clone()) };
        let mut ours = None;
        // Until the bundle stands, what is written is about the place; then it is the script's.
        let mut said = Vec::new();
        let prefix = format!("{}: ", place.marker);
        let status = self
            .shell("a script ran", &bootstrap, bundle, &mut |stream, text| {
                if let Some(message) = text.strip_prefix(&prefix) {
                    ours = Some(message.to_owned());
                } else if stream == OutputStream::Stderr && text.contains(&place.dir) && ours.is_none() {
                    // It may be the reason why the place cannot be used; if it is the script's own, it is handed on.
                    said.push(text.to_owned());
                    output(stream, text);
                } else {
                    output(stream, text);
                }
            })
            .await?;
        match ours.as_deref() {
            None => {
                leftover.remove().await;
                Ok(Some(status))
            }
            Some("cut") => Err(Error::new(
                ErrorKind::StepFailed,
                format!("the script could not be written to {parent} in the guest: {}", said.join("; ")),
            )
            .with_help("is its disk full?")),
            Some(_) => {
                leftover.remove().await;
                why.push(if said.is_empty() { format!("{parent} cannot be used") } else { said.join("; ") });
                Ok(None)
            }
        }
    }
}

/// Always in quotes: a value may begin with anything.
fn single_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The interpreter of a `#!` line and its one argument, as the kernel reads it (execve(2)).
fn shebang(text: &str) -> Option<(&str, Option<&str>)> {
    let line = text.strip_prefix("#!")?.lines().next()?.trim_matches([' ', '\t']);
    let (interpreter, argument) = match line.split_once([' ', '\t']) {
        Some((interpreter, argument)) => (interpreter, Some(argument.trim_matches([' ', '\t']))),
        None => (line, None),
    };
    (!interpreter.is_empty()).then_some((interpreter, argument))
}
