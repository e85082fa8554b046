//! Secrets in every form in which programs print them.
#![allow(clippy::unwrap_used)]

use super::*;
use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use proptest::prelude::*;

fn masker(secrets: &[&str]) -> Masker {
    Masker::new(&secrets.iter().map(|text| Secret::new(*text)).collect::<Vec<_>>())
}

/// Asserts that no four consecutive characters of the secret are left when the lines are joined.
fn assert_masked(masked: &str, secret: &str) {
    let joined: String = masked.split_whitespace().collect();
    let characters: Vec<char> = secret.chars().collect();
    for window in characters.windows(4) {
        let window: String = window.iter().collect();
        assert!(
            !joined.contains(&window) && !masked.contains(&window),
            "{window:?} of {secret:?} in {masked:?}"
        );
    }
}

#[test]
fn a_secret_is_masked_in_every_form() {
    let secret = "p@ss \"wörd'$\\";
    let masker = masker(&[secret]);
    let once = serde_json::to_string(secret).unwrap();
    let forms = [
        secret.to_owned(),
        format!("{secret:?}"),
        serde_json::to_string(&once).unwrap(),
        serde_json::to_string(&serde_json::to_string(&once).unwrap()).unwrap(),
        once,
        format!("'{}'", secret.replace('\'', r"'\''")),
        format!("'{}'", secret.replace('\'', "''")),
        r#"p@ss\ \"wörd\'\$\\"#.to_owned(),
        r#"p@ss \"w\u00f6rd'$\\"#.to_owned(),
        r#"p@ss \"w\303\266rd'$\\"#.to_owned(),
        r#"$'p@ss "w\xc3\xb6rd\'$\\'"#.to_owned(),
        "p%40ss+%22w%C3%B6rd%27%24%5C".to_owned(),
        "p@ss%20%22w%c3%b6rd'$%5c".to_owned(),
        "p%2540ss%2520%2522w%25C3%25B6rd'$%255C".to_owned(),
        "p@ss &quot;wörd&#39;$\\".to_owned(),
        "p@ss \\u0026quot;w&#xf6;rd'$\\\\".to_owned(),
        "704073732022 77c3b6726427245c".to_owned(),
        "70 40 73 73 20 22 77 C3 B6 72 64 27 24 5C".to_owned(),
        "0x70,0x40,0x73,0x73,0x20,0x22,0x77,0xc3,0xb6,0x72,0x64,0x27,0x24,0x5c".to_owned(),
        "70:40:73:73:20:22:77:c3:b6:72:64:27:24:5c".to_owned(),
        format!("{:?}", secret.as_bytes()),
    ];
    for form in forms {
        let masked = masker.mask(&form).into_owned();
        let rest: String = masked.replace(MASK, "");
        assert!(
            masked.contains(MASK)
                && rest
                    .trim_matches(['"', '\'', '\\', '$', '[', ']', '0', 'x', '%', '2', '5', 'c', 'C'])
                    .is_empty(),
            "{form} -> {masked}"
        );
    }
}

#[test]
fn a_secret_that_contains_colours_or_marks_is_masked() {
    let masker = masker(&["hunter2"]);
    for text in [
        "hun\x1b[31mter\x1b[0m2",
        "h\u{200b}u\u{ad}nter\u{feff}2",
        "\x1b[hunter2",
        "h\x08hu\x08unter2",
        "hun\x1b]0;title\x07ter2",
        "\x1b]0;hunter2\x07",
        "\x1b]52;c;aHVudGVyMg==\x07",
        "hun\u{9b}1mter2",
        "hun\0ter\r2",
        "hun\x1b(Bter2",
        "h\x1b[1Cunter2",
    ] {
        let masked = masker.mask(text);
        assert!(masked.contains(MASK), "{text:?} -> {masked:?}");
        assert!(
            !masker.mask(text).replace(|c: char| !c.is_ascii_alphanumeric(), "").contains("hunter2"),
            "{masked:?}"
        );
        assert_masked(&masked, "hunter2");
    }
}

