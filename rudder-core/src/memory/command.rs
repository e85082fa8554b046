//! What a guest in memory does with a command line: the rules of the test first, then the little of a shell that builds
//! need. Every other command succeeds and says nothing.

use super::{
    files::{FileTree, Refusal, home, may_write, normal},
    script::{Act, Guest, Response},
    words::{self, Join, Redirect, Simple},
};
use std::{collections::BTreeMap, time::Duration};

/// Files that run files that run files: deeper than this is a loop.
const MAX_DEPTH: u32 = 8;

/// A shell in a guest, for one command.
pub(super) struct Shell<'a> {
    tree: &'a mut FileTree,
    guest: &'a Guest,
    boot_id: &'a str,
    host_name: &'a str,
    user: String,
    stdin: &'a [u8],
    variables: BTreeMap<String, String>,
    acts: Vec<Act>,
    /// The machine is going down, or the command never returns: nothing follows.
    over: bool,
    depth: u32,
}

/// How a script went on.
enum Flow {
    /// To the next command, with this code.
    Next(u32),
    /// It ended, with this code.
    Exit(u32),
}

/// A script as [`Guest::run`](crate::guest::Guest::run) sends it: behind the shell lines that put it in place.
struct Bundled<'a> {
    exports: String,
    text: &'a str,
}

/// Whether a command line reads a script from its input and becomes it.
pub(super) fn takes_bundle(line: &str) -> bool {
    line.contains("/bundle") && line.contains("exec /bin/sh ")
}

/// The script that a command line reads from its input, when it is one that does.
fn bundled<'a>(line: &str, stdin: &'a [u8]) -> Option<Bundled<'a>> {
    let (prelude, text) = std::str::from_utf8(stdin).ok()?.split_once("\nexit 126\n")?;
    if !takes_bundle(line) {
        return None;
    }
    let body = prelude.find("\nexport ").map_or("", |start| &prelude[start + 1..]);
    let exports = body.split_inclusive('\n').take_while(|line| !line.starts_with("exec ")).collect();
    Some(Bundled { exports, text })
}

impl<'a> Shell<'a> {
    /// A shell of this user.
    pub(super) fn new(
        tree: &'a mut FileTree,
        guest: &'a Guest,
        boot_id: &'a str,
        host_name: &'a str,
        user: &str,
        stdin: &'a [u8],
    ) -> Self {
        let variables = [("HOME", home(user)), ("USER", user.to_owned()), ("LOGNAME", user.to_owned())];
        let variables = variables.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Self {
            tree,
            guest,
            boot_id,
            host_name,
            user: user.to_owned(),
            stdin,
            variables,
            acts: Vec::new(),
            over: false,
            depth: 0,
        }
    }

    /// Runs a command line. The last act ends it: a code, a signal, or something that does not return.
    pub(super) fn run(mut self, line: &str) -> Vec<Act> {
        let code = match self.answer(line) {
            Some(code) => code,
            None => match bundled(line, self.stdin) {
                Some(script) => self.bundle(&script),
                None => self.script(line),
            },
        };
        if !self.over {
            self.acts.push(Act::Exit(code));
        }
        self.acts
    }

    /// Runs a script that came with its environment, as `sh -e` would.
    fn bundle(&mut self, script: &Bundled<'_>) -> u32 {
        if let Some(code) = self.answer(script.text) {
            return code;
        }
        let first = script.text.lines().next().unwrap_or_default();
        match first.strip_prefix("#!") {
            Some(interpreter) if !interpreter.contains("sh") => 0,
            Some(_) => self.script(&format!("{}{}", script.exports, script.text)),
            None => self.script(&format!("{}set -e\n{}", script.exports, script.text)),
        }
    }

