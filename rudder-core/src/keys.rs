//! Keys: X11 keysyms, the US keyboard, and the grammar of boot commands.
//!
//! Keysyms are those of `X11/keysymdef.h`, as RFB sends them (RFC 6143, 7.5.4).

use crate::units::parse_duration;
use std::time::Duration;

/// The keysym of the left Shift key.
pub const SHIFT_LEFT: u32 = 0xffe1;

/// Keys that have a name in boot commands. Names are compared without regard to case.
const NAMED: &[(&str, u32)] = &[
    ("enter", 0xff0d),
    ("return", 0xff0d),
    ("tab", 0xff09),
    ("esc", 0xff1b),
    ("escape", 0xff1b),
    ("bs", 0xff08),
    ("backspace", 0xff08),
    ("del", 0xffff),
    ("delete", 0xffff),
    ("insert", 0xff63),
    ("home", 0xff50),
    ("end", 0xff57),
    ("pageUp", 0xff55),
    ("pageDown", 0xff56),
    ("left", 0xff51),
    ("up", 0xff52),
    ("right", 0xff53),
    ("down", 0xff54),
    ("space", 0x20),
    ("spacebar", 0x20),
    ("f1", 0xffbe),
    ("f2", 0xffbf),
    ("f3", 0xffc0),
    ("f4", 0xffc1),
    ("f5", 0xffc2),
    ("f6", 0xffc3),
    ("f7", 0xffc4),
    ("f8", 0xffc5),
    ("f9", 0xffc6),
    ("f10", 0xffc7),
    ("f11", 0xffc8),
    ("f12", 0xffc9),
    ("menu", 0xff67),
    ("leftSuper", 0xffeb),
    ("rightSuper", 0xffec),
    ("leftCtrl", 0xffe3),
    ("rightCtrl", 0xffe4),
    ("leftAlt", 0xffe9),
    ("rightAlt", 0xffea),
    ("leftShift", SHIFT_LEFT),
    ("rightShift", 0xffe2),
];

/// The templates that a boot command may hold, by name.
pub const BOOT_VARIABLES: &[&str] = &["HTTPIP", "HTTPPort", "Name"];

/// The keysym of a key by its name in boot commands, without regard to case: `enter`, `F1`, `leftCtrl`.
#[must_use]
pub fn named_key(name: &str) -> Option<u32> {
    NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, keysym)| *keysym)
}

/// What is pressed on a US keyboard for a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Stroke {
    /// The keysym of the character (not of the unshifted key), as an RFB client sends it.
    pub keysym: u32,
    /// Whether Shift is held meanwhile.
    pub shift: bool,
}

/// How a character is typed on a US keyboard: printable ASCII, newline (Enter) and tab; `None` for all others.
#[must_use]
pub fn us_stroke(character: char) -> Option<Stroke> {
    let (keysym, shift) = match character {
        '\n' => (0xff0d, false),
        '\t' => (0xff09, false),
        'A'..='Z' => (u32::from(character), true),
        ' '..='~' => (u32::from(character), "~!@#$%^&*()_+{}|:\"<>?".contains(character)),
        _ => return None,
    };
    Some(Stroke { keysym, shift })
}

/// A piece of a boot command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootToken {
    /// Text to type. Templates in it are written one way: `{{ .Name }}`, with the inner blanks.
    Text(String),
    /// Presses and releases a key.
    Press(u32),
    /// Holds a key down.
    Hold(u32),
    /// Releases a key.
    Release(u32),
    /// Waits.
    Wait(Duration),
}

/// What is wrong with a piece of a boot command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BootMistakeKind {
    /// `<…>` is no token.
    UnknownToken,
    /// `{{ … }}` is no variable.
    UnknownVariable,
    /// A key is held and never released.
    UnclosedHold,
    /// A key is released that is not held.
    NotHeld,
    /// A character that a US keyboard does not have.
    Untypable,
}

/// A mistake in a boot command, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootMistake {
    /// The index of the list element.
    pub element: usize,
    /// The bytes in the element.
    pub range: std::ops::Range<usize>,
    /// What kind of mistake.
    pub kind: BootMistakeKind,
    /// What stands there.
    pub found: String,
}

