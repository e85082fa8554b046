//! What words become: variables, command substitution, fields, patterns, arithmetic.

use super::{
    Flow, Shell,
    parse::{Part, Word},
};

/// A piece of a word after expansion.
struct Piece {
    text: String,
    quoted: bool,
    /// Split at blanks, and here a field ends (`"$@"`).
    ends: bool,
}

impl Shell<'_> {
    /// The fields that words become.
    pub(super) fn fields(&mut self, words: &[Word]) -> Flow<Vec<String>> {
        let mut fields = Vec::new();
        for word in words {
            let mut field: Option<String> = None;
            for piece in self.pieces(word)? {
                if piece.quoted {
                    field.get_or_insert_default().push_str(&piece.text);
                    if piece.ends {
                        fields.extend(field.take());
                    }
                    continue;
                }
                let mut parts = piece.text.split([' ', '\t', '\n']);
                if let Some(first) = parts.next()
                    && !first.is_empty()
                {
                    field.get_or_insert_default().push_str(first);
                }
                for part in parts {
                    fields.extend(field.take());
                    if !part.is_empty() {
                        field = Some(part.to_owned());
                    }
                }
            }
            fields.extend(field);
        }
        Ok(fields)
    }

    /// A word as one text.
    pub(super) fn text(&mut self, word: &Word) -> Flow<String> {
        Ok(self.pieces(word)?.into_iter().map(|piece| piece.text).collect())
    }

    /// A word as a pattern: what was quoted stands for itself.
    pub(super) fn pattern(&mut self, word: &Word) -> Flow<String> {
        let escaped = |piece: Piece| {
            if !piece.quoted {
                return piece.text;
            }
            piece
                .text
                .chars()
                .flat_map(|c| "*?[\\".contains(c).then_some('\\').into_iter().chain([c]))
                .collect()
        };
        Ok(self.pieces(word)?.into_iter().map(escaped).collect())
    }

    fn pieces(&mut self, word: &Word) -> Flow<Vec<Piece>> {
        let mut pieces = Vec::new();
        for part in word {
            match part {
                // Text is never split; it has no blanks unless they were quoted.
                Part::Text { text, quoted } => {
                    pieces.push(Piece { text: text.clone(), quoted: *quoted, ends: false });
                }
                Part::Variable { name, operator: None, quoted: true } if name == "@" => {
                    let count = self.arguments.len();
                    for (at, argument) in self.arguments.iter().enumerate().skip(1) {
                        pieces.push(Piece { text: argument.clone(), quoted: true, ends: at + 1 < count });
                    }
                    // No arguments are no field, though the quotes would be one.
                    if count == 1
                        && word
                            .iter()
                            .all(|part| !matches!(part, Part::Text { text, .. } if !text.is_empty()))
                    {
                        pieces.clear();
                    }
                }
                Part::Variable { name, operator, quoted } => {
                    let text = self.value(name, operator.as_ref())?;
                    pieces.push(Piece { text, quoted: *quoted, ends: false });
                }
                Part::Command { body, quoted } => {
                    let start = self.acts.len();
                    let code = self.apart(|shell| shell.node(body))?;
                    let bytes = self.take_stdout(start);
                    self.last = code;
                    let text = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned();
                    pieces.push(Piece { text, quoted: *quoted, ends: false });
                }
                Part::Arithmetic(text) => {
                    let value = self.arithmetic(text);
                    pieces.push(Piece { text: value.to_string(), quoted: true, ends: false });
                }
            }
        }
        Ok(pieces)
    }

    fn parameter(&self, name: &str) -> Option<String> {
        match name {
            "?" => Some(self.last.to_string()),
            "$" => Some("4242".to_owned()),
            "!" => Some("4243".to_owned()),
            "#" => Some((self.arguments.len() - 1).to_string()),
            "@" | "*" => Some(self.arguments.get(1..).unwrap_or_default().join(" ")),
            _ => match name.parse::<usize>() {
                Ok(at) => self.arguments.get(at).cloned(),
                Err(_) => self.variables.get(name).cloned(),
            },
        }
    }

    fn value(&mut self, name: &str, operator: Option<&(String, Word)>) -> Flow<String> {
        let value = self.parameter(name);
        let Some((operator, word)) = operator else { return Ok(value.unwrap_or_default()) };
        let set = match operator.starts_with(':') {
            true => value.clone().filter(|value| !value.is_empty()),
            false => value.clone(),
        };
        match operator.trim_start_matches(':') {
            "length" => Ok(value.unwrap_or_default().chars().count().to_string()),
            "-" | "?" => set.map_or_else(|| self.text(word), Ok),
            "+" => set.map_or_else(|| Ok(String::new()), |_| self.text(word)),
            "=" => match set {
                Some(value) => Ok(value),
                None => {
                    let text = self.text(word)?;
                    self.variables.insert(name.to_owned(), text.clone());
                    Ok(text)
                }
            },
            trim => {
                let pattern: String = self.text(word)?;
                let value = value.unwrap_or_default();
                let cuts: Vec<usize> = value.char_indices().map(|(at, _)| at).chain([value.len()]).collect();
                let front = |at: &&usize| matches(&pattern, &value[..**at]);
                let back = |at: &&usize| matches(&pattern, &value[**at..]);
                Ok(match trim {
                    "#" => cuts.iter().find(front).map_or(value.clone(), |at| value[*at..].to_owned()),
                    "##" => cuts.iter().rev().find(front).map_or(value.clone(), |at| value[*at..].to_owned()),
                    "%" => cuts.iter().rev().find(back).map_or(value.clone(), |at| value[..*at].to_owned()),
                    _ => cuts.iter().find(back).map_or(value.clone(), |at| value[..*at].to_owned()),
                })
            }
        }
    }

    /// Sums and products of numbers and variables, from left to right with the usual precedence.
    fn arithmetic(&self, text: &str) -> i64 {
        let mut terms: Vec<i64> = Vec::new();
        let (mut sign, mut product) = (1, None);
        let spaced: String = text
            .chars()
            .flat_map(|c| if "+-*/%".contains(c) { vec![' ', c, ' '] } else { vec![c] })
            .collect();
        for word in spaced.split_whitespace() {
            match word {
                "+" => sign = 1,
                "-" => sign = -1,
                "*" | "/" | "%" => product = Some(word.to_owned()),
                word => {
                    let name = word.trim_start_matches('$');
                    let value = name.parse().ok().or_else(|| self.parameter(name)?.parse().ok()).unwrap_or(0);
                    match (product.take().as_deref(), terms.last_mut()) {
                        (Some("*"), Some(last)) => *last = last.wrapping_mul(value),
                        (Some("/"), Some(last)) => *last = last.checked_div(value).unwrap_or(0),
                        (Some(_), Some(last)) => *last = last.checked_rem(value).unwrap_or(0),
                        _ => terms.push(value.wrapping_mul(sign)),
                    }
                    sign = 1;
                }
            }
        }
        terms.into_iter().fold(0, i64::wrapping_add)
    }
}

/// Whether a text matches a pattern of `*`, `?`, `[…]` and `\`.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let Some(first) = pattern.chars().next() else { return text.is_empty() };
    let rest = &pattern[first.len_utf8()..];
    let head = text.chars().next();
    let tail = head.map_or("", |c| &text[c.len_utf8()..]);
    match first {
        '*' => matches(rest, text) || head.is_some() && matches(pattern, tail),
        '?' => head.is_some() && matches(rest, tail),
        '[' => match (rest.find(']'), head) {
            (Some(end), Some(c)) => {
                let set: Vec<char> = rest[..end].trim_start_matches('!').chars().collect();
                let within = set.contains(&c)
                    || set.windows(3).any(|range| range[1] == '-' && (range[0]..=range[2]).contains(&c));
                within != rest.starts_with('!') && matches(&rest[end + 1..], tail)
            }
            _ => false,
        },
        '\\' => {
            let literal = rest.chars().next();
            literal == head && matches(&rest[literal.map_or(0, char::len_utf8)..], tail)
        }
        c => head == Some(c) && matches(rest, tail),
    }
}
