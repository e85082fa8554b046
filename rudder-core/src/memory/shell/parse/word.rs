//! Words: quoting, variables and substitutions (POSIX.1-2017, XCU 2.2 and 2.6).

use super::*;

impl Parser {
    /// The word that begins here, if one does.
    pub(super) fn word(&mut self) -> Parsed<Option<Word>> {
        let mut parts = Word::new();
        let mut any = false;
        while let Some(c) = self.peek() {
            if c.is_whitespace() || ";&|()<>".contains(c) {
                break;
            }
            any = true;
            self.at += 1;
            match c {
                '\'' => {
                    let end =
                        self.text[self.at..].iter().position(|c| *c == '\'').ok_or(NotUnderstood)? + self.at;
                    let text = self.text[self.at..end].iter().collect();
                    parts.push(Part::Text { text, quoted: true });
                    self.at = end + 1;
                }
                '"' => parts.extend(self.double_quoted(Some('"'))?),
                '\\' => match self.peek() {
                    Some('\n') => self.at += 1,
                    Some(c) => {
                        self.at += 1;
                        parts.push(Part::Text { text: c.to_string(), quoted: true });
                    }
                    None => {}
                },
                '`' => return Err(NotUnderstood),
                '$' => parts.push(self.dollar(false)?),
                c => push(&mut parts, c, false),
            }
        }
        Ok(any.then_some(parts))
    }

    /// The inside of double quotes, or of a here-document (`None`).
    pub(super) fn double_quoted(&mut self, end: Option<char>) -> Parsed<Word> {
        // Even an empty pair of quotes is a word.
        let mut parts = vec![Part::Text { text: String::new(), quoted: true }];
        loop {
            let c = match self.peek() {
                Some(c) => c,
                None if end.is_none() => return Ok(parts),
                None => return Err(NotUnderstood),
            };
            self.at += 1;
            match c {
                c if Some(c) == end => return Ok(parts),
                '\\' => match self.peek() {
                    Some('\n') => self.at += 1,
                    Some(c @ ('"' | '\\' | '$' | '`')) => {
                        self.at += 1;
                        push(&mut parts, c, true);
                    }
                    _ => push(&mut parts, '\\', true),
                },
                '`' => return Err(NotUnderstood),
                '$' => parts.push(self.dollar(true)?),
                c => push(&mut parts, c, true),
            }
        }
    }

    /// What follows a `$`.
    pub(super) fn dollar(&mut self, quoted: bool) -> Parsed<Part> {
        if self.eat("((") {
            let text: String = self.text[self.at..].iter().collect();
            let end = text.find("))").ok_or(NotUnderstood)?;
            self.at += text[..end].chars().count() + 2;
            return Ok(Part::Arithmetic(text[..end].to_owned()));
        }
        if self.eat("(") {
            let body = Box::new(self.list(&[])?);
            return if self.eat(")") { Ok(Part::Command { body, quoted }) } else { Err(NotUnderstood) };
        }
        if self.eat("{") {
            if self.looking_at("#") && !self.looking_at("#}") {
                self.at += 1;
                let name = self.name();
                let done = self.eat("}");
                let operator = Some(("length".to_owned(), Word::new()));
                return if done { Ok(Part::Variable { name, operator, quoted }) } else { Err(NotUnderstood) };
            }
            let name = self.name();
            if name.is_empty() {
                return Err(NotUnderstood);
            }
            const OPERATORS: [&str; 12] = [":-", ":=", ":+", ":?", "##", "%%", "-", "=", "+", "?", "#", "%"];
            let operator = OPERATORS.into_iter().find(|operator| self.eat(operator));
            let Some(operator) = operator else {
                return if self.eat("}") {
                    Ok(Part::Variable { name, operator: None, quoted })
                } else {
                    Err(NotUnderstood)
                };
            };
            let word = self.double_quoted(Some('}'))?;
            return Ok(Part::Variable { name, operator: Some((operator.to_owned(), word)), quoted });
        }
        let name = self.name();
        Ok(if name.is_empty() {
            Part::Text { text: "$".into(), quoted: true }
        } else {
            Part::Variable { name, operator: None, quoted }
        })
    }

    /// The name of a variable, or one of the special parameters.
    pub(super) fn name(&mut self) -> String {
        match self.peek() {
            Some(c) if c.is_ascii_digit() || "@*#?$!".contains(c) => {
                self.at += 1;
                c.to_string()
            }
            _ => {
                let name: String = self.text[self.at..]
                    .iter()
                    .take_while(|c| c.is_ascii_alphanumeric() || **c == '_')
                    .collect();
                self.at += name.len();
                name
            }
        }
    }
}

fn push(parts: &mut Word, c: char, in_quotes: bool) {
    match parts.last_mut() {
        Some(Part::Text { text, quoted }) if *quoted == in_quotes => text.push(c),
        _ => parts.push(Part::Text { text: c.to_string(), quoted: in_quotes }),
    }
}