/// Reads a boot command: its pieces, and its mistakes. Each element is read on its own, but a hold may end in a later one.
///
/// `<` opens a token where `>` follows a word (`<enter>`), or a character and `On` or `Off` (`<aOn>`, `<<On>`); any other
/// `<` is typed. So `["<", "b>"]` types what `["<b>"]` would take for a token.
pub fn parse_boot_command<'a>(
    elements: impl IntoIterator<Item = &'a str>,
) -> (Vec<BootToken>, Vec<BootMistake>) {
    let mut parser = Parser::default();
    for (index, element) in elements.into_iter().enumerate() {
        parser.element(index, element);
    }
    let Parser { tokens, mut mistakes, held, .. } = parser;
    mistakes.extend(held.into_iter().map(|(_, mistake)| mistake));
    mistakes.sort_by_key(|mistake| (mistake.element, mistake.range.start));
    (tokens, mistakes)
}

#[derive(Default)]
struct Parser {
    tokens: Vec<BootToken>,
    mistakes: Vec<BootMistake>,
    /// Keys that are held, each with the mistake that it is if nothing releases it.
    held: Vec<(u32, BootMistake)>,
    /// The element that is read.
    index: usize,
}

impl Parser {
    fn element(&mut self, index: usize, text: &str) {
        self.index = index;
        let mut at = 0;
        while let Some(character) = text[at..].chars().next() {
            let rest = &text[at..];
            let length = match character {
                '<' => self.token(at, rest),
                '{' => self.template(at, rest),
                _ => None,
            };
            at += length.unwrap_or_else(|| self.typed(at, character));
        }
    }

    fn typed(&mut self, at: usize, character: char) -> usize {
        let length = character.len_utf8();
        if us_stroke(character).is_none() {
            let found = character.escape_debug().to_string();
            self.mistake(at..at + length, BootMistakeKind::Untypable, found);
        }
        self.push_text(character.encode_utf8(&mut [0; 4]));
        length
    }

    /// Reads `<…>` at the start of `rest`; its length, or `None` when the `<` is a literal.
    fn token(&mut self, at: usize, rest: &str) -> Option<usize> {
        if let Some((character, down, length)) = character_hold(rest) {
            let keysym = match us_stroke(character) {
                Some(stroke) => stroke.keysym,
                None => {
                    let found = character.escape_debug().to_string();
                    self.mistake(at..at + length, BootMistakeKind::Untypable, found);
                    return Some(length);
                }
            };
            self.hold(at..at + length, &rest[..length], keysym, down);
            return Some(length);
        }
        let body = &rest[1..1 + rest[1..].find('>')?];
        let length = body.len() + 2;
        let is_word = !body.is_empty() && body.chars().all(|c| c.is_alphanumeric() || c == '.');
        let is_wait = body.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("wait"));
        let opens = is_word || is_wait && !body.contains('<');
        if !opens {
            return None;
        }
        let range = at..at + length;
        if is_wait {
            match wait(&body[4..]) {
                Some(duration) => self.tokens.push(BootToken::Wait(duration)),
                None => self.mistake(range, BootMistakeKind::UnknownToken, rest[..length].to_owned()),
            }
        } else if let Some(keysym) = named_key(body) {
            self.tokens.push(BootToken::Press(keysym));
        } else if let Some((keysym, down)) = named_hold(body) {
            self.hold(range, &rest[..length], keysym, down);
        } else {
            self.mistake(range, BootMistakeKind::UnknownToken, rest[..length].to_owned());
        }
        Some(length)
    }

    /// Reads `{{…}}` at the start of `rest`; its length, or `None` when the brace is a literal.
    fn template(&mut self, at: usize, rest: &str) -> Option<usize> {
        let body = rest.strip_prefix("{{")?;
        let body = &body[..body.find("}}")?];
        let length = body.len() + 4;
        let variable = body.trim().strip_prefix('.').filter(|name| BOOT_VARIABLES.contains(name));
        match variable {
            Some(name) => self.push_text(&format!("{{{{ .{name} }}}}")),
            None => {
                self.mistake(at..at + length, BootMistakeKind::UnknownVariable, rest[..length].to_owned());
            }
        }
        Some(length)
    }

    fn hold(&mut self, range: std::ops::Range<usize>, found: &str, keysym: u32, down: bool) {
        let position = self.held.iter().position(|(held, _)| *held == keysym);
        let mistake = |kind| BootMistake { element: self.index, range, kind, found: found.to_owned() };
        match (down, position) {
            (true, None) => self.held.push((keysym, mistake(BootMistakeKind::UnclosedHold))),
            (true, Some(_)) => {}
            (false, Some(position)) => {
                self.held.remove(position);
            }
            (false, None) => {
                let mistake = mistake(BootMistakeKind::NotHeld);
                self.mistakes.push(mistake);
            }
        }
        self.tokens.push(if down { BootToken::Hold(keysym) } else { BootToken::Release(keysym) });
    }

    fn push_text(&mut self, piece: &str) {
        if let Some(BootToken::Text(text)) = self.tokens.last_mut() {
            text.push_str(piece);
        } else {
            self.tokens.push(BootToken::Text(piece.to_owned()));
        }
    }

    fn mistake(&mut self, range: std::ops::Range<usize>, kind: BootMistakeKind, found: String) {
        self.mistakes.push(BootMistake { element: self.index, range, kind, found });
    }
}

