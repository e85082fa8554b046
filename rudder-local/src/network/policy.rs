//! The policy for connections of guests to the outside: any address except those of this host and those meant for hosts only.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
};

/// An address that is never a host's own (RFC 5737).
const UNASSIGNED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Cloud services outside the link-local range that reveal secrets of the host to anything that asks from it.
const METADATA: [Ipv4Addr; 2] = [
    // Alibaba Cloud.
    Ipv4Addr::new(100, 100, 100, 200),
    // Azure's "wire server".
    Ipv4Addr::new(168, 63, 129, 16),
];

/// Returns whether a guest may connect to this address. Check it for every connection: addresses of the host change.
pub(crate) fn is_outside(address: Ipv4Addr) -> bool {
    is_public_or_private(address) && !is_of_this_host(address)
}

/// Returns whether it can be the address of another host at all.
fn is_public_or_private(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = match a {
        // "This network", loopback, multicast, reserved and broadcast (RFC 6890).
        0 | 127 | 224.. => true,
        // Link-local, where metadata services are.
        169 => b == 254,
        // Protocol assignments (RFC 6890); Oracle's metadata service is among them.
        192 => (b, c) == (0, 0),
        _ => false,
    };
    !special && !METADATA.contains(&address)
}

/// Returns whether the kernel treats it as one of its own addresses, or as the broadcast address of one of its networks: only to
/// those can a socket be bound (ip(7)).
fn is_of_this_host(address: Ipv4Addr) -> bool {
    // Any other error says nothing about the address, which is then treated as the host's own.
    let binds = |address| {
        UdpSocket::bind((address, 0))
            .err()
            .is_none_or(|error| error.kind() != io::ErrorKind::AddrNotAvailable)
    };
    // With ip_nonlocal_bind, every address can be bound to, so the routing table decides.
    binds(address) && (!binds(UNASSIGNED) || is_in_local_table(address))
}

/// Returns whether the table of local routes contains it. If it cannot be read, everything is treated as local.
fn is_in_local_table(address: Ipv4Addr) -> bool {
    std::fs::read_to_string("/proc/net/fib_trie").map_or(true, |table| has_local(&table, address))
}

/// Searches `/proc/net/fib_trie`: a leaf `|-- 10.0.0.5` is followed by a line for each of its prefixes, such as `/32 host LOCAL`.
fn has_local(table: &str, address: Ipv4Addr) -> bool {
    let mut leaf = None;
    table.lines().any(|line| {
        let line = line.trim_start();
        if let Some(found) = line.strip_prefix("|-- ") {
            leaf = found.trim().parse::<Ipv4Addr>().ok();
            return false;
        }
        let mut fields = line.split_whitespace();
        let prefix = fields.next().and_then(|word| word.strip_prefix('/')?.parse::<u32>().ok());
        let (Some(leaf), Some(prefix @ 0..=32)) = (leaf, prefix) else { return false };
        let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
        matches!(fields.last(), Some("LOCAL" | "BROADCAST"))
            && (u32::from(leaf) ^ u32::from(address)) & mask == 0
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn special_addresses_are_not_outside() {
        for inside in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "169.254.0.1",
            "224.0.0.251",
            "239.1.2.3",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.0.192",
            "100.100.100.200",
            "168.63.129.16",
        ] {
            assert!(!is_outside(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["198.51.100.7", "203.0.113.9"] {
            assert!(is_outside(outside.parse().unwrap()), "{outside}");
        }
    }

    #[test]
    fn addresses_of_this_host_are_not_outside() {
        // The address that this host would send from.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("198.51.100.7:9").is_ok() {
            let std::net::IpAddr::V4(own) = socket.local_addr().unwrap().ip() else { panic!("IPv4") };
            assert!(!is_outside(own), "{own}");
            assert!(is_in_local_table(own), "{own}");
        }
        assert!(is_of_this_host(Ipv4Addr::LOCALHOST) && is_in_local_table(Ipv4Addr::new(127, 1, 2, 3)));
        assert!(!is_in_local_table(Ipv4Addr::new(198, 51, 100, 7)));
    }

    #[test]
    fn the_table_of_local_routes_is_read() {
        let table = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\nLocal:\n  \
                     +-- 0.0.0.0/0 3 0 5\n     |-- 127.0.0.0\n        /8 host LOCAL\n     |-- 10.1.0.5\n        \
                     /32 host LOCAL\n     |-- 10.1.0.255\n        /32 link BROADCAST\n";
        for (address, local) in [
            ("127.9.9.9", true),
            ("10.1.0.5", true),
            ("10.1.0.255", true),
            ("10.1.0.6", false),
            ("8.8.8.8", false),
        ] {
            assert_eq!(has_local(table, address.parse().unwrap()), local, "{address}");
        }
    }
}
