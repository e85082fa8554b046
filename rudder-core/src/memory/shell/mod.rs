//! What a guest in memory does with a command line: the rules of the test first, then what a shell does with the commands
//! that it knows. Every other command succeeds and says nothing, and so does a script that cannot be read.

mod commands;
mod expand;
mod parse;

use super::{
    files::{FileTree, Refusal, home, may_write, normal},
    script::{Act, Guest, Response},
};
use parse::{Node, Redirect, Word};
use std::{collections::BTreeMap, rc::Rc};

/// Files that run files that run files: deeper than this is a loop.
const MAX_DEPTH: u32 = 30;
/// So many commands of one line, and it is taken for one that never ends.
const MAX_COMMANDS: u32 = 20_000;
/// How the private directories begin that Rudder makes in a guest.
const OURS: &str = "/rudder-";

/// A shell in a guest, for one command line.
pub(super) struct Shell<'a> {
    tree: &'a mut FileTree,
    guest: &'a Guest,
    boot_id: &'a str,
    host_name: &'a str,
    user: String,
    directory: String,
    input: Vec<u8>,
    variables: BTreeMap<String, String>,
    arguments: Vec<String>,
    functions: BTreeMap<String, Rc<Node>>,
    last: u32,
    errexit: bool,
    /// Inside a condition, a failure does not end the script.
    conditions: u32,
    acts: Vec<Act>,
    depth: u32,
    commands: u32,
}

/// Why what follows is not executed.
enum Stop {
    /// The script ended with this code.
    Exit(u32),
    /// The function returned.
    Return(u32),
    Break,
    Continue,
    /// The command never returns, or something else already said how it ended.
    Over,
}

type Flow<T = u32> = Result<T, Stop>;

impl<'a> Shell<'a> {
    /// A shell of this user.
    pub(super) fn new(
        tree: &'a mut FileTree,
        guest: &'a Guest,
        boot_id: &'a str,
        host_name: &'a str,
        user: &str,
        stdin: Vec<u8>,
    ) -> Self {
        let variables = [
            ("HOME", home(user)),
            ("USER", user.to_owned()),
            ("LOGNAME", user.to_owned()),
            ("PATH", "/usr/bin:/bin".to_owned()),
        ];
        Self {
            tree,
            guest,
            boot_id,
            host_name,
            user: user.to_owned(),
            directory: home(user),
            input: stdin,
            variables: variables.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            arguments: vec!["sh".to_owned()],
            functions: BTreeMap::new(),
            last: 0,
            errexit: false,
            conditions: 0,
            acts: Vec::new(),
            depth: 0,
            commands: 0,
        }
    }

    /// Runs a command line. The last act ends it: a code, a signal, or something that does not return.
    pub(super) fn run(mut self, line: &str) -> Vec<Act> {
        // What Rudder does for itself in a guest is not for rules: they would match by accident.
        let answered = if line.contains(OURS) { Ok(None) } else { self.answer(line) };
        let flow = match answered {
            Ok(Some(code)) => Ok(code),
            Ok(None) => self.script(line),
            Err(stop) => Err(stop),
        };
        match flow {
            Ok(code) | Err(Stop::Exit(code) | Stop::Return(code)) => self.acts.push(Act::Exit(code)),
            Err(Stop::Break | Stop::Continue) => self.acts.push(Act::Exit(0)),
            Err(Stop::Over) => {}
        }
        self.acts
    }

    /// What a rule says to this text: a line, or the content of a file that is run.
    fn answer(&mut self, text: &str) -> Flow<Option<u32>> {
        let matches = |(pattern, response): &&(String, Response)| {
            text.contains(pattern.as_str()) && response.budget.take()
        };
        let Some((_, response)) = self.guest.rules.iter().find(matches) else { return Ok(None) };
        for act in response.acts.clone() {
            match act {
                Act::Stdout(_) | Act::Stderr(_) | Act::Wait(_) => self.acts.push(act),
                Act::Exit(code) => return Ok(Some(code)),
                Act::PowerOff | Act::Reboot => {
                    self.acts.extend([act, Act::Hang]);
                    return Err(Stop::Over);
                }
                Act::Signal(_) | Act::Hang | Act::Cut | Act::Die(_) => {
                    self.acts.push(act);
                    return Err(Stop::Over);
                }
            }
        }
        Ok(Some(0))
    }