    /// What a rule says to this text: a line, or the content of a file that is run.
    fn answer(&mut self, text: &str) -> Option<u32> {
        let matches = |(pattern, response): &&(String, Response)| {
            text.contains(pattern.as_str()) && response.budget.take()
        };
        let (_, response) = self.guest.rules.iter().find(matches)?;
        let mut code = 0;
        for act in response.acts.clone() {
            match act {
                Act::Stdout(_) | Act::Stderr(_) | Act::Wait(_) => self.acts.push(act),
                Act::Exit(given) => {
                    code = given;
                    break;
                }
                Act::PowerOff | Act::Reboot => {
                    self.acts.extend([act, Act::Hang]);
                    self.over = true;
                    break;
                }
                Act::Signal(_) | Act::Hang | Act::Cut | Act::Die(_) => {
                    self.acts.push(act);
                    self.over = true;
                    break;
                }
            }
        }
        Some(code)
    }

    /// Runs a script, and gives its code.
    fn script(&mut self, text: &str) -> u32 {
        self.depth += 1;
        let code = if self.depth > MAX_DEPTH {
            126
        } else {
            match words::commands(text, &self.variables) {
                Some(_) => self.lines(text),
                None => self.mentioned(text),
            }
        };
        self.depth -= 1;
        code
    }

    /// Runs simple commands. They are taken apart again one by one, since each may change variables.
    fn lines(&mut self, text: &str) -> u32 {
        let mut code = 0;
        let mut errexit = false;
        let mut at = 0;
        let mut output = Vec::new();
        while let Some(all) = words::commands(text, &self.variables) {
            let Some(simple) = all.get(at) else { break };
            let joined = all.get(at + 1).map_or(Join::Then, |next| next.join);
            at += 1;
            let skip = match simple.join {
                Join::And => code != 0,
                Join::Or => code == 0,
                Join::Then | Join::Pipe => false,
            };
            if skip || self.over {
                continue;
            }
            if simple.words.first().is_some_and(|word| word == "set") {
                errexit |= simple.words.iter().any(|word| word.starts_with('-') && word.contains('e'));
                continue;
            }
            let piped = std::mem::take(&mut output);
            let input = (simple.join == Join::Pipe).then_some(piped);
            match self.simple(simple, input, (joined == Join::Pipe).then_some(&mut output)) {
                Flow::Next(next) => code = next,
                Flow::Exit(code) => return code,
            }
            if errexit && code != 0 && joined == Join::Then {
                return code;
            }
        }
        code
    }

    /// A script with more in it than simple commands: what can be told of it is which files of the guest it runs.
    fn mentioned(&mut self, text: &str) -> u32 {
        let mentioned: Vec<String> = self
            .tree
            .paths()
            .filter(|path| text.contains(*path) && !path.starts_with("/etc/"))
            .map(str::to_owned)
            .collect();
        let mut code = 0;
        for path in mentioned {
            if !self.over {
                code = code.max(self.file(&path));
            }
        }
        code
    }

    /// Runs a file of the guest.
    fn file(&mut self, path: &str) -> u32 {
        let Some(bytes) = self.tree.read(path) else {
            return self.complain(&format!("sh: {path}: {}", Refusal::NotFound.text()), 127);
        };
        let text = String::from_utf8_lossy(bytes).into_owned();
        if let Some(code) = self.answer(&text) {
            return code;
        }
        let first = text.lines().next().unwrap_or_default();
        if first.starts_with("#!") && !first.contains("sh") {
            return 0;
        }
        self.script(&text)
    }

