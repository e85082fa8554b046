//! Commands on files: `cp`, `mkdir`, `stat`, `head`, `grep`…

use super::*;

impl Shell<'_> {
    pub(super) fn file_command(&mut self, program: &str, words: &[String], operands: &[&str]) -> u32 {
        let has = |flag: char| {
            words.iter().any(|word| word.starts_with('-') && !word.starts_with("--") && word.contains(flag))
        };
        let paths: Vec<String> = operands.iter().map(|path| self.path(path)).collect();
        let done = match (program, paths.as_slice()) {
            ("cat", []) => {
                let bytes = std::mem::take(&mut self.input);
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
                let bytes = std::mem::take(&mut self.input);
                self.print(bytes.clone());
                paths.iter().try_for_each(|path| self.write(path, bytes.clone()))
            }
            ("mkdir", _) => self.make_directories(words, has('p')),
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
            ("mv" | "cp" | "install", [.., from, to]) if !has('d') => self.transfer(program, from, to),
            ("install", paths) => {
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
            ("ls", paths) => paths.iter().try_for_each(|path| {
                let names: String = self.tree.children(path).map(|(name, _)| format!("{name}\n")).collect();
                self.tree.get(path).ok_or(Refusal::NotFound)?;
                self.print(names);
                Ok(())
            }),
            ("mktemp", paths) => {
                let random = format!("{:010x}", rand::random::<u64>() & 0xff_ffff_ffff);
                let template = paths.first().map_or("/tmp/tmp.X", String::as_str);
                let path = format!("{}{random}", template.trim_end_matches('X'));
                let made = self.may(&path);
                if has('d') {
                    self.tree.make_dirs(&path, 0o700);
                } else {
                    self.tree.put(&path, Vec::new(), 0o600);
                }
                self.print(format!("{path}\n"));
                made
            }
            _ => return self.show(program, words, operands, &paths),
        };
        match done {
            Ok(()) => 0,
            Err(refusal) => {
                self.complain(&format!("{program}: {}: {}", operands.join(" "), refusal.text()), 1)
            }
        }
    }

    fn make_directories(&mut self, words: &[String], parents: bool) -> Result<(), Refusal> {
        let (mut mode, mut words) = (0o755, words.iter());
        while let Some(word) = words.next() {
            if word == "-m" {
                mode = words.next().and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(mode);
                continue;
            }
            if word.starts_with('-') {
                continue;
            }
            let path = self.path(word);
            if parents && self.tree.get(&path).is_some_and(Node::is_dir) {
                continue;
            }
            self.may(&path)?;
            if parents {
                self.tree.make_dirs(&path, mode);
            } else {
                self.tree.make_dir(&path, mode)?;
            }
        }
        Ok(())
    }

    /// `mv`, `cp`, `install`: one file to a file or into a directory.
    fn transfer(&mut self, program: &str, from: &str, to: &str) -> Result<(), Refusal> {
        let mut to = to.to_owned();
        if self.tree.get(&to).is_some_and(Node::is_dir) {
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

    /// `stat -c %s`, `wc`, `sha256sum`, `tail -n +N`, `head -n N`, `grep`: what reads a file, or the input.
    pub(super) fn show(
        &mut self,
        program: &str,
        words: &[String],
        operands: &[&str],
        paths: &[String],
    ) -> u32 {
        let path = paths.iter().rfind(|path| self.tree.read(path).is_some());
        let bytes = match path {
            Some(path) => self.tree.read(path).unwrap_or_default().to_vec(),
            None if operands.last().is_some_and(|operand| operand.contains('/')) => {
                let message = format!("{program}: {}: {}", operands.join(" "), Refusal::NotFound.text());
                return self.complain(&message, 1);
            }
            None => std::mem::take(&mut self.input),
        };
        let has = |flag: &str| words.iter().any(|word| word == flag);
        let count =
            words.iter().find_map(|word| word.trim_start_matches(['-', '+', 'n']).parse::<usize>().ok());
        let count = count.unwrap_or(10);
        match program {
            "sha256sum" => {
                let name = path.map_or("-", String::as_str);
                self.print(format!("{}  {name}\n", crate::digest::Digest::of(&bytes)));
            }
            "wc" => {
                let lines = bytes.iter().filter(|c| **c == b'\n').count();
                let number = if has("-l") { lines } else { bytes.len() };
                self.print(path.map_or(format!("{number}\n"), |path| format!("{number} {path}\n")));
            }
            "stat" => self.print(format!("{}\n", bytes.len())),
            "tail" | "head" => {
                let lines: Vec<&[u8]> = bytes.split_inclusive(|c| *c == b'\n').collect();
                let kept = if program == "head" {
                    &lines[..count.min(lines.len())]
                } else if words.iter().any(|word| word.starts_with('+')) {
                    &lines[count.saturating_sub(1).min(lines.len())..]
                } else {
                    &lines[lines.len().saturating_sub(count)..]
                };
                self.print(kept.concat());
            }
            _ => {
                let wanted = operands.first().copied().unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let pattern = format!("*{}*", wanted.trim_start_matches('^').trim_end_matches('$'));
                let found: Vec<&str> = text.lines().filter(|line| expand::matches(&pattern, line)).collect();
                if !has("-q") {
                    self.print(found.iter().map(|line| format!("{line}\n")).collect::<String>());
                }
                // What a command that is not known would have said is not known either: that succeeds, as it did.
                let unknown = path.is_none() && bytes.is_empty();
                return u32::from(found.is_empty() && !unknown);
            }
        }
        0
    }
}
