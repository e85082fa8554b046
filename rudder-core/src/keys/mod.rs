//! Keys: X11 keysyms, the US keyboard, and in `boot` the grammar of boot commands.
//!
//! Keysyms are those of `X11/keysymdef.h`, as sent over RFB (RFC 6143, 7.5.4).

mod boot;
mod wait;

pub use boot::{BOOT_VARIABLES, BootMistake, BootMistakeKind, BootToken, nearest_token, parse_boot_command};
pub use wait::DEFAULT_WAIT_LIMIT;

/// The keysym of the left Shift key.
pub const SHIFT_LEFT: u32 = 0xffe1;

/// Keys that have a name in boot commands. Names are case-insensitive.
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

/// Returns the keysym of a key by its case-insensitive name in boot commands: `enter`, `F1`, `leftCtrl`.
#[must_use]
pub fn named_key(name: &str) -> Option<u32> {
    NAMED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, keysym)| *keysym)
}

/// Returns the name of a key in boot commands, by its keysym; `None` for keys without one, such as characters.
#[must_use]
pub fn key_name(keysym: u32) -> Option<&'static str> {
    NAMED.iter().find(|(_, known)| *known == keysym).map(|(name, _)| *name)
}

/// The key to press on a US keyboard for a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Stroke {
    /// The keysym of the character (not of the unshifted key), as an RFB client sends it.
    pub keysym: u32,
    /// Whether Shift is held while the key is pressed.
    pub shift: bool,
}

/// Returns how a character is typed on a US keyboard: printable ASCII, newline (Enter) and tab; `None` for all others.
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_us_keyboard_has_every_printable_ascii_character() {
        for character in ' '..='~' {
            assert_eq!(us_stroke(character).unwrap().keysym, u32::from(character));
        }
        assert!(us_stroke('A').unwrap().shift && us_stroke('?').unwrap().shift);
        assert!(!us_stroke('a').unwrap().shift && !us_stroke('/').unwrap().shift);
        assert_eq!(us_stroke('\u{7f}'), None);
    }
}
