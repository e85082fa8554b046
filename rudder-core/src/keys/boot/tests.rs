//! The meaning of boot commands, and the mistakes in invalid ones.
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
    for bad in ["<wait5x>", "<wait 5>", "<waiting>", "<wait99999999999h>", "<waitTexts 'a b'>"] {
        assert_eq!(mistakes(&[bad]), [(0, 0, BootMistakeKind::UnknownToken)], "{bad}");
    }
}

#[test]
fn a_wait_names_text_on_the_screen_or_on_the_serial_console() {
    let on_screen =
        |text: &str, seconds| BootToken::WaitText { text: text.into(), limit: Duration::from_secs(seconds) };
    let on_serial = |text: &str, seconds| BootToken::WaitSerial {
        text: text.into(),
        limit: Duration::from_secs(seconds),
    };
    for (written, expected) in [
        ("<waitText 'login:'>", on_screen("login:", 60)),
        ("<WAITTEXT \"login:\">", on_screen("login:", 60)),
        ("<waitText 'a > b <enter>' 90s>", on_screen("a > b <enter>", 90)),
        ("<waitText 'it''s \"so\"'  1m30s >", on_screen("it's \"so\"", 90)),
        ("<waitText \"it's \"\"so\"\"\">", on_screen("it's \"so\"", 60)),
        ("<waitText ''''>", on_screen("'", 60)),
        ("<waitText'grüß dich' 5>", on_screen("grüß dich", 5)),
        ("<waitText '{{.Name}} {{ .HTTPIP }} {{'>", on_screen("{{ .Name }} {{ .HTTPIP }} {{", 60)),
        ("<waitSerial 'GRUB' 90s>", on_serial("GRUB", 90)),
    ] {
        assert_eq!(tokens(written), [expected], "{written}");
    }
    assert_eq!(
        tokens("a<waitText 'b'>c<enter>"),
        [text("a"), on_screen("b", 60), text("c"), BootToken::Press(0xff0d)]
    );
}

#[test]
fn an_invalid_wait_for_text_is_reported_with_its_range() {
    use BootMistakeKind as K;
    for (written, start, kind, found) in [
        ("x<waitText>", 1, K::MissingText, "<waitText>"),
        ("<waitText >", 0, K::MissingText, "<waitText >"),
        ("<waitText ''>", 10, K::MissingText, "''"),
        ("<waitText '' 5s>", 10, K::MissingText, "''"),
        ("<waitText login>y", 0, K::MissingText, "<waitText login>"),
        ("<waitSerial 90s>", 0, K::MissingText, "<waitSerial 90s>"),
        ("<waitText 'login>", 10, K::UnclosedText, "'login>"),
        ("<waitText 'it''s>", 10, K::UnclosedText, "'it''s>"),
        ("<waitText 'a'", 0, K::UnclosedText, "<waitText 'a'"),
        ("<waitText 'a' 5s", 0, K::UnclosedText, "<waitText 'a' 5s"),
        ("<waitText 'a' 90x>", 14, K::BadLimit, "90x"),
        ("<waitText 'a' 'b'>", 14, K::BadLimit, "'b'"),
        ("<waitText 'a' 0s>", 14, K::BadLimit, "0s"),
        ("<waitText 'a' 5 s >", 14, K::BadLimit, "5 s"),
        ("<waitText 'ö{{ .Foo }}'>", 13, K::UnknownVariable, "{{ .Foo }}"),
    ] {
        let (_, mistakes) = parse_boot_command([written]);
        let found = (start..start + found.len(), kind, found.to_owned());
        let reported: Vec<_> = mistakes.into_iter().map(|m| (m.range, m.kind, m.found)).collect();
        assert_eq!(reported, [found], "{written}");
    }
    // Parsing continues after a mistake.
    assert_eq!(mistakes(&["<waitText><entr>"]), [(0, 0, K::MissingText), (0, 10, K::UnknownToken)]);
}

#[test]
fn a_bracket_that_opens_no_token_is_typed() {
    for literal in
        ["a < b", "<", "<>", "< enter>", "a<b", "<a b>", "x <<- 'y'", "<a-b>", "{ {", "{{", "{{ .X }"]
    {
        assert_eq!(tokens(literal), [text(literal)], "{literal}");
    }
    assert_eq!(tokens("<<enter>"), [text("<"), BootToken::Press(0xff0d)]);
    assert_eq!(parse_boot_command(["<", "b>"]), (vec![text("<b>")], vec![]));
}

