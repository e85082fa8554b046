//! DNS (RFC 1035): forward and reverse lookups of the machines of a VPC. All other queries are left to outside servers.

use std::{collections::BTreeMap, net::Ipv4Addr};

/// Addresses by machine name.
pub(crate) type Names = BTreeMap<String, Vec<Ipv4Addr>>;

/// Time to live of an answer in seconds: a machine keeps its address for as long as the lab lives.
const TTL: u32 = 60;
const HEADER: usize = 12;
const CLASS_IN: u16 = 1;

const A: u16 = 1;
const PTR: u16 = 12;
const ANY: u16 = 255;

const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;

/// How a query is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With this answer.
    Local(Vec<u8>),
    /// By a server outside, which alone may know.
    Forward,
}

/// A query with one question.
#[derive(Debug, PartialEq, Eq)]
struct Question {
    /// Its name in lower case, without the final dot.
    name: String,
    kind: u16,
    class: u16,
    /// Offset in the message where the question ends.
    end: usize,
}

impl Question {
    fn parse(query: &[u8]) -> Option<Self> {
        // A standard query, with one question.
        if query.get(2)? & 0xf8 != 0 || query.get(4..6)? != [0, 1] {
            return None;
        }
        let (mut at, mut name) = (HEADER, String::new());
        loop {
            let length = usize::from(*query.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            // Compression pointers are not allowed: there is nothing before the first name to point at.
            let label = query.get(at..at + length).filter(|_| length < 64 && name.len() < 255)?;
            at += length;
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        }
        let word = |at: usize| Some(u16::from_be_bytes(*query.get(at..)?.first_chunk()?));
        Some(Self { name, kind: word(at)?, class: word(at + 2)?, end: at + 4 })
    }
}

/// Answers a query about the machines of a VPC, whose names end with this domain or with nothing; `None` if it is malformed.
pub(crate) fn answer(names: &Names, domain: &str, query: &[u8]) -> Option<Answer> {
    let question = Question::parse(query)?;
    let own_name = question.name.strip_suffix(domain).and_then(|name| name.strip_suffix('.'));
    let is_local = own_name.is_some() || question.name == domain || !question.name.contains('.');
    let reversed = question.name.strip_suffix(".in-addr.arpa").and_then(reverse);
    let owner = reversed.and_then(|address| names.iter().find(|(_, all)| all.contains(&address)));
    if question.class != CLASS_IN || !(is_local || owner.is_some()) {
        return Some(Answer::Forward);
    }
    let records: Vec<(u16, Vec<u8>)> = match (names.get(own_name.unwrap_or(&question.name)), owner) {
        (Some(addresses), _) if matches!(question.kind, A | ANY) => {
            addresses.iter().map(|address| (A, address.octets().to_vec())).collect()
        }
        (None, Some((name, _))) if matches!(question.kind, PTR | ANY) => {
            vec![(PTR, encode_name(&format!("{name}.{domain}")))]
        }
        (Some(_), _) | (None, Some(_)) => Vec::new(),
        // The domain itself exists, but has no records.
        (None, None) if question.name == domain => Vec::new(),
        (None, None) => return Some(Answer::Local(reply(query, question.end, NO_SUCH_NAME, &[]))),
    };
    Some(Answer::Local(reply(query, question.end, NO_ERROR, &records)))
}

/// Returns the address in a reverse lookup name: 10.0.0.5 for `5.0.0.10`.
fn reverse(name: &str) -> Option<Ipv4Addr> {
    let mut octets: Vec<u8> = name.split('.').map(|octet| octet.parse().ok()).collect::<Option<_>>()?;
    octets.reverse();
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?))
}

/// Encodes a name for a message. Labels are at most 63 bytes long, as names of machines are.
fn encode_name(name: &str) -> Vec<u8> {
    let labels = name.split('.').filter(|label| !label.is_empty());
    let mut bytes: Vec<u8> = labels
        .flat_map(|label| {
            let label = &label.as_bytes()[..label.len().min(63)];
            [&[u8::try_from(label.len()).unwrap_or_default()], label].concat()
        })
        .collect();
    bytes.push(0);
    bytes
}

fn reply(query: &[u8], end: usize, code: u8, records: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut reply = query[..end.min(query.len())].to_vec();
    // A response, authoritative, recursion as desired; recursion available.
    reply[2] = 0x84 | (query[2] & 1);
    reply[3] = 0x80 | code;
    reply[6..8].copy_from_slice(&u16::try_from(records.len()).unwrap_or_default().to_be_bytes());
    reply[8..HEADER].fill(0);
    for (kind, data) in records {
        // A pointer to the name in the question.
        reply.extend([0xc0, 12]);
        reply.extend(kind.to_be_bytes());
        reply.extend(CLASS_IN.to_be_bytes());
        reply.extend(TTL.to_be_bytes());
        reply.extend(u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
        reply.extend(data);
    }
    reply
}

/// Returns the answer if no server may be asked: the name does not exist.
pub(crate) fn no_such_name(query: &[u8]) -> Option<Vec<u8>> {
    Some(reply(query, Question::parse(query)?.end, NO_SUCH_NAME, &[]))
}

/// Returns the answer if no server outside could be reached.
pub(crate) fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    Some(reply(query, Question::parse(query)?.end, SERVER_FAILURE, &[]))
}

/// Returns an answer that fits into this many bytes: itself, or one that asks to retry over TCP (RFC 2181, 9).
pub(crate) fn fit(answer: Vec<u8>, limit: usize) -> Option<Vec<u8>> {
    if answer.len() <= limit {
        return Some(answer);
    }
    // A response differs from its query in one bit.
    let mut query = answer;
    *query.get_mut(2)? &= 0x7f;
    let end = Question::parse(&query)?.end;
    let mut truncated = reply(&query, end, query[3] & 0x0f, &[]);
    truncated[2] = truncated[2] & !0x04 | 0x02;
    Some(truncated)
}

#[cfg(test)]
mod tests;
