//! Reads the shell language, as far as scripts of builds use it (POSIX.1-2017, XCU chapter 2): lists, pipelines, groups,
//! `if`, `for`, `while`, `case`, functions, here-documents, quoting and substitutions.

mod word;

/// Something that is executed.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Simple {
        assignments: Vec<(String, Word)>,
        words: Vec<Word>,
        redirects: Vec<Redirect>,
    },
    Pipeline {
        parts: Vec<Node>,
        negated: bool,
    },
    /// The rest follows when the one before succeeded (`true`) or failed.
    AndOr(Box<Node>, Vec<(bool, Node)>),
    List(Vec<Node>),
    /// `{ }` or `( )`; the latter keeps its changes to itself.
    Group {
        body: Box<Node>,
        redirects: Vec<Redirect>,
        isolated: bool,
    },
    If {
        arms: Vec<(Node, Node)>,
        otherwise: Option<Box<Node>>,
    },
    For {
        name: String,
        words: Option<Vec<Word>>,
        body: Box<Node>,
    },
    While {
        condition: Box<Node>,
        body: Box<Node>,
        until: bool,
    },
    Case {
        word: Word,
        arms: Vec<(Vec<Word>, Node)>,
    },
    Function {
        name: String,
        body: Box<Node>,
    },
}

/// A word before expansion.
pub(super) type Word = Vec<Part>;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Part {
    Text {
        text: String,
        quoted: bool,
    },
    /// `$NAME`, `${NAME}`, and `${NAME-WORD}`, `${NAME#PATTERN}`… with operator and word.
    Variable {
        name: String,
        operator: Option<(String, Word)>,
        quoted: bool,
    },
    /// `$(…)`.
    Command {
        body: Box<Node>,
        quoted: bool,
    },
    /// `$((…))`.
    Arithmetic(String),
}

/// Where output goes or input comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Redirect {
    Out {
        fd: u32,
        file: Word,
        append: bool,
    },
    /// `2>&1`: the first goes where the second goes.
    Duplicate {
        fd: u32,
        to: u32,
    },
    In(Word),
    Here(Word),
}

/// What a script cannot be read for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotUnderstood;

type Parsed<T> = Result<T, NotUnderstood>;

/// Reads a whole script.
pub(super) fn script(text: &str) -> Parsed<Node> {
    let mut parser = Parser { text: text.chars().collect(), at: 0, here: Vec::new(), depth: 0 };
    let node = parser.list(&[])?;
    if parser.at < parser.text.len() || !parser.here.is_empty() {
        return Err(NotUnderstood);
    }
    Ok(node)
}

/// Deeper nesting than this is not what a script does.
const MAX_DEPTH: u32 = 60;
/// Words that are not commands where a command begins.
const CLOSERS: [&str; 8] = ["then", "else", "elif", "fi", "do", "done", "esac", "}"];

struct Parser {
    text: Vec<char>,
    at: usize,
    /// Here-documents whose lines are still to come: the delimiter, whether it was quoted, whether tabs are cut off, and
    /// its mark in the word.
    here: Vec<Pending>,
    depth: u32,
}

struct Pending {
    delimiter: String,
    raw: bool,
    tabs: bool,
    body: std::rc::Rc<std::cell::RefCell<Option<Word>>>,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn looking_at(&self, what: &str) -> bool {
        what.chars().enumerate().all(|(n, c)| self.text.get(self.at + n) == Some(&c))
    }

    fn eat(&mut self, what: &str) -> bool {
        let found = self.looking_at(what);
        if found {
            self.at += what.chars().count();
        }
        found
    }