/// Returns dumps in the layouts of `xxd`, `hexdump` and `od`.
fn dumps(bytes: &[u8]) -> Vec<String> {
    let text = |line: &[u8]| -> String {
        line.iter().map(|byte| if matches!(byte, 0x20..=0x7e) { char::from(*byte) } else { '.' }).collect()
    };
    let group = |line: &[u8], width: usize, upper: bool, reverse: bool| {
        let word = |word: &[u8]| {
            let mut word = word.to_vec();
            if reverse {
                word.resize(width, 0);
                word.reverse();
            }
            let hex = |byte: &u8| if upper { format!("{byte:02X}") } else { format!("{byte:02x}") };
            word.iter().map(hex).collect::<String>()
        };
        line.chunks(width).map(word).collect::<Vec<_>>().join(" ")
    };
    let lines = |row: &dyn Fn(usize, &[u8]) -> String| {
        bytes.chunks(16).enumerate().map(|(at, line)| row(at * 16, line)).collect::<Vec<_>>().join("\n")
    };
    let words = |line: &[u8], width: usize| -> Vec<u64> {
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        line.chunks(width).map(word).collect()
    };
    let canonical =
        |line: &[u8]| line.chunks(8).map(|half| group(half, 1, false, false)).collect::<Vec<_>>().join("  ");
    let character = |byte: &u8| match byte {
        b'\n' => "  \\n".to_owned(),
        b' '..=b'~' => format!("   {}", char::from(*byte)),
        byte => format!(" {byte:03o}"),
    };
    vec![
        lines(&|at, line| format!("{at:08x}: {:<39}  {}", group(line, 2, false, false), text(line))),
        lines(&|at, line| format!("{at:08x}: {:<39}  {}", group(line, 2, true, false), text(line))),
        lines(&|at, line| format!("{at:08x}: {:<47}  {}", group(line, 1, false, false), text(line))),
        lines(&|at, line| format!("{at:08x}  {:<48}  |{}|", canonical(line), text(line))),
        lines(&|at, line| format!("{at:07x} {}", group(line, 2, false, true))),
        lines(&|at, line| format!("{at:07o} {}", group(line, 1, false, false))),
        lines(&|at, line| format!("{at:07o} {}", group(line, 4, false, true))),
        lines(&|at, line| format!("{at:07o} {}", group(line, 8, false, true))),
        lines(&|_, line| format!(" {}", group(line, 4, false, true))),
        lines(&|at, line| format!("{at:07o} {}  >{}<", group(line, 1, false, false), text(line))),
        lines(&|at, line| {
            format!(
                "{at:07o} {}",
                line.iter().map(|byte| format!("{byte:03o}")).collect::<Vec<_>>().join(" ")
            )
        }),
        lines(&|at, line| {
            format!(
                "{at:07o} {}",
                words(line, 2).iter().map(|word| format!("{word:06o}")).collect::<Vec<_>>().join(" ")
            )
        }),
        lines(&|at, line| {
            format!(
                "{at:07o} {}",
                words(line, 1).iter().map(|word| format!("{word:3}")).collect::<Vec<_>>().join(" ")
            )
        }),
        lines(&|at, line| {
            format!(
                "{at:07o} {}",
                words(line, 2).iter().map(|word| format!("{word:5}")).collect::<Vec<_>>().join(" ")
            )
        }),
        lines(&|at, line| {
            format!(
                "{at:07o} {}",
                words(line, 4).iter().map(|word| format!("{word:10}")).collect::<Vec<_>>().join(" ")
            )
        }),
        lines(&|at, line| format!("{at:07o} {}", line.iter().map(character).collect::<String>())),
        lines(&|_, line| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        lines(&|_, line| line.iter().map(character).collect::<String>()),
    ]
}

/// Whether a masked dump still contains the secret as consecutive hexadecimal digits.
fn left(masked: &str, secret: &str) -> bool {
    let digits: String = masked.chars().filter(char::is_ascii_hexdigit).collect::<String>().to_lowercase();
    let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    digits.contains(&hex)
}

#[test]
fn secrets_in_dumps_of_any_layout_are_masked_across_lines() {
    let secret = "correct-Horse=battery/staple:7";
    let masker = masker(&[secret]);
    for before in 0..18 {
        let content = format!("{}{secret}.{}", "x".repeat(before), "y".repeat(9));
        for dump in dumps(content.as_bytes()) {
            let masked = masker.mask(&dump);
            assert!(masked.contains(MASK), "{dump}");
            assert!(!left(&masked, secret), "{masked}");
            assert_masked(&masked, secret);
            // Again, line by line.
            let lines = masker.mask_lines(dump.lines().map(str::to_owned).collect());
            assert_eq!(lines.len(), dump.lines().count());
            let joined = lines.join("\n");
            assert!(joined.contains(MASK) && !left(&joined, secret), "{joined}");
            assert_masked(&joined, secret);
        }
    }
}

#[test]
fn wrapped_secrets_are_masked_at_every_width_at_once_or_line_by_line() {
    let secret = "correct-Horse=battery/staple:7";
    let masker = masker(&[secret]);
    let forms = [
        secret.to_owned(),
        BASE64_STANDARD.encode(secret),
        secret.bytes().map(|byte| format!("{byte:02x}")).collect(),
    ];
    for form in forms {
        for width in 3..40 {
            let text: Vec<char> = format!("some text {form} and more").chars().collect();
            let lines: Vec<String> = text.chunks(width).map(|line| line.iter().collect()).collect();
            assert_masked(&masker.mask(&lines.join("\n")), &form);
            assert_masked(&masker.mask_lines(lines.clone()).join("\n"), &form);
            // Again as drawn by a terminal, with colours at both ends.
            let coloured: Vec<String> = lines.iter().map(|line| format!("\x1b[32m{line}\x1b[0m\r")).collect();
            assert_masked(&masker.mask(&coloured.join("\n")), &form);
        }
    }
}

#[test]
fn multi_line_overlapping_and_short_secrets_are_masked() {
    let key = "-----BEGIN-----\nabcdefgh\nijklmnop\n-----END-----\n";
    let masker = masker(&[key, "aba", "abX", "no"]);
    assert_eq!(masker.mask("  ijklmnop"), "  ***");
    assert_eq!(masker.mask("-abababX-"), "-***-");
    assert_eq!(masker.mask("no"), "no");
    assert_eq!(Masker::new(&[]).mask("x"), "x");
}

#[test]
fn short_secrets_do_not_mask_similar_text() {
    let masker = masker(&["test", "a", "", "  ", "\n\n", "fi\ndone\nset -e\n"]);
    for text in [
        "the tes artist",
        "la te st",
        "te st",
        "done",
        "set -e",
        "a b c",
        "fi",
        "12:01 2023",
        "",
        "t\u{e9}st",
    ] {
        assert_eq!(masker.mask(text), text);
    }
}

#[test]
fn only_a_line_that_may_begin_a_secret_is_held_back() {
    let masker = masker(&["hunter2"]);
    let mut output = Vec::new();
    let mut pieces = masker.pieces();
    for line in ["one", "two hun", "ter2 three", "go hunt", "", "hu", "end hunte"] {
        pieces.push(line, false, &mut |line| output.push(line.to_owned()));
        if line == "two hun" {
            assert_eq!(output, ["one"]);
            output.push("|".to_owned());
        }
    }
    pieces.finish(&mut |line| output.push(line.to_owned()));
    assert_eq!(output, ["one", "|", "two ***", "*** three", "go hunt", "", "hu", "end hunte"]);
}

#[test]
fn a_large_secret_is_masked_in_a_large_text() {
    let lines: Vec<String> =
        (0..4000u32).map(|n| format!("line-{n}-{}", n.wrapping_mul(2_654_435_761))).collect();
    let masker = masker(&[&lines.join("\n")]);
    let text = lines.join(" and\n").repeat(4);
    let masked = masker.mask(&text);
    assert!(!masked.contains("line-"));
    // A text that nearly matches at each position.
    let text = "line-".repeat(200_000);
    assert_eq!(masker.mask(&text), text);
}

#[test]
fn utf16_in_base64_as_powershell_accepts_it_is_masked() {
    let script: Vec<u8> = "$p = 'hunter2'".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let masked = masker(&["hunter2"]).mask(&BASE64_STANDARD.encode(&script)).into_owned();
    assert!(masked.contains(MASK) && masked.len() < 24, "{masked}");
}

proptest! {
    #[test]
    fn no_form_of_a_secret_leaks(secret in "[!-~äß🚀 ]{4,40}", before in "[a-z ]{0,9}", after in "[a-z ]{0,9}", cut in 0usize..60) {
        prop_assume!(secret.trim().len() >= 4 && !secret.contains("***"));
        let secret = secret.trim();
        prop_assume!(!before.contains(secret) && !after.contains(secret));
        let masker = masker(&[secret]);
        let text = format!("{before}{secret}{after}");
        prop_assert!(!masker.mask(&text).contains(secret));
        let json = serde_json::to_string(&text).unwrap();
        let escaped = serde_json::to_string(secret).unwrap();
        prop_assert!(!masker.mask(&json).contains(escaped.trim_matches('"')));
        for encoded in [BASE64_STANDARD_NO_PAD.encode(&text), BASE64_URL_SAFE_NO_PAD.encode(&text)] {
            let masked = masker.mask(&encoded);
            prop_assert!(masked.contains(MASK), "{encoded} {masked}");
            // The rest decodes to nothing of the secret but at most two bytes at each end.
            prop_assert!(masked.len() <= MASK.len() + (before.len() + after.len()) * 4 / 3 + 4);
        }
        // Again, cut in two anywhere.
        let cut = text.floor_char_boundary(cut.min(text.len()));
        let mut pieces = masker.pieces();
        let mut joined = String::new();
        pieces.push(&text[..cut], true, &mut |piece| joined.push_str(piece));
        pieces.push(&text[cut..], false, &mut |piece| joined.push_str(piece));
        pieces.finish(&mut |piece| joined.push_str(piece));
        prop_assert_eq!(joined, masker.mask(&text).into_owned());
    }

    #[test]
    fn masking_keeps_the_number_of_lines_and_never_panics(
        secrets in prop::collection::vec("[a-c\\\\%'\"&;0-9x\n ]{0,12}", 0..4),
        lines in prop::collection::vec("[a-c\\\\%'\"&;0-9x\u{1b}\\[m\u{8}|ä ]{0,40}", 0..8),
        noise in any::<String>(),
    ) {
        let secrets: Vec<&str> = secrets.iter().map(String::as_str).collect();
        let masker = masker(&secrets);
        let count = lines.len();
        drop(masker.mask(&noise));
        drop(masker.mask(&lines.join("\n")));
        prop_assert_eq!(masker.mask_lines(lines).len(), count);
    }

    #[test]
    fn pieces_of_a_long_line_are_complete(text in "[a-z]{0,2000}", cuts in prop::collection::vec(0usize..2000, 0..5)) {
        let masker = masker(&["hunter2", "abc"]);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
        cuts.sort_unstable();
        let mut pieces = masker.pieces();
        let mut joined = String::new();
        for pair in cuts.windows(2) {
            pieces.push(&text[pair[0]..pair[1]], pair[1] != text.len(), &mut |piece| joined.push_str(piece));
        }
        pieces.finish(&mut |piece| joined.push_str(piece));
        prop_assert_eq!(joined, masker.mask(&text).into_owned());
    }
}