    /// Runs one command with its redirections.
    fn simple(&mut self, simple: &Simple, piped: Option<Vec<u8>>, pipe: Option<&mut Vec<u8>>) -> Flow {
        let mut input = piped;
        for redirect in &simple.redirects {
            if let Redirect::In(file) = redirect {
                let path = normal(file, &self.user);
                if path == "/dev/null" {
                    input = Some(Vec::new());
                } else if let Some(bytes) = self.tree.read(&path) {
                    input = Some(bytes.to_vec());
                } else {
                    return Flow::Next(
                        self.complain(&format!("sh: {file}: {}", Refusal::NotFound.text()), 1),
                    );
                }
            }
        }
        let start = self.acts.len();
        let flow = self.words(&simple.words, input.as_deref());
        let silent = |act: &Act| !matches!(act, Act::Stdout(_) | Act::Stderr(_));
        let mut out = Vec::new();
        let mut err = Vec::new();
        for act in &self.acts[start..] {
            match act {
                Act::Stdout(bytes) => out.extend_from_slice(bytes),
                Act::Stderr(bytes) => err.extend_from_slice(bytes),
                _ => {}
            }
        }
        let mut target = None;
        let mut redirected = pipe.is_some();
        for redirect in &simple.redirects {
            match redirect {
                Redirect::Out { file, append } => {
                    target = Some((file.clone(), *append));
                    redirected = true;
                }
                Redirect::Err => {
                    err.clear();
                    redirected = true;
                }
                Redirect::ErrToOut => {
                    out.append(&mut err);
                    redirected = true;
                }
                Redirect::OutToErr => {
                    err.append(&mut out);
                    redirected = true;
                }
                Redirect::In(_) => {}
            }
        }
        if redirected {
            let rest: Vec<Act> = self.acts.drain(start..).filter(silent).collect();
            self.acts.extend(rest);
            if let Some((file, append)) = target
                && let Err(code) = self.store(&file, std::mem::take(&mut out), append)
            {
                return Flow::Next(code);
            }
            if let Some(pipe) = pipe {
                pipe.append(&mut out);
            }
            self.print(out);
            if !err.is_empty() {
                self.acts.push(Act::Stderr(err));
            }
        }
        flow
    }

    /// Writes a file for a redirection.
    fn store(&mut self, file: &str, bytes: Vec<u8>, append: bool) -> Result<(), u32> {
        let path = normal(file, &self.user);
        if path == "/dev/null" {
            return Ok(());
        }
        let mut content = Vec::new();
        if append {
            content.extend_from_slice(self.tree.read(&path).unwrap_or_default());
        }
        content.extend(bytes);
        let done =
            if may_write(&path, &self.user) { self.tree.write(&path, content) } else { Err(Refusal::Denied) };
        done.map_err(|refusal| self.complain(&format!("sh: {file}: {}", refusal.text()), 1))
    }

