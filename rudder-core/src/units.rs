//! Scalars with a grammar of their own: quantities, durations, names, hardware addresses, networks.

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::{fmt, net::Ipv4Addr, str::FromStr, time::Duration};

/// An error for a scalar that does not follow its grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, but found {found:?}")]
pub struct ParseError {
    /// The grammar, with an example.
    pub expected: &'static str,
    /// The text found instead.
    pub found: String,
}

fn unexpected<T>(expected: &'static str, found: &str) -> Result<T, ParseError> {
    Err(ParseError { expected, found: found.chars().take(80).collect() })
}

/// A quantity as in Kubernetes (`25Gi`, `500M`, `1.5`, `100m`, `2e3`), stored exactly in thousandths.
///
/// Grammar: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>. Suffixes smaller than
/// `m` are of no use for cores and bytes and are refused, as are negative values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity {
    milli: u128,
}

impl Quantity {
    /// Creates a quantity from a whole number.
    #[must_use]
    pub fn from_u64(value: u64) -> Self {
        Self { milli: u128::from(value) * 1000 }
    }

    /// Rounds up to a whole number, saturating.
    #[must_use]
    pub fn ceil(self) -> u64 {
        u64::try_from(self.milli.div_ceil(1000)).unwrap_or(u64::MAX)
    }

    /// Returns the exact value in thousandths.
    #[must_use]
    pub fn milli(self) -> u128 {
        self.milli
    }
}

impl FromStr for Quantity {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const EXPECTED: &str = "a quantity such as 25Gi, 500M, 1.5 or 100m";
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.len() > 30 {
            return unexpected(EXPECTED, text);
        }
        // Exact multiplier and divisor.
        let (times, per): (u128, u128) = match suffix {
            "" => (1, 1),
            "m" => (1, 1000),
            "k" => (1000, 1),
            "M" => (1000u128.pow(2), 1),
            "G" => (1000u128.pow(3), 1),
            "T" => (1000u128.pow(4), 1),
            "P" => (1000u128.pow(5), 1),
            "E" => (1000u128.pow(6), 1),
            "Ki" => (1 << 10, 1),
            "Mi" => (1 << 20, 1),
            "Gi" => (1 << 30, 1),
            "Ti" => (1 << 40, 1),
            "Pi" => (1 << 50, 1),
            "Ei" => (1 << 60, 1),
            exponent => {
                let digits = exponent.strip_prefix(['e', 'E']).filter(|digits| digits.len() <= 3);
                match digits.and_then(|digits| digits.parse::<i32>().ok()) {
                    Some(power @ 0..=18) => (10u128.pow(power.unsigned_abs()), 1),
                    Some(power @ -18..=-1) => (1, 10u128.pow(power.unsigned_abs())),
                    _ => return unexpected(EXPECTED, text),
                }
            }
        };
        let parse = || {
            let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            let digits: u128 = if whole.is_empty() { "0" } else { whole }.parse().ok()?;
            let part: u128 = if fraction.is_empty() { "0" } else { fraction }.parse().ok()?;
            let value =
                digits.checked_mul(scale)?.checked_add(part)?.checked_mul(times)?.checked_mul(1000)?;
            let milli = value.div_ceil(scale.checked_mul(per)?);
            (milli <= u128::from(u64::MAX) * 1000).then_some(Self { milli })
        };
        parse().map_or_else(|| unexpected(EXPECTED, text), Ok)
    }
}

/// Formats bytes for people: `25Gi`, `1.5Gi`, `1000`. The result is exact or rounded to two decimal places.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    for (shift, suffix) in [(40u32, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
        let unit = 1u64 << shift;
        if bytes >= unit {
            if bytes.is_multiple_of(unit) {
                return format!("{}{suffix}", bytes / unit);
            }
            #[allow(clippy::cast_precision_loss)]
            return format!("{:.2}{suffix}", bytes as f64 / unit as f64);
        }
    }
    bytes.to_string()
}