    /// Runs a script in this shell, and gives its code.
    fn script(&mut self, text: &str) -> Flow {
        if self.depth >= MAX_DEPTH {
            return Ok(self.complain("sh: too deep", 126));
        }
        self.depth += 1;
        // A script that cannot be read succeeds, like a command that is not known.
        let flow = parse::script(text).map_or(Ok(0), |node| self.node(&node));
        self.depth -= 1;
        flow
    }

    /// Runs something in a shell of its own: what it changes of variables, functions and options is forgotten.
    fn apart(&mut self, what: impl FnOnce(&mut Self) -> Flow) -> Flow {
        let before = (self.variables.clone(), self.functions.clone(), self.arguments.clone());
        let (errexit, directory, conditions) = (self.errexit, self.directory.clone(), self.conditions);
        let flow = what(self);
        (self.variables, self.functions, self.arguments) = before;
        (self.errexit, self.directory, self.conditions) = (errexit, directory, conditions);
        match flow {
            Err(Stop::Over) => Err(Stop::Over),
            Err(Stop::Exit(code) | Stop::Return(code)) | Ok(code) => Ok(code),
            Err(Stop::Break | Stop::Continue) => Ok(0),
        }
    }

    /// Runs a file of the guest as a program.
    fn file(&mut self, path: &str, arguments: Vec<String>, errexit: bool) -> Flow {
        let Some(bytes) = self.tree.read(path) else {
            return Ok(self.complain(&format!("sh: {path}: {}", Refusal::NotFound.text()), 127));
        };
        let text = String::from_utf8_lossy(bytes).into_owned();
        let prelude = path.contains(OURS) && path.ends_with("/bundle");
        if !prelude && let Some(code) = self.answer(&text)? {
            return Ok(code);
        }
        let first = text.lines().next().unwrap_or_default();
        if first.starts_with("#!") && !first.contains("sh") {
            return Ok(0);
        }
        self.apart(|shell| {
            shell.arguments = std::iter::once(path.to_owned()).chain(arguments).collect();
            (shell.errexit, shell.conditions) = (errexit, 0);
            shell.functions.clear();
            shell.script(&text)
        })
    }

    fn node(&mut self, node: &Node) -> Flow {
        let code = match node {
            Node::List(nodes) => {
                let mut code = 0;
                for node in nodes {
                    code = self.node(node)?;
                }
                code
            }
            Node::AndOr(first, rest) => {
                self.conditions += 1;
                let first = self.node(first);
                self.conditions -= 1;
                let mut code = first?;
                for (at, (and, node)) in rest.iter().enumerate() {
                    if *and != (code == 0) {
                        continue;
                    }
                    let last = at + 1 == rest.len();
                    self.conditions += u32::from(!last);
                    let flow = self.node(node);
                    self.conditions -= u32::from(!last);
                    code = flow?;
                }
                code
            }
            Node::Pipeline { parts, negated } => self.pipeline(parts, *negated)?,
            Node::Simple { assignments, words, redirects } => self.simple(assignments, words, redirects)?,
            Node::Group { body, redirects, isolated } => self.redirected(redirects, |shell| {
                if *isolated { shell.apart(|shell| shell.node(body)) } else { shell.node(body) }
            })?,
            Node::If { arms, otherwise } => {
                for (condition, body) in arms {
                    if self.condition(condition)? {
                        return self.node(body);
                    }
                }
                otherwise.as_ref().map_or(Ok(0), |body| self.node(body))?
            }
            Node::For { name, words, body } => {
                let values = match words {
                    Some(words) => self.fields(words)?,
                    None => self.arguments.iter().skip(1).cloned().collect(),
                };
                let mut code = 0;
                for value in values {
                    self.variables.insert(name.clone(), value);
                    match self.node(body) {
                        Ok(next) => code = next,
                        Err(Stop::Break) => break,
                        Err(Stop::Continue) => {}
                        Err(stop) => return Err(stop),
                    }
                }
                code
            }
            Node::While { condition, body, until } => {
                let mut code = 0;
                while self.condition(condition)? != *until {
                    self.count()?;
                    match self.node(body) {
                        Ok(next) => code = next,
                        Err(Stop::Break) => break,
                        Err(Stop::Continue) => {}
                        Err(stop) => return Err(stop),
                    }
                }
                code
            }
            Node::Case { word, arms } => {
                let text = self.text(word)?;
                for (patterns, body) in arms {
                    for pattern in patterns {
                        if expand::matches(&self.pattern(pattern)?, &text) {
                            return self.node(body);
                        }
                    }
                }
                0
            }
            Node::Function { name, body } => {
                self.functions.insert(name.clone(), Rc::new((**body).clone()));
                0
            }
        };
        self.last = code;
        let ends = match node {
            Node::Simple { .. } | Node::Group { isolated: true, .. } => true,
            Node::Pipeline { negated, .. } => !negated,
            _ => false,
        };
        if code != 0 && ends && self.errexit && self.conditions == 0 {
            return Err(Stop::Exit(code));
        }
        Ok(code)
    }

