//! Takes a line of shell apart into simple commands: words, quotes, redirections, `;` `&&` `||` and `|`. What it does not
//! know (loops, functions, substitutions, here-documents) it says so, and the caller does not pretend.

use std::collections::BTreeMap;

/// What joins a command to the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    /// `;`, a newline, or the beginning.
    Then,
    /// `&&`.
    And,
    /// `||`.
    Or,
    /// `|`.
    Pipe,
}

/// Where output goes or input comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Redirect {
    /// `> FILE` and `>> FILE`.
    Out { file: String, append: bool },
    /// `2> FILE`.
    Err,
    /// `2>&1`.
    ErrToOut,
    /// `>&2`.
    OutToErr,
    /// `< FILE`.
    In(String),
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Simple {
    /// How it follows on the one before.
    pub(super) join: Join,
    /// Its words, quotes removed, variables in place.
    pub(super) words: Vec<String>,
    /// Its redirections.
    pub(super) redirects: Vec<Redirect>,
}

/// Words that begin what is not taken apart here.
const COMPOUND: [&str; 12] =
    ["if", "for", "while", "until", "case", "function", "select", "{", "(", "[[", "trap", "!"];

#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    Operator(&'static str),
}

/// The commands of a script; `None` when there is more in it than simple commands.
pub(super) fn commands(text: &str, variables: &BTreeMap<String, String>) -> Option<Vec<Simple>> {
    let mut out = Vec::new();
    let mut simple = Simple { join: Join::Then, words: Vec::new(), redirects: Vec::new() };
    let mut tokens = tokens(text, variables)?.into_iter();
    while let Some(token) = tokens.next() {
        let operator = match token {
            Token::Word(word) => {
                if simple.words.is_empty() && COMPOUND.contains(&word.as_str()) || word.ends_with("()") {
                    return None;
                }
                simple.words.push(word);
                continue;
            }
            Token::Operator(operator) => operator,
        };
        let mut file = || match tokens.next() {
            Some(Token::Word(file)) => Some(file),
            _ => None,
        };
        let join = match operator {
            ">" | ">>" => {
                simple.redirects.push(Redirect::Out { file: file()?, append: operator == ">>" });
                continue;
            }
            "2>" | "2>>" => {
                file()?;
                simple.redirects.push(Redirect::Err);
                continue;
            }
            "2>&1" => {
                simple.redirects.push(Redirect::ErrToOut);
                continue;
            }
            ">&2" => {
                simple.redirects.push(Redirect::OutToErr);
                continue;
            }
            "<" => {
                simple.redirects.push(Redirect::In(file()?));
                continue;
            }
            "&&" => Join::And,
            "||" => Join::Or,
            "|" => Join::Pipe,
            _ => Join::Then,
        };
        // A newline after an operator continues the line.
        if simple.words.is_empty() && simple.redirects.is_empty() {
            continue;
        }
        let next = Simple { join, words: Vec::new(), redirects: Vec::new() };
        out.push(std::mem::replace(&mut simple, next));
    }
    if !simple.words.is_empty() || !simple.redirects.is_empty() {
        out.push(simple);
    }
    Some(out)
}

fn tokens(text: &str, variables: &BTreeMap<String, String>) -> Option<Vec<Token>> {
    const OPERATORS: [&str; 12] = ["2>&1", "2>>", "2>", "1>&2", ">&2", ">>", ">", "&&", "||", "|", "<", ";"];
    let mut out = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let next = &rest[c.len_utf8()..];
        if word.is_none() || !c.is_ascii_digit() {
            if rest.starts_with("<<") {
                return None;
            }
            if let Some(operator) = OPERATORS.into_iter().find(|operator| rest.starts_with(operator)) {
                out.extend(word.take().map(Token::Word));
                out.push(Token::Operator(if operator == "1>&2" { ">&2" } else { operator }));
                rest = &rest[operator.len()..];
                continue;
            }
        }
        rest = next;
        match c {
            '\n' | '&' => {
                out.extend(word.take().map(Token::Word));
                out.push(Token::Operator(";"));
            }
            c if c.is_whitespace() => out.extend(word.take().map(Token::Word)),
            '#' if word.is_none() => rest = rest.find('\n').map_or("", |at| &rest[at..]),
            '\'' => {
                let end = rest.find('\'')?;
                word.get_or_insert_default().push_str(&rest[..end]);
                rest = &rest[end + 1..];
            }
            '"' => {
                let text = word.get_or_insert_default();
                loop {
                    let c = rest.chars().next()?;
                    rest = &rest[c.len_utf8()..];
                    match c {
                        '"' => break,
                        '\\' => {
                            let c = rest.chars().next()?;
                            rest = &rest[c.len_utf8()..];
                            if !matches!(c, '"' | '\\' | '$' | '`') {
                                text.push('\\');
                            }
                            text.push(c);
                        }
                        '`' => return None,
                        '$' => rest = expand(rest, variables, text)?,
                        c => text.push(c),
                    }
                }
            }
            '\\' => {
                let c = rest.chars().next()?;
                rest = &rest[c.len_utf8()..];
                if c != '\n' {
                    word.get_or_insert_default().push(c);
                }
            }
            '`' => return None,
            '(' if word.is_none() => return None,
            '$' => rest = expand(rest, variables, word.get_or_insert_default())?,
            c => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word.map(Token::Word));
    Some(out)
}

/// Puts the value of the variable whose name follows a `$` into the word, and gives what follows the name.
fn expand<'a>(rest: &'a str, variables: &BTreeMap<String, String>, word: &mut String) -> Option<&'a str> {
    if rest.starts_with('(') {
        return None;
    }
    let (name, after) = match rest.strip_prefix('{') {
        Some(inner) => inner.split_at(inner.find('}')?),
        None => {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            rest.split_at(end)
        }
    };
    if rest.starts_with('{') {
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return None;
        }
        word.push_str(variables.get(name).map_or("", String::as_str));
        return Some(&after[1..]);
    }
    if name.is_empty() {
        word.push('$');
    } else {
        word.push_str(variables.get(name).map_or("", String::as_str));
    }
    Some(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_taken_apart_as_a_shell_does() {
        let variables = BTreeMap::from([("NAME".to_owned(), "a b".to_owned())]);
        let commands = |text: &str| commands(text, &variables);
        let words = |text: &str| {
            commands(text)
                .map(|all| all.into_iter().map(|simple| (simple.join, simple.words)).collect::<Vec<_>>())
        };
        assert_eq!(
            words("echo 'x;y' \"$NAME\" a\\ b && true || false # no\nz"),
            Some(vec![
                (Join::Then, vec!["echo".into(), "x;y".into(), "a b".into(), "a b".into()]),
                (Join::And, vec!["true".into()]),
                (Join::Or, vec!["false".into()]),
                (Join::Then, vec!["z".into()]),
            ])
        );
        let all = commands("echo hi >> /tmp/x 2>&1").expect("simple");
        assert_eq!(
            all[0].redirects,
            [Redirect::Out { file: "/tmp/x".into(), append: true }, Redirect::ErrToOut]
        );
        for more in ["if a; then b; fi", "echo $(date)", "cat <<E\nE", "f() { :; }", "(a; b)", "echo 'open"] {
            assert_eq!(commands(more), None, "{more}");
        }
    }
}
