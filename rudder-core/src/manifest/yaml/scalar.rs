//! The meaning of scalars: the core schema of YAML 1.2 (<https://yaml.org/spec/1.2.2/#103-core-schema>), interpreted as
//! in serde_yaml 0.9, so that what it writes is read back unchanged.

/// The value of a scalar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value {
    /// `null`, `~` or an empty scalar.
    Null,
    Bool(bool),
    Int(i64),
    /// An integer above `i64::MAX`.
    Unsigned(u64),
    Float(f64),
    /// The text of the node itself.
    Text,
    /// A plain `<<`: a merge key if it is a key, text elsewhere.
    Merge,
}

/// Interprets a plain scalar. A number that does not fit a 64-bit integer stays text, so that it does not lose digits.
pub(crate) fn resolve(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        "<<" => return Value::Merge,
        _ => {}
    }
    // Most scalars are words: a number can only begin with one of these characters.
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return Value::Text;
    }
    integer(text).or_else(|| float(text)).unwrap_or(Value::Text)
}

fn integer(text: &str) -> Option<Value> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let (radix, digits) = match digits.get(..2) {
        Some("0x") => (16, &digits[2..]),
        Some("0o") => (8, &digits[2..]),
        Some("0b") => (2, &digits[2..]),
        _ if digits.len() > 1 && digits.starts_with('0') => return None,
        _ => (10, digits),
    };
    // `from_str_radix` would accept another sign.
    if !digits.starts_with(|c: char| c.is_ascii_hexdigit()) {
        return None;
    }
    let value = i128::from_str_radix(digits, radix).ok()?;
    let value = if negative { -value } else { value };
    i64::try_from(value).map(Value::Int).or_else(|_| u64::try_from(value).map(Value::Unsigned)).ok()
}

fn float(text: &str) -> Option<Value> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
    match unsigned {
        ".inf" | ".Inf" | ".INF" => return Some(Value::Float(sign * f64::INFINITY)),
        ".nan" | ".NaN" | ".NAN" if unsigned == text => return Some(Value::Float(f64::NAN)),
        _ => {}
    }
    // `007` and integers that are too long are text, and so are words like `inf`, which Rust would parse.
    let is_number =
        unsigned.bytes().all(|c| c.is_ascii_digit() || matches!(c, b'.' | b'e' | b'E' | b'+' | b'-'));
    let has_point = unsigned.bytes().any(|c| !c.is_ascii_digit());
    let zeros = unsigned.len() > 1 && unsigned.starts_with('0') && unsigned.as_bytes()[1].is_ascii_digit();
    if !is_number
        || !has_point
        || unsigned.starts_with(['+', '-'])
        || zeros && !unsigned.contains(['.', 'e', 'E'])
    {
        return None;
    }
    unsigned.parse::<f64>().ok().filter(|value| value.is_finite()).map(|value| Value::Float(sign * value))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The result is that of serde_yaml for everything that people and programs write without quotes.
    #[test]
    fn plain_scalars_mean_what_serde_yaml_says() {
        for text in [
            "~",
            "null",
            "Null",
            "NULL",
            "nUll",
            "true",
            "True",
            "TRUE",
            "false",
            "yes",
            "no",
            "on",
            "off",
            "y",
            "n",
            "0",
            "-0",
            "+0",
            "1",
            "-1",
            "+1",
            "+-1",
            "007",
            "-007",
            "0x1F",
            "-0x1F",
            "0xg",
            "0x",
            "0o17",
            "-0o17",
            "0o8",
            "0b101",
            "0b2",
            "0x+1",
            "1_000",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "-9223372036854775808",
            "1.5",
            "-1.5",
            "+1.5",
            ".5",
            "5.",
            "1e3",
            "1E3",
            "1e+3",
            "1.e3",
            "1e",
            "e1",
            "+",
            ".",
            "..",
            "-.",
            ".inf",
            "-.inf",
            "+.inf",
            ".Inf",
            ".INF",
            "inf",
            "infinity",
            "nan",
            "NaN",
            "-.nan",
            "1e400",
            "0.1",
            "00.1",
            "0e1",
            "1.2.3",
            "1:30",
            "2001-01-01",
            "12e03",
            "25Gi",
            "1.5Gi",
            "52:54:00:12:34:56",
            "10.0.0.1",
            "0x",
            "-0x",
            "+0x1F",
            "1-2",
            "1+2",
        ] {
            let theirs: serde_yaml::Value = serde_yaml::from_str(text).unwrap();
            let ours = match resolve(text) {
                Value::Null => serde_yaml::Value::Null,
                Value::Bool(value) => value.into(),
                Value::Int(value) => value.into(),
                Value::Unsigned(value) => value.into(),
                Value::Float(value) => value.into(),
                Value::Text | Value::Merge => text.into(),
            };
            assert_eq!(ours, theirs, "{text}");
        }
        assert!(matches!(resolve(".nan"), Value::Float(value) if value.is_nan()));
    }

    #[test]
    fn a_number_too_long_for_64_bits_keeps_its_digits() {
        for text in ["18446744073709551616", "-9223372036854775809", "0xffffffffffffffffff", &"9".repeat(60)]
        {
            assert_eq!(resolve(text), Value::Text, "{text}");
        }
    }
}