    fn condition(&mut self, node: &Node) -> Flow<bool> {
        self.conditions += 1;
        let flow = self.node(node);
        self.conditions -= 1;
        Ok(flow? == 0)
    }

    fn pipeline(&mut self, parts: &[Node], negated: bool) -> Flow {
        let input = self.input.clone();
        self.conditions += u32::from(negated);
        let mut flow = Ok(0);
        for (at, part) in parts.iter().enumerate() {
            let start = self.acts.len();
            flow = if parts.len() > 1 { self.apart(|shell| shell.node(part)) } else { self.node(part) };
            if flow.is_err() {
                break;
            }
            if at + 1 < parts.len() {
                self.input = self.take_stdout(start);
            }
        }
        self.conditions -= u32::from(negated);
        self.input = if parts.len() > 1 { input } else { std::mem::take(&mut self.input) };
        flow.map(|code| if negated { u32::from(code == 0) } else { code })
    }

    /// Takes back what was written to standard output since then.
    fn take_stdout(&mut self, start: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let acts = self.acts.split_off(start);
        for act in acts {
            match act {
                Act::Stdout(bytes) => out.extend(bytes),
                act => self.acts.push(act),
            }
        }
        out
    }

    /// Does something with its input and output redirected.
    fn redirected(&mut self, redirects: &[Redirect], what: impl FnOnce(&mut Self) -> Flow) -> Flow {
        if redirects.is_empty() {
            return what(self);
        }
        /// Where a stream goes.
        #[derive(Clone)]
        enum Target {
            Stdout,
            Stderr,
            File(usize),
        }
        let mut targets = [Target::Stdout, Target::Stderr];
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        let mut input = None;
        for redirect in redirects {
            match redirect {
                Redirect::In(word) => {
                    let name = self.text(word)?;
                    let path = self.path(&name);
                    let bytes = if path == "/dev/null" {
                        Some(Vec::new())
                    } else {
                        self.tree.read(&path).map(<[u8]>::to_vec)
                    };
                    match bytes {
                        Some(bytes) => input = Some(bytes),
                        None => {
                            return Ok(self.complain(&format!("sh: {name}: {}", Refusal::NotFound.text()), 1));
                        }
                    }
                }
                Redirect::Here(word) => input = Some(self.text(word)?.into_bytes()),
                Redirect::Out { fd, file, append } => {
                    let name = self.text(file)?;
                    let path = self.path(&name);
                    let before =
                        if *append { self.tree.read(&path).unwrap_or_default().to_vec() } else { Vec::new() };
                    // It is made, or emptied, before the command runs.
                    if path != "/dev/null"
                        && let Err(refusal) = self.write(&path, before.clone())
                    {
                        return Ok(self.complain(&format!("sh: {name}: {}", refusal.text()), 1));
                    }
                    files.push((path, before));
                    if let Some(target) = targets.get_mut(*fd as usize - 1) {
                        *target = Target::File(files.len() - 1);
                    }
                }
                Redirect::Duplicate { fd, to } => {
                    let to = targets.get((*to as usize).wrapping_sub(1)).cloned().unwrap_or(Target::Stdout);
                    if let Some(target) = targets.get_mut((*fd as usize).wrapping_sub(1)) {
                        *target = to;
                    }
                }
            }
        }
        let before = input.map(|input| std::mem::replace(&mut self.input, input));
        let start = self.acts.len();
        let flow = what(self);
        if let Some(before) = before {
            self.input = before;
        }
        for act in self.acts.split_off(start) {
            let (bytes, target) = match act {
                Act::Stdout(bytes) => (bytes, &targets[0]),
                Act::Stderr(bytes) => (bytes, &targets[1]),
                other => {
                    self.acts.push(other);
                    continue;
                }
            };
            match target {
                Target::Stdout => self.acts.push(Act::Stdout(bytes)),
                Target::Stderr => self.acts.push(Act::Stderr(bytes)),
                Target::File(at) => files[*at].1.extend(bytes),
            }
        }
        for (path, content) in files {
            // The command may have removed it; then what it wrote is gone too.
            if path != "/dev/null"
                && self.tree.read(&path).is_some()
                && self.tree.read(&path) != Some(&content)
            {
                let _ = self.tree.write(&path, content);
            }
        }
        flow
    }