/// `<` one character, `On` or `Off`, `>`: the character, whether it goes down, the length of it all.
fn character_hold(rest: &str) -> Option<(char, bool, usize)> {
    let mut characters = rest[1..].chars();
    let character = characters.next()?;
    let tail = characters.as_str();
    for (suffix, down) in [("On>", true), ("Off>", false)] {
        if tail.get(..suffix.len()).is_some_and(|start| start.eq_ignore_ascii_case(suffix)) {
            return Some((character, down, 1 + character.len_utf8() + suffix.len()));
        }
    }
    None
}

/// A key's name, then `On` or `Off`.
fn named_hold(body: &str) -> Option<(u32, bool)> {
    [("on", true), ("off", false)].into_iter().find_map(|(suffix, down)| {
        let split = body.len().checked_sub(suffix.len())?;
        let end = body.get(split..)?;
        end.eq_ignore_ascii_case(suffix).then(|| Some((named_key(&body[..split])?, down)))?
    })
}

/// What follows `wait` in a token: nothing (1 s), seconds, or a duration.
fn wait(text: &str) -> Option<Duration> {
    match text {
        "" => Some(Duration::from_secs(1)),
        _ if text.bytes().all(|c| c.is_ascii_digit()) => parse_duration(&format!("{text}s")).ok(),
        _ => parse_duration(text).ok(),
    }
}