    fn blanks(&mut self) {
        loop {
            if self.eat("\\\n") {
                continue;
            }
            match self.peek() {
                Some(' ' | '\t' | '\r') => self.at += 1,
                Some('#') => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    /// Blanks, newlines, and the here-documents that begin after a newline.
    fn lines(&mut self) -> Parsed<()> {
        loop {
            self.blanks();
            if !self.eat("\n") {
                return Ok(());
            }
            self.here_documents()?;
        }
    }

    fn here_documents(&mut self) -> Parsed<()> {
        for pending in std::mem::take(&mut self.here) {
            let mut body = String::new();
            loop {
                if self.at >= self.text.len() {
                    return Err(NotUnderstood);
                }
                let end = self.text[self.at..].iter().position(|c| *c == '\n').map(|n| self.at + n);
                let line: String = self.text[self.at..end.unwrap_or(self.text.len())].iter().collect();
                self.at = end.map_or(self.text.len(), |end| end + 1);
                let line = if pending.tabs { line.trim_start_matches('\t') } else { &line };
                if line == pending.delimiter {
                    break;
                }
                body.push_str(line);
                body.push('\n');
            }
            let word = if pending.raw {
                vec![Part::Text { text: body, quoted: true }]
            } else {
                let mut inner =
                    Parser { text: body.chars().collect(), at: 0, here: Vec::new(), depth: self.depth };
                inner.double_quoted(None)?
            };
            *pending.body.borrow_mut() = Some(word);
        }
        Ok(())
    }

    /// The word that begins here, if it is made of plain letters: for keywords.
    fn keyword(&self) -> String {
        let end = |c: &char| c.is_whitespace() || ";&|()<>".contains(*c);
        self.text[self.at..].iter().take_while(|c| !end(c)).collect()
    }

    fn expect(&mut self, keyword: &str) -> Parsed<()> {
        self.lines()?;
        if self.keyword() == keyword && self.eat(keyword) { Ok(()) } else { Err(NotUnderstood) }
    }

    /// Commands up to one of these words, which is not taken; or to the end or a `)`.
    fn list(&mut self, until: &[&str]) -> Parsed<Node> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(NotUnderstood);
        }
        let mut nodes = Vec::new();
        loop {
            self.lines()?;
            let keyword = self.keyword();
            if self.peek().is_none()
                || self.peek() == Some(')')
                || self.looking_at(";;")
                || until.contains(&keyword.as_str())
            {
                break;
            }
            if CLOSERS.contains(&keyword.as_str()) {
                return Err(NotUnderstood);
            }
            nodes.push(self.and_or()?);
            self.blanks();
            if !self.looking_at(";;") && !self.eat(";") && self.peek() == Some('&') {
                self.at += 1;
            }
        }
        self.depth -= 1;
        Ok(Node::List(nodes))
    }

    fn and_or(&mut self) -> Parsed<Node> {
        let first = self.pipeline()?;
        let mut rest = Vec::new();
        loop {
            self.blanks();
            let and = self.looking_at("&&");
            if !and && !self.looking_at("||") {
                break;
            }
            self.at += 2;
            self.lines()?;
            rest.push((and, self.pipeline()?));
        }
        Ok(if rest.is_empty() { first } else { Node::AndOr(Box::new(first), rest) })
    }

    fn pipeline(&mut self) -> Parsed<Node> {
        self.blanks();
        let negated = self.keyword() == "!" && self.eat("!");
        let mut parts = vec![self.command()?];
        loop {
            self.blanks();
            if self.looking_at("||") || !self.eat("|") {
                break;
            }
            self.lines()?;
            parts.push(self.command()?);
        }
        match parts.pop() {
            Some(only) if parts.is_empty() && !negated => Ok(only),
            last => {
                parts.extend(last);
                Ok(Node::Pipeline { parts, negated })
            }
        }
    }

    fn command(&mut self) -> Parsed<Node> {
        self.blanks();
        let keyword = self.keyword();
        let compound = match keyword.as_str() {
            "if" => {
                self.eat("if");
                self.conditional()?
            }
            "for" => {
                self.eat("for");
                self.loop_over()?
            }
            "while" | "until" => {
                self.eat(&keyword);
                let condition = Box::new(self.list(&["do"])?);
                Node::While { condition, body: Box::new(self.body()?), until: keyword == "until" }
            }
            "case" => {
                self.eat("case");
                self.choice()?
            }
            "{" => {
                self.eat("{");
                let body = Box::new(self.list(&["}"])?);
                self.expect("}")?;
                Node::Group { body, redirects: Vec::new(), isolated: false }
            }
            _ if self.peek() == Some('(') => {
                self.at += 1;
                let body = Box::new(self.list(&[])?);
                if !self.eat(")") {
                    return Err(NotUnderstood);
                }
                Node::Group { body, redirects: Vec::new(), isolated: true }
            }
            "[[" | "function" | "select" => return Err(NotUnderstood),
            _ => return self.simple(),
        };
        let mut redirects = Vec::new();
        while let Some(redirect) = self.redirect()? {
            redirects.push(redirect);
        }
        Ok(match compound {
            Node::Group { body, isolated, .. } => Node::Group { body, redirects, isolated },
            other if redirects.is_empty() => other,
            other => Node::Group { body: Box::new(other), redirects, isolated: false },
        })
    }

    fn conditional(&mut self) -> Parsed<Node> {
        let mut arms = Vec::new();
        loop {
            let condition = self.list(&["then"])?;
            self.expect("then")?;
            arms.push((condition, self.list(&["elif", "else", "fi"])?));
            if self.keyword() != "elif" {
                break;
            }
            self.eat("elif");
        }
        let otherwise = if self.keyword() == "else" && self.eat("else") {
            Some(Box::new(self.list(&["fi"])?))
        } else {
            None
        };
        self.expect("fi")?;
        Ok(Node::If { arms, otherwise })
    }

    fn loop_over(&mut self) -> Parsed<Node> {
        self.blanks();
        let name = self.keyword();
        self.eat(&name);
        self.lines()?;
        let words = if self.keyword() == "in" && self.eat("in") {
            let mut words = Vec::new();
            self.blanks();
            while let Some(word) = self.word()? {
                words.push(word);
                self.blanks();
            }
            Some(words)
        } else {
            None
        };
        self.blanks();
        self.eat(";");
        Ok(Node::For { name, words, body: Box::new(self.body()?) })
    }

    fn body(&mut self) -> Parsed<Node> {
        self.expect("do")?;
        let body = self.list(&["done"])?;
        self.expect("done")?;
        Ok(body)
    }

    fn choice(&mut self) -> Parsed<Node> {
        self.blanks();
        let word = self.word()?.ok_or(NotUnderstood)?;
        self.expect("in")?;
        let mut arms = Vec::new();
        loop {
            self.lines()?;
            if self.keyword() == "esac" {
                break;
            }
            self.eat("(");
            let mut patterns = Vec::new();
            loop {
                self.blanks();
                patterns.push(self.word()?.ok_or(NotUnderstood)?);
                self.blanks();
                if !self.eat("|") {
                    break;
                }
            }
            if !self.eat(")") {
                return Err(NotUnderstood);
            }
            arms.push((patterns, self.list(&["esac"])?));
            self.eat(";;");
        }
        self.expect("esac")?;
        Ok(Node::Case { word, arms })
    }

    fn simple(&mut self) -> Parsed<Node> {
        let (mut assignments, mut words, mut redirects) = (Vec::new(), Vec::<Word>::new(), Vec::new());
        loop {
            self.blanks();
            if let Some(redirect) = self.redirect()? {
                redirects.push(redirect);
                continue;
            }
            let keyword = self.keyword();
            if words.is_empty() && is_name(&keyword) {
                let after = self.at + keyword.chars().count();
                if self.text[after..].starts_with(&['(', ')']) {
                    self.at = after + 2;
                    self.lines()?;
                    return Ok(Node::Function { name: keyword, body: Box::new(self.command()?) });
                }
            }
            if words.is_empty()
                && let Some((name, _)) = keyword.split_once('=')
                && is_name(name)
            {
                self.at += name.chars().count() + 1;
                assignments.push((name.to_owned(), self.word()?.unwrap_or_default()));
                continue;
            }
            match self.word()? {
                Some(word) => words.push(word),
                None => break,
            }
        }
        if assignments.is_empty() && words.is_empty() && redirects.is_empty() {
            return Err(NotUnderstood);
        }
        Ok(Node::Simple { assignments, words, redirects })
    }

    fn redirect(&mut self) -> Parsed<Option<Redirect>> {
        self.blanks();
        let start = self.at;
        let digit = self.peek().and_then(|c| c.to_digit(10));
        if digit.is_some() {
            self.at += 1;
        }
        let redirect = if self.looking_at("<<<") {
            return Err(NotUnderstood);
        } else if self.eat("<<") {
            self.here_document()?
        } else if self.eat("<") {
            self.blanks();
            Redirect::In(self.word()?.ok_or(NotUnderstood)?)
        } else if self.eat(">&") {
            let to = self.peek().and_then(|c| c.to_digit(10)).ok_or(NotUnderstood)?;
            self.at += 1;
            Redirect::Duplicate { fd: digit.unwrap_or(1), to }
        } else if self.looking_at(">") {
            let append = self.eat(">>");
            if !append {
                self.at += 1;
                self.eat("|");
            }
            self.blanks();
            Redirect::Out { fd: digit.unwrap_or(1), file: self.word()?.ok_or(NotUnderstood)?, append }
        } else {
            self.at = start;
            return Ok(None);
        };
        Ok(Some(redirect))
    }

    /// The lines come later, but the tree must be whole: so the rest of this line is skipped, the lines are read, and the
    /// rest of the line is put behind them.
    fn here_document(&mut self) -> Parsed<Redirect> {
        let tabs = self.eat("-");
        self.blanks();
        let word = self.word()?.ok_or(NotUnderstood)?;
        let mut raw = false;
        let mut delimiter = String::new();
        for part in word {
            let Part::Text { text, quoted } = part else { return Err(NotUnderstood) };
            raw |= quoted;
            delimiter.push_str(&text);
        }
        let newline = self.text[self.at..].iter().position(|c| *c == '\n').ok_or(NotUnderstood)? + self.at;
        let rest: Vec<char> = self.text[self.at..newline].to_vec();
        let body = std::rc::Rc::default();
        self.here.push(Pending { delimiter, raw, tabs, body: std::rc::Rc::clone(&body) });
        self.at = newline + 1;
        self.here_documents()?;
        let tail: Vec<char> =
            rest.into_iter().chain(['\n']).chain(self.text[self.at..].iter().copied()).collect();
        self.text = tail;
        self.at = 0;
        let word = body.borrow_mut().take().ok_or(NotUnderstood)?;
        Ok(Redirect::Here(word))
    }
}

/// Whether this can be the name of a variable.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
