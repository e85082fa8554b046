#![allow(clippy::unwrap_used)]
use super::*;

fn names() -> Names {
    Names::from([
        ("web".to_owned(), vec![Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 3, 2)]),
        ("db".to_owned(), vec![Ipv4Addr::new(10, 0, 2, 16)]),
    ])
}

pub(super) fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(encode_name(name));
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    query
}

/// Returns the code and the records of the answer to a question; `None` if it is left to outside servers.
fn ask(name: &str, kind: u16) -> Option<(u8, Vec<Vec<u8>>)> {
    let query = query(name, kind);
    let Answer::Local(reply) = answer(&names(), "lab.internal", &query).unwrap() else { return None };
    assert_eq!((&reply[..2], reply[2] & 0x80), (&query[..2], 0x80));
    let mut rest = &reply[query.len()..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let length = usize::from(u16::from_be_bytes([rest[10], rest[11]]));
        records.push(rest[12..12 + length].to_vec());
        rest = &rest[12 + length..];
    }
    assert_eq!(usize::from(u16::from_be_bytes([reply[6], reply[7]])), records.len());
    Some((reply[3] & 15, records))
}

#[test]
fn machines_are_found_by_short_name_full_name_and_address() {
    let web = vec![vec![10, 0, 2, 15], vec![10, 0, 3, 2]];
    for name in ["web", "WEB", "web.lab.internal", "Web.LAB.Internal"] {
        assert_eq!(ask(name, A), Some((0, web.clone())), "{name}");
    }
    assert_eq!(ask("15.2.0.10.in-addr.arpa", PTR), Some((0, vec![encode_name("web.lab.internal")])));
    // A machine has no IPv6 address, but it exists.
    assert_eq!(ask("db", 28), Some((0, vec![])));
    assert_eq!(ask("lab.internal", A), Some((0, vec![])));
}

#[test]
fn unknown_names_in_the_domain_do_not_exist() {
    for name in ["unknown", "unknown.lab.internal", "a.web.lab.internal"] {
        assert_eq!(ask(name, A), Some((NO_SUCH_NAME, vec![])), "{name}");
    }
}

#[test]
fn other_names_are_forwarded() {
    for (name, kind) in [
        ("deb.debian.org", A),
        ("web.other.internal", A),
        ("1.1.1.1.in-addr.arpa", PTR),
        ("xlab.internal", A),
    ] {
        assert_eq!(ask(name, kind), None, "{name}");
    }
}

#[test]
fn malformed_queries_are_not_answered() {
    let good = query("web", A);
    for length in 0..good.len() {
        assert_eq!(answer(&names(), "lab.internal", &good[..length]), None, "{length}");
    }
    for (at, byte) in [(2, 0x81), (2, 0x28), (5, 2), (12, 0xc0)] {
        let mut bad = good.clone();
        bad[at] = byte;
        assert_eq!(answer(&names(), "lab.internal", &bad), None, "{at}");
    }
}

#[test]
fn an_answer_that_is_too_long_is_marked_as_truncated() {
    let query = query("big.example.org", A);
    let mut long = query.clone();
    long[2] |= 0x80;
    long.extend(vec![0; 3000]);
    let cut = fit(long.clone(), 1472).unwrap();
    assert_eq!((cut.len(), cut[2] & 0x82), (query.len(), 0x82));
    assert_eq!(fit(long.clone(), 5000), Some(long));
}