    fn simple(&mut self, assignments: &[(String, Word)], words: &[Word], redirects: &[Redirect]) -> Flow {
        self.count()?;
        let words = self.fields(words)?;
        let mut values = Vec::new();
        for (name, word) in assignments {
            let start = self.last;
            self.last = 0;
            let value = self.text(word)?;
            values.push((name.clone(), value));
            if words.is_empty() {
                // `x=$(command)` ends as the command did.
                self.variables.extend(values.pop());
                if self.last != 0 {
                    return Ok(self.last);
                }
            }
            self.last = start;
        }
        if words.is_empty() {
            return self.redirected(redirects, |_| Ok(0));
        }
        // In front of a command, they are its own.
        let before: Vec<_> =
            values.iter().map(|(name, _)| (name.clone(), self.variables.get(name).cloned())).collect();
        self.variables.extend(values);
        let flow = self.redirected(redirects, |shell| shell.words(&words));
        for (name, value) in before {
            match value {
                Some(value) => drop(self.variables.insert(name, value)),
                None => drop(self.variables.remove(&name)),
            }
        }
        flow
    }

    /// Counts a command.
    fn count(&mut self) -> Flow<()> {
        self.commands += 1;
        if self.commands > MAX_COMMANDS {
            self.acts.push(Act::Hang);
            return Err(Stop::Over);
        }
        Ok(())
    }

    fn path(&self, path: &str) -> String {
        let whole =
            if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.directory) };
        normal(&whole, &self.user)
    }

    fn may(&self, path: &str) -> Result<(), Refusal> {
        if may_write(path, &self.user) { Ok(()) } else { Err(Refusal::Denied) }
    }

    fn write(&mut self, path: &str, content: Vec<u8>) -> Result<(), Refusal> {
        self.may(path)?;
        self.tree.write(path, content)
    }

    fn print(&mut self, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        if !bytes.is_empty() {
            self.acts.push(Act::Stdout(bytes));
        }
    }

    fn complain(&mut self, message: &str, code: u32) -> u32 {
        self.acts.push(Act::Stderr(format!("{message}\n").into_bytes()));
        code
    }
}

/// Whether a command line may wait for its standard input: only then is its end waited for.
pub(super) fn reads_stdin(line: &str) -> bool {
    let line = line.trim();
    ["cat >", "tee ", "sh -s", "dd of="].iter().any(|sign| line.contains(sign))
        || ["sh", "bash", "/bin/sh", "cat"].contains(&line.strip_prefix("sudo -n ").unwrap_or(line))
}

#[cfg(test)]
mod tests;