#[test]
fn any_single_character_can_be_held() {
    for (written, keysym) in [("a", 0x61), ("A", 0x41), ("<", 0x3c), (">", 0x3e), (" ", 0x20)] {
        assert_eq!(
            tokens(&format!("<{written}On>-<{written}Off>")),
            [BootToken::Hold(keysym), text("-"), BootToken::Release(keysym)]
        );
    }
}

#[test]
fn templates_may_contain_spaces() {
    assert_eq!(
        tokens("http://{{.HTTPIP}}:{{ .HTTPPort }}/{{  .Name}}"),
        [text("http://{{ .HTTPIP }}:{{ .HTTPPort }}/{{ .Name }}")]
    );
    assert_eq!(mistakes(&["x{{ .Foo }}"]), [(0, 1, BootMistakeKind::UnknownVariable)]);
    assert_eq!(mistakes(&["{{HTTPIP}}"]), [(0, 0, BootMistakeKind::UnknownVariable)]);
}

#[test]
fn a_hold_must_end_but_may_end_in_a_later_element() {
    assert_eq!(mistakes(&["<leftAltOn>", "<f2><leftAltOff>"]), []);
    assert_eq!(mistakes(&["ab<leftCtrlOn>c"]), [(0, 2, BootMistakeKind::UnclosedHold)]);
    assert_eq!(mistakes(&["a", "<aOff>"]), [(1, 0, BootMistakeKind::NotHeld)]);
    assert_eq!(mistakes(&["é"]), [(0, 0, BootMistakeKind::Untypable)]);
}

/// Each of these once took quadratic time; a test that hangs is noticed.
#[test]
fn unclosed_tokens_are_parsed_in_linear_time() {
    for (piece, tail) in [
        ("<", ""),
        ("{", ""),
        ("{{", ""),
        ("<a", ""),
        ("<wait", ""),
        ("<wait ", ""),
        ("<waitText '", ""),
        ("<waitText", ""),
        ("{{ ", "}"),
        ("<{{", ">"),
        ("<<", ">"),
        ("é", ""),
        ("<aOff>", ""),
        ("<leftShiftOn>", ""),
        ("<waitText '{{'>", ""),
        ("<waitText 'a' ", ""),
        ("''", ""),
        ("<x.", ""),
    ] {
        for head in ["", "<waitText '"] {
            let text = format!("{head}{}{tail}", piece.repeat((1 << 18) / piece.len()));
            let (tokens, mistakes) = parse_boot_command([text.as_str()]);
            assert!(mistakes.len() <= MAX_MISTAKES + 200, "{head}{piece}");
            assert!(mistakes.iter().all(|mistake| mistake.found.chars().count() <= MAX_FOUND + 1));
            assert!(!tokens.is_empty() || !mistakes.is_empty());
        }
    }
}

#[test]
fn a_similar_token_is_suggested() {
    assert_eq!(nearest_token("<entr>").as_deref(), Some("<enter>"));
    assert_eq!(nearest_token("<leftControlOn>").as_deref(), Some("<leftCtrlOn>"));
    assert_eq!(nearest_token("<body>"), None);
    assert_eq!(nearest_token("<waitTxt 'a b' 5s>").as_deref(), Some("<waitText 'TEXT'>"));
    assert_eq!(nearest_token("<waitSeriel 'a'>").as_deref(), Some("<waitSerial 'TEXT'>"));
    assert_eq!(nearest_token("<wait 5>"), None);
}

proptest! {
    #[test]
    fn no_input_panics_and_mistakes_lie_inside_their_element(
        elements in proptest::collection::vec("(<waitText |<waitSerial'|[<>{}.a-zOnf0-9é'\" ]){0,20}", 0..4)
    ) {
        let (_, mistakes) = parse_boot_command(elements.iter().map(String::as_str));
        for mistake in mistakes {
            prop_assert!(elements[mistake.element].get(mistake.range).is_some());
        }
    }
}
