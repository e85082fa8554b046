//! The commands that a guest in memory knows.

mod files;

use super::{Flow, Shell, Stop, expand, parse::is_name};
use crate::memory::{
    files::{Node, Refusal, may_write},
    script::Act,
};
use std::{rc::Rc, time::Duration};

impl Shell<'_> {
    /// Runs the words of one command.
    pub(super) fn words(&mut self, words: &[String]) -> Flow {
        let Some((head, rest)) = words.split_first() else { return Ok(0) };
        if let Some((name, value)) = head.split_once('=')
            && is_name(name)
        {
            // In front of a command that `env` or `sudo` runs.
            self.variables.insert(name.to_owned(), value.to_owned());
            return self.words(rest);
        }
        if let Some(body) = self.functions.get(head).map(Rc::clone) {
            let arguments = std::mem::replace(&mut self.arguments, words.to_vec());
            let flow = self.node(&body);
            self.arguments = arguments;
            return match flow {
                Err(Stop::Return(code)) => Ok(code),
                flow => flow,
            };
        }
        let program = head.rsplit('/').next().unwrap_or_default();
        if self.guest.missing.contains(program) {
            return Ok(self.complain(&format!("sh: {head}: not found"), 127));
        }
        let operands: Vec<&str> =
            rest.iter().map(String::as_str).filter(|word| !word.starts_with('-')).collect();
        let number = || operands.first().and_then(|code| code.parse().ok());
        Ok(match program {
            "exit" => return Err(Stop::Exit(number().unwrap_or(self.last))),
            "return" => return Err(Stop::Return(number().unwrap_or(self.last))),
            "break" => return Err(Stop::Break),
            "continue" => return Err(Stop::Continue),
            "exec" if rest.is_empty() => 0,
            "exec" => {
                let code = self.words(rest)?;
                return Err(Stop::Exit(code));
            }
            "sudo" | "doas" => self.sudo(rest)?,
            "nohup" | "nice" | "time" | "setsid" | "stdbuf" => self.words(rest)?,
            "eval" => self.script(&rest.join(" "))?,
            "env" => {
                let at = rest.iter().position(|word| !word.starts_with('-')).unwrap_or(rest.len());
                self.apart(|shell| shell.words(&rest[at..]))?
            }
            "timeout" => self.words(rest.get(1..).unwrap_or_default())?,
            "command" | "which" | "type" | "hash" => self.look_up(program, rest)?,
            "sh" | "bash" | "dash" | "ash" => self.sub_shell(rest)?,
            "." | "source" => match operands.first().map(|file| self.path(file)) {
                Some(path) => {
                    let text =
                        String::from_utf8_lossy(self.tree.read(&path).unwrap_or_default()).into_owned();
                    self.script(&text)?
                }
                None => 2,
            },
            "set" => {
                for word in rest {
                    if let Some(flags) = word.strip_prefix('-') {
                        self.errexit |= flags.contains('e') && !flags.starts_with('-');
                    } else if word.starts_with('+') && word.contains('e') {
                        self.errexit = false;
                    }
                }
                if let Some(at) = rest.iter().position(|word| word == "--") {
                    self.arguments.truncate(1);
                    self.arguments.extend_from_slice(&rest[at + 1..]);
                }
                0
            }
            "shift" => {
                let by = number().unwrap_or(1) as usize;
                self.arguments.drain(1..(1 + by).min(self.arguments.len()));
                0
            }
            "export" | "readonly" | "local" | "declare" => {
                for (name, value) in rest.iter().filter_map(|word| word.split_once('=')) {
                    self.variables.insert(name.to_owned(), value.to_owned());
                }
                0
            }
            "unset" => {
                operands.iter().for_each(|name| drop(self.variables.remove(*name)));
                0
            }
            "read" => self.read(&operands),
            "cd" => self.change_directory(operands.first().copied()),
            "pwd" => {
                self.print(format!("{}\n", self.directory));
                0
            }
            "umask" => {
                if operands.is_empty() {
                    self.print("0022\n");
                }
                0
            }
            "false" => 1,
            "sleep" => {
                self.acts.extend(operands.first().and_then(|time| seconds(time)).map(Act::Wait));
                0
            }
            "echo" => {
                let (words, end) = match rest.split_first() {
                    Some((flag, words)) if flag == "-n" => (words, ""),
                    _ => (rest, "\n"),
                };
                self.print(format!("{}{end}", words.join(" ")));
                0
            }
            "printf" => {
                self.print(printf(rest));
                0
            }
            "seq" => {
                let last = operands.last().and_then(|last| last.parse::<u32>().ok()).unwrap_or(0).min(10_000);
                let first = if operands.len() > 1 { number().unwrap_or(1) } else { 1 };
                self.print((first..=last).map(|n| format!("{n}\n")).collect::<String>());
                0
            }
            "reboot" | "poweroff" | "halt" | "shutdown" | "systemctl" => {
                if program != "systemctl" && self.user != "root" {
                    return Ok(self.complain(&format!("{program}: must be root"), 1));
                }
                self.power(program, rest)
            }
            "whoami" => {
                self.print(format!("{}\n", self.user));
                0
            }
            "id" => {
                let number = if self.user == "root" { 0 } else { 1000 };
                self.print(match rest.first().map(String::as_str) {
                    Some("-u" | "-g") => format!("{number}\n"),
                    Some("-un" | "-nu") => format!("{}\n", self.user),
                    _ => format!("uid={number}({user}) gid={number}({user})\n", user = self.user),
                });
                0
            }
            "hostname" => {
                self.print(format!("{}\n", self.host_name));
                0
            }
            "uname" => {
                self.print("Linux\n");
                0
            }
            "[" | "test" => {
                let words: Vec<&str> = rest.iter().map(String::as_str).filter(|word| *word != "]").collect();
                u32::from(!self.test(&words))
            }
            "cat" | "mkdir" | "rm" | "rmdir" | "mv" | "cp" | "touch" | "chmod" | "install" | "tee"
            | "mktemp" | "ls" | "stat" | "wc" | "sha256sum" | "tail" | "head" | "grep" => {
                self.file_command(program, rest, &operands)
            }
            _ if head.contains('/') => {
                let path = self.path(head);
                if self.tree.read(&path).is_some() { self.file(&path, rest.to_vec(), false)? } else { 0 }
            }
            _ => 0,
        })
    }

    fn sudo(&mut self, words: &[String]) -> Flow {
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
        // What runs under sudo ends itself, not the shell that called it.
        let flow = self.apart(|shell| shell.words(rest));
        self.user = before;
        flow
    }

    fn sub_shell(&mut self, words: &[String]) -> Flow {
        let (mut errexit, mut command) = (false, false);
        for (at, word) in words.iter().enumerate() {
            if word.starts_with('-') && !word.starts_with("--") {
                command |= word.contains('c');
                errexit |= word.contains('e');
                continue;
            }
            let rest = words[at + 1..].to_vec();
            if !command {
                let path = self.path(word);
                return self.file(&path, rest, errexit);
            }
            return self.apart(|shell| {
                shell.arguments = if rest.is_empty() { vec!["sh".to_owned()] } else { rest };
                (shell.errexit, shell.conditions) = (errexit, 0);
                shell.script(word)
            });
        }
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.input)).into_owned();
        match self.answer(&text)? {
            Some(code) => Ok(code),
            None => self.apart(|shell| {
                (shell.errexit, shell.conditions) = (errexit, 0);
                shell.script(&text)
            }),
        }
    }

    fn look_up(&mut self, program: &str, words: &[String]) -> Flow {
        if program == "command" && words.first().is_none_or(|word| word != "-v") {
            return self.words(words);
        }
        let mut code = 0;
        for word in words.iter().filter(|word| !word.starts_with('-')) {
            let name = word.rsplit('/').next().unwrap_or_default();
            if self.guest.missing.contains(name) {
                code = 1;
            } else {
                self.print(format!("/usr/bin/{name}\n"));
            }
        }
        Ok(code)
    }

    fn read(&mut self, names: &[&str]) -> u32 {
        if self.input.is_empty() {
            return 1;
        }
        let end = self.input.iter().position(|c| *c == b'\n');
        let line: Vec<u8> = self.input.drain(..end.map_or(self.input.len(), |end| end + 1)).collect();
        let line = String::from_utf8_lossy(&line).trim().to_owned();
        let mut rest = line.as_str();
        for (at, name) in names.iter().enumerate() {
            let (word, after) = match rest.split_once(' ') {
                Some(split) if at + 1 < names.len() => split,
                _ => (rest, ""),
            };
            self.variables.insert((*name).to_owned(), word.to_owned());
            rest = after.trim_start();
        }
        u32::from(end.is_none())
    }

    fn change_directory(&mut self, to: Option<&str>) -> u32 {
        let path = to.map_or_else(|| crate::memory::files::home(&self.user), |to| self.path(to));
        // The home of a user is made when it is first used.
        if to.is_some() && !self.tree.get(&path).is_some_and(Node::is_dir) {
            return self.complain(&format!("cd: {path}: {}", Refusal::NotFound.text()), 1);
        }
        self.tree.make_dirs(&path, 0o755);
        self.directory = path;
        0
    }

    fn power(&mut self, program: &str, words: &[String]) -> u32 {
        let has = |wanted: &[&str]| words.iter().any(|word| wanted.contains(&word.as_str()));
        let act = match program {
            "reboot" => Act::Reboot,
            "poweroff" | "halt" => Act::PowerOff,
            "shutdown" if has(&["-r", "/r", "--reboot"]) => Act::Reboot,
            "shutdown" if !has(&["-c", "-k"]) => Act::PowerOff,
            "systemctl" if has(&["reboot"]) => Act::Reboot,
            "systemctl" if has(&["poweroff", "halt"]) => Act::PowerOff,
            _ => return 0,
        };
        self.acts.push(act);
        0
    }

    fn test(&self, words: &[&str]) -> bool {
        let node = |path: &str| self.tree.get(&self.path(path));
        let numbers = |a: &str, b: &str| Some((a.trim().parse::<i64>().ok()?, b.trim().parse::<i64>().ok()?));
        let compare =
            |a: &str, b: &str, what: fn(i64, i64) -> bool| numbers(a, b).is_some_and(|(a, b)| what(a, b));
        match words {
            [] => false,
            ["!", rest @ ..] => !self.test(rest),
            ["-e" | "-r" | "-x", path] => node(path).is_some() || path.starts_with("/usr/bin/"),
            ["-f", path] => node(path).is_some_and(|node| !node.is_dir()),
            ["-s", path] => self.tree.read(&self.path(path)).is_some_and(|data| !data.is_empty()),
            ["-d", path] => node(path).is_some_and(Node::is_dir),
            ["-w", path] => node(path).is_some() && may_write(&self.path(path), &self.user),
            ["-n", text] => !text.is_empty(),
            ["-z", text] => text.is_empty(),
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [a, "-eq", b] => compare(a, b, |a, b| a == b),
            [a, "-ne", b] => compare(a, b, |a, b| a != b),
            [a, "-lt", b] => compare(a, b, |a, b| a < b),
            [a, "-le", b] => compare(a, b, |a, b| a <= b),
            [a, "-gt", b] => compare(a, b, |a, b| a > b),
            [a, "-ge", b] => compare(a, b, |a, b| a >= b),
            [text] => !text.is_empty(),
            _ => false,
        }
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
        let next = chars.clone().next();
        let known = match (c, next) {
            ('%', Some('s' | 'd')) => Some(arguments.next().cloned().unwrap_or_default()),
            ('%', Some('%')) => Some("%".to_owned()),
            ('\\', Some('n')) => Some("\n".to_owned()),
            ('\\', Some('t')) => Some("\t".to_owned()),
            _ => None,
        };
        match known {
            Some(text) => {
                chars.next();
                out.push_str(&text);
            }
            None => out.push(c),
        }
    }
    out
}