    /// Runs the words of one command.
    fn words(&mut self, words: &[String], input: Option<&[u8]>) -> Flow {
        let Some((head, rest)) = words.split_first() else { return Flow::Next(0) };
        if let Some((name, value)) = head.split_once('=')
            && !name.is_empty()
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            self.variables.insert(name.to_owned(), value.to_owned());
            return self.words(rest, input);
        }
        let program = head.rsplit('/').next().unwrap_or_default();
        if self.guest.missing.contains(program) {
            return Flow::Next(self.complain(&format!("sh: {head}: not found"), 127));
        }
        let operands: Vec<&str> =
            rest.iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
        let code = match program {
            "exit" => {
                return Flow::Exit(operands.first().and_then(|code| code.parse().ok()).unwrap_or(0));
            }
            "sudo" => return self.sudo(rest, input),
            "exec" | "nohup" | "nice" | "time" => return self.words(rest, input),
            "env" => {
                let at = rest.iter().position(|word| !word.starts_with('-')).unwrap_or(rest.len());
                return self.words(&rest[at..], input);
            }
            "timeout" => return self.words(rest.get(1..).unwrap_or_default(), input),
            "command" | "which" | "type" | "hash" => return Flow::Next(self.look_up(program, rest, input)),
            "sh" | "bash" | "dash" | "ash" => self.sub_shell(rest, input),
            "." | "source" => match operands.first() {
                Some(file) => self.file(&normal(file, &self.user)),
                None => 2,
            },
            "export" => {
                for (name, value) in rest.iter().filter_map(|word| word.split_once('=')) {
                    self.variables.insert(name.to_owned(), value.to_owned());
                }
                0
            }
            "false" => 1,
            "sleep" => {
                if let Some(time) = operands.first().and_then(|time| seconds(time)) {
                    self.acts.push(Act::Wait(time));
                }
                0
            }
            "echo" => {
                let (words, end) = match rest.split_first() {
                    Some((flag, words)) if flag == "-n" => (words, ""),
                    _ => (rest, "\n"),
                };
                self.print(format!("{}{end}", words.join(" ")).into_bytes());
                0
            }
            "printf" => {
                self.print(printf(rest).into_bytes());
                0
            }
            "reboot" | "poweroff" | "halt" | "shutdown" | "systemctl" => {
                self.power(program, rest);
                0
            }
            "whoami" => {
                self.print(format!("{}\n", self.user).into_bytes());
                0
            }
            "id" => {
                let number = if self.user == "root" { 0 } else { 1000 };
                let text = match rest.first().map(String::as_str) {
                    Some("-u") => format!("{number}\n"),
                    Some("-un") => format!("{}\n", self.user),
                    _ => format!("uid={number}({user}) gid={number}({user})\n", user = self.user),
                };
                self.print(text.into_bytes());
                0
            }
            "hostname" => {
                self.print(format!("{}\n", self.host_name).into_bytes());
                0
            }
            "uname" => {
                self.print(b"Linux\n".to_vec());
                0
            }
            "[" | "test" => self.test(rest),
            "cat" | "mkdir" | "rm" | "rmdir" | "mv" | "cp" | "touch" | "chmod" | "install" | "tee"
            | "mktemp" | "stat" | "wc" | "sha256sum" => self.file_command(program, rest, &operands, input),
            _ => {
                let path = normal(head, &self.user);
                if head.contains('/') && self.tree.read(&path).is_some() { self.file(&path) } else { 0 }
            }
        };
        Flow::Next(code)
    }

    fn sudo(&mut self, words: &[String], input: Option<&[u8]>) -> Flow {
        let mut rest = words;
        let mut user = "root".to_owned();
        while let Some((word, after)) = rest.split_first() {
            if !word.starts_with('-') {
                break;
            }
            rest = after;
            if matches!(word.as_str(), "-u" | "--user")
                && let Some((name, after)) = rest.split_first()
            {
                user.clone_from(name);
                rest = after;
            }
            if word == "--" {
                break;
            }
        }
        let before = std::mem::replace(&mut self.user, user);
        let flow = self.words(rest, input);
        self.user = before;
        // What runs under sudo ends itself, not the shell that called it.
        match flow {
            Flow::Next(code) | Flow::Exit(code) => Flow::Next(code),
        }
    }

    fn sub_shell(&mut self, words: &[String], input: Option<&[u8]>) -> u32 {
        let mut command = false;
        for word in words {
            if word.starts_with('-') && !word.starts_with("--") {
                command |= word.contains('c');
            } else if command {
                return self.answer(word).unwrap_or_else(|| self.script(word));
            } else if !word.starts_with('-') {
                return self.file(&normal(word, &self.user));
            }
        }
        let text = String::from_utf8_lossy(input.unwrap_or(self.stdin)).into_owned();
        self.answer(&text).unwrap_or_else(|| self.script(&text))
    }

    fn look_up(&mut self, program: &str, words: &[String], input: Option<&[u8]>) -> u32 {
        let only_asked = program != "command" || words.first().is_some_and(|word| word == "-v");
        if !only_asked {
            return match self.words(words, input) {
                Flow::Next(code) | Flow::Exit(code) => code,
            };
        }
        let mut code = 0;
        for word in words.iter().filter(|word| !word.starts_with('-')) {
            if self.guest.missing.contains(word) {
                code = 1;
            } else {
                self.print(format!("/usr/bin/{word}\n").into_bytes());
            }
        }
        code
    }

    fn power(&mut self, program: &str, words: &[String]) {
        let has = |wanted: &[&str]| words.iter().any(|word| wanted.contains(&word.as_str()));
        let act = match program {
            "reboot" => Act::Reboot,
            "poweroff" | "halt" => Act::PowerOff,
            "shutdown" if has(&["-r", "/r", "--reboot"]) => Act::Reboot,
            "shutdown" if !has(&["-c", "-k"]) => Act::PowerOff,
            "systemctl" if has(&["reboot"]) => Act::Reboot,
            "systemctl" if has(&["poweroff", "halt"]) => Act::PowerOff,
            _ => return,
        };
        self.acts.push(act);
    }

    fn test(&mut self, words: &[String]) -> u32 {
        let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| *word != "]").collect();
        let node = |path: &str| self.tree.get(&normal(path, &self.user));
        let holds = match words.as_slice() {
            ["-e" | "-r" | "-x", path] => {
                node(path).is_some() || path.starts_with("/bin/") || path.starts_with("/usr/bin/")
            }
            ["-f", path] => node(path).is_some_and(|node| !node.is_dir()),
            ["-s", path] => {
                node(path).and_then(|node| node.data.as_ref()).is_some_and(|data| !data.is_empty())
            }
            ["-d", path] => node(path).is_some_and(super::files::Node::is_dir),
            ["-w", path] => node(path).is_some() && may_write(&normal(path, &self.user), &self.user),
            ["-n", text] => !text.is_empty(),
            ["-z"] => true,
            ["-z", text] => text.is_empty(),
            ["!", rest @ ..] => {
                let rest: Vec<String> = rest.iter().map(ToString::to_string).collect();
                self.test(&rest) != 0
            }
            [a, "=" | "==" | "-eq", b] => a == b,
            [a, "!=" | "-ne", b] => a != b,
            [text] => !text.is_empty(),
            _ => false,
        };
        u32::from(!holds)
    }

    fn file_command(
        &mut self,
        program: &str,
        words: &[String],
        operands: &[&str],
        input: Option<&[u8]>,
    ) -> u32 {
        let has = |flag: char| {
            words.iter().any(|word| word.starts_with('-') && !word.starts_with("--") && word.contains(flag))
        };
        let paths: Vec<String> = operands.iter().map(|path| normal(path, &self.user)).collect();
        let done = match (program, paths.as_slice()) {
            ("cat", []) => {
                let bytes = input.unwrap_or(self.stdin).to_vec();
                self.print(bytes);
                Ok(())
            }
            ("cat", paths) => paths.iter().try_for_each(|path| {
                let bytes = if path == "/proc/sys/kernel/random/boot_id" {
                    format!("{}\n", self.boot_id).into_bytes()
                } else {
                    self.tree.read(path).ok_or(Refusal::NotFound)?.to_vec()
                };
                self.print(bytes);
                Ok(())
            }),
            ("tee", paths) => {
                let bytes = input.unwrap_or(self.stdin).to_vec();
                self.print(bytes.clone());
                paths.iter().try_for_each(|path| {
                    self.may(path)?;
                    self.tree.write(path, bytes.clone())
                })
            }
            ("mkdir", paths) => {
                let mode = words.iter().position(|word| word == "-m").and_then(|at| words.get(at + 1));
                let bits = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0o755);
                paths
                    .iter()
                    .zip(operands)
                    .filter(|(_, word)| Some(**word) != mode.map(String::as_str))
                    .try_for_each(|(path, _)| {
                        if self.tree.get(path).is_some_and(super::files::Node::is_dir) && has('p') {
                            return Ok(());
                        }
                        self.may(path)?;
                        if has('p') {
                            self.tree.make_dirs(path, bits);
                            return Ok(());
                        }
                        self.tree.make_dir(path, bits)
                    })
            }
            ("rm", paths) => paths.iter().try_for_each(|path| {
                if self.tree.get(path).is_none() {
                    return if has('f') { Ok(()) } else { Err(Refusal::NotFound) };
                }
                self.may(path)?;
                if has('r') || has('R') {
                    self.tree.remove_all(path);
                    return Ok(());
                }
                self.tree.remove_file(path)
            }),
            ("rmdir", paths) => paths.iter().try_for_each(|path| {
                self.may(path)?;
                self.tree.remove_dir(path)
            }),
            ("mv" | "cp" | "install", [from, to]) => self.transfer(program, from, to),
            ("install", paths) if has('d') => {
                paths.iter().for_each(|path| self.tree.make_dirs(path, 0o755));
                Ok(())
            }
            ("touch", paths) => paths.iter().try_for_each(|path| {
                self.may(path)?;
                if self.tree.get(path).is_some() { Ok(()) } else { self.tree.write(path, Vec::new()) }
            }),
            ("chmod", [_, paths @ ..]) => {
                let mode = operands.first().and_then(|mode| u32::from_str_radix(mode, 8).ok());
                paths.iter().try_for_each(|path| {
                    let now = self.tree.get(path).ok_or(Refusal::NotFound)?.mode;
                    self.may(path)?;
                    self.tree.set_mode(path, mode.unwrap_or(now | 0o111))
                })
            }
            ("mktemp", _) => {
                let path = format!("/tmp/tmp.{:010x}", rand::random::<u64>() & 0xff_ffff_ffff);
                if has('d') {
                    self.tree.make_dirs(&path, 0o700);
                } else {
                    self.tree.put(&path, Vec::new(), 0o600);
                }
                self.print(format!("{path}\n").into_bytes());
                Ok(())
            }
            ("stat" | "wc" | "sha256sum", paths) => return self.measure(program, paths, input),
            _ => Ok(()),
        };
        match done {
            Ok(()) => 0,
            Err(refusal) => {
                self.complain(&format!("{program}: {}: {}", operands.join(" "), refusal.text()), 1)
            }
        }
    }

    /// `mv`, `cp`, `install`: one file to a file or into a directory.
    fn transfer(&mut self, program: &str, from: &str, to: &str) -> Result<(), Refusal> {
        let mut to = to.to_owned();
        if self.tree.get(&to).is_some_and(super::files::Node::is_dir) {
            to = format!("{}/{}", to.trim_end_matches('/'), from.rsplit('/').next().unwrap_or_default());
        }
        self.may(&to)?;
        if program == "mv" {
            self.may(from)?;
            return self.tree.rename(from, &to);
        }
        let bytes = self.tree.read(from).ok_or(Refusal::NotFound)?.to_vec();
        self.tree.write(&to, bytes)
    }

    /// `stat -c %s`, `wc -c`, `sha256sum`: what is asked to verify an upload.
    fn measure(&mut self, program: &str, paths: &[String], input: Option<&[u8]>) -> u32 {
        let path = paths.iter().rfind(|path| self.tree.read(path).is_some());
        let bytes = match path {
            Some(path) => self.tree.read(path).unwrap_or_default(),
            None if program != "stat" && paths.is_empty() => input.unwrap_or(self.stdin),
            None => return self.complain(&format!("{program}: {}", Refusal::NotFound.text()), 1),
        };
        let text = match (program, path) {
            ("sha256sum", path) => {
                format!("{}  {}\n", crate::digest::Digest::of(bytes), path.map_or("-", String::as_str))
            }
            ("wc", Some(path)) if input.is_none() => format!("{} {path}\n", bytes.len()),
            _ => format!("{}\n", bytes.len()),
        };
        self.print(text.into_bytes());
        0
    }

    fn may(&self, path: &str) -> Result<(), Refusal> {
        if may_write(path, &self.user) { Ok(()) } else { Err(Refusal::Denied) }
    }

    fn print(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.acts.push(Act::Stdout(bytes));
        }
    }

    fn complain(&mut self, message: &str, code: u32) -> u32 {
        self.acts.push(Act::Stderr(format!("{message}\n").into_bytes()));
        code
    }
}

/// A time as `sleep` takes it: seconds, maybe with a fraction.
fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.trim_end_matches('s').parse().ok()?).ok()
}

/// `printf` with `%s`, `%d`, `%%`, `\n` and `\t`.
fn printf(words: &[String]) -> String {
    let Some((format, arguments)) = words.split_first() else { return String::new() };
    let mut arguments = arguments.iter();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, chars.clone().next()) {
            ('%', Some('s' | 'd')) => {
                chars.next();
                out.push_str(arguments.next().map_or("", String::as_str));
            }
            ('%', Some('%')) => {
                chars.next();
                out.push('%');
            }
            ('\\', Some('n')) => {
                chars.next();
                out.push('\n');
            }
            ('\\', Some('t')) => {
                chars.next();
                out.push('\t');
            }
            (c, _) => out.push(c),
        }
    }
    out
}