/// The known token nearest to `found` (with its angle brackets), if one is near.
#[must_use]
pub fn nearest_token(found: &str) -> Option<String> {
    let body = found.trim_start_matches('<').trim_end_matches('>').to_ascii_lowercase();
    let suffixes: &[&str] = if body.ends_with("on") {
        &["", "On"]
    } else if body.ends_with("off") {
        &["", "Off"]
    } else {
        &[""]
    };
    let names = NAMED.iter().map(|(name, _)| *name).chain(["wait"]);
    names
        .flat_map(|name| suffixes.iter().map(move |suffix| format!("{name}{suffix}")))
        .map(|name| (strsim::damerau_levenshtein(&body, &name.to_ascii_lowercase()), name))
        .filter(|(distance, name)| *distance * 3 <= name.len().max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| format!("<{name}>"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn tokens(text: &str) -> Vec<BootToken> {
        let (tokens, mistakes) = parse_boot_command([text]);
        assert_eq!(mistakes, [], "{text}");
        tokens
    }

    fn mistakes(elements: &[&str]) -> Vec<(usize, usize, BootMistakeKind)> {
        let (_, mistakes) = parse_boot_command(elements.iter().copied());
        mistakes.into_iter().map(|m| (m.element, m.range.start, m.kind)).collect()
    }

    fn text(text: &str) -> BootToken {
        BootToken::Text(text.into())
    }

    #[test]
    fn every_named_key_is_known_in_any_case_and_can_be_held() {
        for (name, keysym) in NAMED {
            assert_eq!(tokens(&format!("<{}>", name.to_uppercase())), [BootToken::Press(*keysym)]);
            assert_eq!(
                tokens(&format!("<{name}On><{name}OFF>")),
                [BootToken::Hold(*keysym), BootToken::Release(*keysym)]
            );
        }
    }

    #[test]
    fn waits_are_seconds_or_durations() {
        let wait = |millis| BootToken::Wait(Duration::from_millis(millis));
        assert_eq!(
            tokens("<wait><wait5><wait10s><wait1m30s><WAIT500ms><wait1.5s>"),
            [wait(1000), wait(5000), wait(10_000), wait(90_000), wait(500), wait(1500)]
        );
        for bad in ["<wait5x>", "<wait 5>", "<waiting>", "<wait99999999999h>", "<waitText 'a b'>"] {
            assert_eq!(mistakes(&[bad]), [(0, 0, BootMistakeKind::UnknownToken)], "{bad}");
        }
    }

    #[test]
    fn a_bracket_that_opens_nothing_is_typed() {
        for literal in
            ["a < b", "<", "<>", "< enter>", "a<b", "<a b>", "x <<- 'y'", "<a-b>", "{ {", "{{", "{{ .X }"]
        {
            assert_eq!(tokens(literal), [text(literal)], "{literal}");
        }
        assert_eq!(tokens("<<enter>"), [text("<"), BootToken::Press(0xff0d)]);
        assert_eq!(parse_boot_command(["<", "b>"]), (vec![text("<b>")], vec![]));
    }

    #[test]
    fn any_one_character_can_be_held() {
        for (written, keysym) in [("a", 0x61), ("A", 0x41), ("<", 0x3c), (">", 0x3e), (" ", 0x20)] {
            assert_eq!(
                tokens(&format!("<{written}On>-<{written}Off>")),
                [BootToken::Hold(keysym), text("-"), BootToken::Release(keysym)]
            );
        }
    }

    #[test]
    fn templates_are_known_with_or_without_blanks() {
        assert_eq!(
            tokens("http://{{.HTTPIP}}:{{ .HTTPPort }}/{{  .Name}}"),
            [text("http://{{ .HTTPIP }}:{{ .HTTPPort }}/{{ .Name }}")]
        );
        assert_eq!(mistakes(&["x{{ .Foo }}"]), [(0, 1, BootMistakeKind::UnknownVariable)]);
        assert_eq!(mistakes(&["{{HTTPIP}}"]), [(0, 0, BootMistakeKind::UnknownVariable)]);
    }

    #[test]
    fn holds_end_in_a_later_element_or_are_mistakes() {
        assert_eq!(mistakes(&["<leftAltOn>", "<f2><leftAltOff>"]), []);
        assert_eq!(mistakes(&["ab<leftCtrlOn>c"]), [(0, 2, BootMistakeKind::UnclosedHold)]);
        assert_eq!(mistakes(&["a", "<aOff>"]), [(1, 0, BootMistakeKind::NotHeld)]);
        assert_eq!(mistakes(&["é"]), [(0, 0, BootMistakeKind::Untypable)]);
    }

    #[test]
    fn a_near_token_is_suggested() {
        assert_eq!(nearest_token("<entr>").as_deref(), Some("<enter>"));
        assert_eq!(nearest_token("<leftControlOn>").as_deref(), Some("<leftCtrlOn>"));
        assert_eq!(nearest_token("<body>"), None);
    }

    #[test]
    fn the_us_keyboard_has_every_printable_ascii_character() {
        for character in ' '..='~' {
            assert_eq!(us_stroke(character).unwrap().keysym, u32::from(character));
        }
        assert!(us_stroke('A').unwrap().shift && us_stroke('?').unwrap().shift);
        assert!(!us_stroke('a').unwrap().shift && !us_stroke('/').unwrap().shift);
        assert_eq!(us_stroke('\u{7f}'), None);
    }

    proptest! {
        #[test]
        fn nothing_panics_and_mistakes_lie_inside_their_element(
            elements in proptest::collection::vec("[<>{}.a-zOnf0-9é ]{0,20}", 0..4)
        ) {
            let (_, mistakes) = parse_boot_command(elements.iter().map(String::as_str));
            for mistake in mistakes {
                prop_assert!(elements[mistake.element].get(mistake.range).is_some());
            }
        }
    }
}