/// Parses a duration as in Go (`30m`, `1h30m`, `90s`, `500ms`, `1.5h`, `0`).
///
/// Grammar: <https://pkg.go.dev/time#ParseDuration>. Negative durations are refused.
///
/// # Errors
/// When the text does not follow the grammar, or the duration is longer than 290 years.
pub fn parse_duration(text: &str) -> Result<Duration, ParseError> {
    const EXPECTED: &str = "a duration such as 30m, 1h30m, 90s or 500ms";
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return unexpected(EXPECTED, text),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') || number.len() > 30 {
            return unexpected(EXPECTED, text);
        }
        let add = || {
            let fraction = &fraction[..fraction.len().min(15)];
            let whole: u128 = if whole.is_empty() { "0" } else { whole }.parse().ok()?;
            let part: u128 = if fraction.is_empty() { "0" } else { fraction }.parse().ok()?;
            let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
            nanos.checked_add(whole.checked_mul(unit)?)?.checked_add(part.checked_mul(unit)? / scale)
        };
        match add() {
            Some(sum) if sum <= i64::MAX as u128 => nanos = sum,
            _ => return unexpected(EXPECTED, text),
        }
        rest = tail;
    }
    if text.is_empty() {
        return unexpected(EXPECTED, text);
    }
    Ok(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

/// Formats a duration for people, as [`parse_duration`] parses it: `1h30m`, `5m`, `90ms`. Fractions of a millisecond
/// are dropped.
#[must_use]
pub fn human_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    let parts = [(millis / 3_600_000, "h"), (millis / 60_000 % 60, "m"), (millis / 1000 % 60, "s")];
    let mut text: String =
        parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    if !millis.is_multiple_of(1000) {
        text.push_str(&format!("{}ms", millis % 1000));
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// Whether this is a Name: `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, at most 63 characters (RFC 1123 label).
#[must_use]
pub fn is_name(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// A unicast hardware address (EUI-48).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Creates an address from its six bytes.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Returns the six bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const EXPECTED: &str = "a unicast hardware address such as 52:54:00:12:34:56";
        let mut bytes = [0u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            match parts.next() {
                Some(part) if part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()) => {
                    *byte = u8::from_str_radix(part, 16).unwrap_or_default();
                }
                _ => return unexpected(EXPECTED, text),
            }
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return unexpected(EXPECTED, text);
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IPv4 network in CIDR notation (RFC 4632), without host bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr(Ipv4Net);

impl Cidr {
    /// Returns the network address.
    #[must_use]
    pub fn network(self) -> Ipv4Addr {
        self.0.network()
    }

    /// Returns the broadcast address.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        self.0.broadcast()
    }

    /// Returns the address of the gateway, which is the first host of the network.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        u32::from(self.network()).saturating_add(1).into()
    }

    /// Returns the prefix length, 0–32.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether the address is in the network.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        self.0.contains(&address)
    }

    /// Whether two networks share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.0.contains(&other.0) || other.0.contains(&self.0)
    }
}

impl FromStr for Cidr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const EXPECTED: &str = "an IPv4 network without host bits such as 10.1.0.0/24";
        let network = text.parse().ok().filter(|network: &Ipv4Net| network.trunc() == *network);
        network.map_or_else(|| unexpected(EXPECTED, text), |network| Ok(Self(network)))
    }
}

impl TryFrom<String> for Cidr {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_follow_the_grammar_of_kubernetes() {
        let milli = |text: &str| text.parse::<Quantity>().map(Quantity::milli);
        assert_eq!(milli("25Gi"), Ok(25 * 1024 * 1024 * 1024 * 1000));
        assert_eq!(milli("1.5"), Ok(1500));
        assert_eq!(milli("100m"), Ok(100));
        assert_eq!(milli("2e3"), Ok(2_000_000));
        assert_eq!(milli("1.5Gi"), Ok(1_610_612_736_000));
        assert_eq!(milli(".5"), Ok(500));
        for invalid in ["", "Gi", "1.2.3", "-1", "1 Gi", "5gi", "1e99", "99999999999999999999E", "0x1"] {
            assert!(invalid.parse::<Quantity>().is_err(), "{invalid}");
        }
        assert_eq!("1.2".parse::<Quantity>().map(Quantity::ceil), Ok(2));
    }

    #[test]
    fn durations_follow_the_grammar_of_go() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        for invalid in ["", "5", "5 m", "-1m", "1d", "m", "1h1", "9999999999h"] {
            assert!(parse_duration(invalid).is_err(), "{invalid}");
        }
    }

    #[test]
    fn human_durations_can_be_parsed() {
        for text in ["1h30m", "5m", "90ms", "1m30s", "1s500ms", "0s", "26h"] {
            assert_eq!(parse_duration(text).map(human_duration).as_deref(), Ok(text));
        }
    }

    #[test]
    fn a_network_contains_its_addresses() {
        let cidr: Cidr = "10.1.2.0/23".parse().expect("a network");
        assert_eq!(cidr.gateway(), Ipv4Addr::new(10, 1, 2, 1));
        assert_eq!(cidr.broadcast(), Ipv4Addr::new(10, 1, 3, 255));
        assert!(cidr.contains(Ipv4Addr::new(10, 1, 3, 7)) && !cidr.contains(Ipv4Addr::new(10, 1, 4, 0)));
        assert!(cidr.overlaps("10.0.0.0/8".parse().expect("a network")));
        assert_eq!("0.0.0.0/0".parse::<Cidr>().map(Cidr::prefix), Ok(0));
        for invalid in ["10.0.0.1/8", "10.0.0.0", "10.0.0.0/33", "::/0", "a/8", "10.0.0.0/+8", "10.0.0.0/ 8"]
        {
            assert!(invalid.parse::<Cidr>().is_err(), "{invalid}");
        }
    }

    #[test]
    fn names_and_hardware_addresses_are_validated() {
        assert!(is_name("a") && is_name("web-1") && is_name(&"a".repeat(63)));
        for invalid in ["", "-a", "a-", "A", "a_b", "é", &"a".repeat(64)] {
            assert!(!is_name(invalid), "{invalid}");
        }
        assert_eq!(
            "52-54-00-AB-cd-0f".parse::<MacAddress>().map(|m| m.to_string()),
            Ok("52:54:00:ab:cd:0f".into())
        );
        for invalid in [
            "01:00:5e:00:00:01",
            "52:54:00:12:34",
            "52:54:00:12:34:5g",
            "00:00:00:00:00:00",
            "+1:00:00:00:00:01",
        ] {
            assert!(invalid.parse::<MacAddress>().is_err(), "{invalid}");
        }
    }
}
