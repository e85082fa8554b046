//! The positions of keys on a US keyboard: scan codes of the PC/XT (set 1), as in QEMU's extended key events. A code
//! that is preceded by 0xe0 on the wire has its highest bit set instead.

/// The rows of a US keyboard from the left: the characters of the keys without and with Shift, and the code of the
/// first key.
const ROWS: [(&str, &str, u8); 5] = [
    ("1234567890-=", "!@#$%^&*()_+", 0x02),
    ("qwertyuiop[]", "QWERTYUIOP{}", 0x10),
    ("asdfghjkl;'`", "ASDFGHJKL:\"~", 0x1e),
    ("\\zxcvbnm,./", "|ZXCVBNM<>?", 0x2b),
    (" ", " ", 0x39),
];

/// Returns the code of the key for this keysym on a US keyboard.
pub(super) fn of_keysym(keysym: u32) -> Option<u8> {
    if let Ok(character @ 0x20..=0x7e) = u8::try_from(keysym) {
        let character = char::from(character);
        return ROWS.iter().find_map(|(plain, shifted, first)| {
            let at = plain.find(character).or_else(|| shifted.find(character))?;
            Some(first + u8::try_from(at).ok()?)
        });
    }
    Some(match keysym {
        0xff1b => 0x01,
        0xff08 => 0x0e,
        0xff09 => 0x0f,
        0xff0d => 0x1c,
        0xffe3 => 0x1d,
        0xffe1 => 0x2a,
        0xffe2 => 0x36,
        0xffe9 => 0x38,
        0xffe5 => 0x3a,
        // F1 to F10, F11 and F12.
        0xffbe..=0xffc7 => 0x3b + u8::try_from(keysym - 0xffbe).ok()?,
        0xffc8 => 0x57,
        0xffc9 => 0x58,
        0xff7f => 0x45,
        0xff14 => 0x46,
        0xffe4 => 0x9d,
        0xffea => 0xb8,
        0xff50 => 0xc7,
        0xff52 => 0xc8,
        0xff55 => 0xc9,
        0xff51 => 0xcb,
        0xff53 => 0xcd,
        0xff57 => 0xcf,
        0xff54 => 0xd0,
        0xff56 => 0xd1,
        0xff63 => 0xd2,
        0xffff => 0xd3,
        0xffeb => 0xdb,
        0xffec => 0xdc,
        0xff67 => 0xdd,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{named_key, us_stroke};

    #[test]
    fn every_key_of_a_us_keyboard_has_a_scancode() {
        // From the table of scan codes in the PC/XT technical reference.
        let known = [
            ('1', 0x02),
            ('=', 0x0d),
            ('q', 0x10),
            ('P', 0x19),
            ('{', 0x1a),
            ('a', 0x1e),
            (';', 0x27),
            ('"', 0x28),
            ('~', 0x29),
            ('|', 0x2b),
            ('z', 0x2c),
            ('/', 0x35),
            (' ', 0x39),
        ];
        for (character, code) in known {
            assert_eq!(of_keysym(u32::from(character)), Some(code), "{character:?}");
        }
        for character in (' '..='~').chain(['\n', '\t']) {
            let keysym = us_stroke(character).map(|stroke| stroke.keysym);
            assert!(keysym.and_then(of_keysym).is_some(), "{character:?}");
        }
        for name in
            ["enter", "f1", "f10", "f11", "f12", "leftSuper", "pageDown", "rightAlt", "menu", "delete"]
        {
            assert!(named_key(name).and_then(of_keysym).is_some(), "{name}");
        }
        assert_eq!(named_key("f10").and_then(of_keysym), Some(0x44));
        assert_eq!(of_keysym(0xe4), None);
    }

    #[test]
    fn no_two_keys_share_a_scancode() {
        let mut codes: Vec<_> = (0x20..0x1_0000)
            .filter(|keysym| !(0x41..=0x5a).contains(keysym))
            .filter(|&keysym| char::from_u32(keysym).is_none_or(|c| !"~!@#$%^&*()_+{}|:\"<>?".contains(c)))
            .filter_map(of_keysym)
            .collect();
        let all = codes.len();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), all);
    }
}
