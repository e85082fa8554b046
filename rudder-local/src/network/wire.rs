//! Ethernet (IEEE 802.3), ARP (RFC 826), IPv4 (RFC 791), UDP (RFC 768) and ICMP (RFC 792): what the switch and the router
//! read and write. Everything is read with bounds checks, because frames come from guests.

use std::net::Ipv4Addr;

/// A hardware address.
pub(crate) type Mac = [u8; 6];

pub(crate) const BROADCAST: Mac = [0xff; 6];
/// The largest IP packet on every segment, in bytes.
pub(crate) const MTU: usize = 1500;
/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// Length of the shortest Ethernet frame without its checksum.
const MIN_FRAME: usize = 60;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

fn ip_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    array::<4>(bytes, at).map(Ipv4Addr::from)
}

/// An Ethernet frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame<'a> {
    pub(crate) to: Mac,
    pub(crate) from: Mac,
    pub(crate) payload: Payload<'a>,
    pub(crate) bytes: &'a [u8],
}

/// The payload of a frame.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Payload<'a> {
    Ipv4(&'a [u8]),
    Arp(&'a [u8]),
    Other,
}

impl<'a> Frame<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (to, from, kind) = (array(bytes, 0)?, array(bytes, 6)?, u16_at(bytes, 12)?);
        let payload = match kind {
            0x0800 => Payload::Ipv4(&bytes[ETHERNET..]),
            0x0806 => Payload::Arp(&bytes[ETHERNET..]),
            _ => Payload::Other,
        };
        Some(Self { to, from, payload, bytes })
    }
}

/// Returns whether a hardware address is a group address.
pub(crate) fn is_group(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

/// Returns the Ethernet header of an IPv4 packet.
pub(crate) fn ipv4_header(to: Mac, from: Mac) -> [u8; ETHERNET] {
    let mut header = [0; ETHERNET];
    header[..6].copy_from_slice(&to);
    header[6..12].copy_from_slice(&from);
    header[12] = 0x08;
    header
}

/// An ARP packet for IPv4 over Ethernet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arp {
    pub(crate) request: bool,
    pub(crate) sender: (Mac, Ipv4Addr),
    pub(crate) target: (Mac, Ipv4Addr),
}

impl Arp {
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        if array(bytes, 0)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let request = match u16_at(bytes, 6)? {
            1 => true,
            2 => false,
            _ => return None,
        };
        let sender = (array(bytes, 8)?, ip_at(bytes, 14)?);
        Some(Self { request, sender, target: (array(bytes, 18)?, ip_at(bytes, 24)?) })
    }

    /// Returns the frame that carries it to this hardware address.
    pub(crate) fn frame(&self, to: Mac) -> Vec<u8> {
        let mut frame = Vec::with_capacity(MIN_FRAME);
        frame.extend(to);
        frame.extend(self.sender.0);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, if self.request { 1 } else { 2 }]);
        for (mac, ip) in [self.sender, self.target] {
            frame.extend(mac);
            frame.extend(ip.octets());
        }
        frame.resize(MIN_FRAME, 0);
        frame
    }
}

/// Adds up 16-bit words for the Internet checksum (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut words = bytes.chunks_exact(2);
    let mut sum =
        words.by_ref().fold(start, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
    if let [last] = words.remainder() {
        sum += u32::from(*last) << 8;
    }
    sum
}

fn checksum(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // At most 16 bits remain.
    (!u16::try_from(sum).unwrap_or_default()).to_be_bytes()
}

/// An IPv4 packet whose header is consistent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet<'a> {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    /// Whether it must not be fragmented.
    pub(crate) dont_fragment: bool,
    /// Whether it is a fragment.
    pub(crate) fragment: bool,
    /// Whether it is a fragment other than the first.
    later_fragment: bool,
    header: usize,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Packet<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let first = *bytes.first()?;
        let header = usize::from(first & 15) * 4;
        let total = usize::from(u16_at(bytes, 2)?);
        if first >> 4 != 4 || header < 20 || total < header || total > bytes.len() {
            return None;
        }
        if checksum(sum(&bytes[..header], 0)) != [0, 0] {
            return None;
        }
        let fragmentation = u16_at(bytes, 6)?;
        Some(Self {
            src: ip_at(bytes, 12)?,
            dst: ip_at(bytes, 16)?,
            protocol: bytes[9],
            ttl: bytes[8],
            dont_fragment: fragmentation & 0x4000 != 0,
            fragment: fragmentation & 0x3fff != 0,
            later_fragment: fragmentation & 0x1fff != 0,
            header,
            bytes: &bytes[..total],
        })
    }

    pub(crate) fn payload(&self) -> &'a [u8] {
        &self.bytes[self.header..]
    }

    /// Returns the ports of an unfragmented UDP datagram or TCP segment.
    pub(crate) fn ports(&self) -> Option<(u16, u16)> {
        if self.fragment || self.payload().len() < 8 {
            return None;
        }
        Some((u16_at(self.payload(), 0)?, u16_at(self.payload(), 2)?))
    }

    /// Returns the content of an unfragmented UDP datagram.
    pub(crate) fn datagram(&self) -> Option<&'a [u8]> {
        let length = usize::from(u16_at(self.payload(), 4)?);
        (!self.fragment).then(|| self.payload().get(8..length)).flatten()
    }

    /// Returns whether it is a TCP segment that opens a connection.
    pub(crate) fn is_syn(&self) -> bool {
        // Of FIN, SYN, RST and ACK, only SYN is set.
        self.payload().get(13).is_some_and(|flags| flags & 0x17 == 0x02)
    }

    /// Returns whether an ICMP error may be sent about it (RFC 1122, 3.2.2).
    fn allows_icmp_error(&self) -> bool {
        let is_error = self.protocol == ICMP && !matches!(self.payload().first(), Some(0 | 8 | 13 | 14));
        let is_one = |ip: Ipv4Addr| !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast());
        !is_error && !self.later_fragment && is_one(self.src) && !self.src.is_loopback() && is_one(self.dst)
    }

    /// Returns the same packet after one hop, with its TTL decremented.
    pub(crate) fn forwarded(&self) -> Vec<u8> {
        let mut bytes = self.bytes.to_vec();
        bytes[8] = self.ttl.saturating_sub(1);
        bytes[10..12].fill(0);
        let sum = checksum(sum(&bytes[..self.header], 0));
        bytes[10..12].copy_from_slice(&sum);
        bytes
    }

    /// Returns the answer to an ICMP echo request.
    pub(crate) fn echo_reply(&self) -> Option<Vec<u8>> {
        if self.protocol != ICMP
            || self.fragment
            || !self.payload().starts_with(&[8, 0])
            || self.payload().len() < 8
        {
            return None;
        }
        let mut message = self.payload().to_vec();
        message[0] = 0;
        Some(icmp((self.dst, self.src), message))
    }
}

/// Why a packet goes no further, as ICMP reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    NoRoute,
    HostUnreachable,
    ProtocolUnreachable,
    PortUnreachable,
    Prohibited,
    TimeExceeded,
    TooBig,
}

impl Refusal {
    /// Returns the ICMP message about this packet, from a router with this address.
    pub(crate) fn icmp_message(self, packet: &Packet<'_>, router: Ipv4Addr) -> Option<Vec<u8>> {
        if !packet.allows_icmp_error() {
            return None;
        }
        let (kind, code) = match self {
            Self::NoRoute => (3, 0),
            Self::HostUnreachable => (3, 1),
            Self::ProtocolUnreachable => (3, 2),
            Self::PortUnreachable => (3, 3),
            Self::TooBig => (3, 4),
            Self::Prohibited => (3, 13),
            Self::TimeExceeded => (11, 0),
        };
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        if self == Self::TooBig {
            // RFC 1191.
            message[6..8].copy_from_slice(&u16::try_from(MTU).unwrap_or(u16::MAX).to_be_bytes());
        }
        message.extend(packet.bytes.iter().take(packet.header + 8));
        Some(icmp((router, packet.src), message))
    }
}

fn icmp((src, dst): (Ipv4Addr, Ipv4Addr), mut message: Vec<u8>) -> Vec<u8> {
    message[2..4].fill(0);
    let sum = checksum(sum(&message, 0));
    message[2..4].copy_from_slice(&sum);
    ipv4((src, dst), ICMP, &[&message])
}

/// Returns an IPv4 packet with this content, of at most 65,515 bytes.
fn ipv4((src, dst): (Ipv4Addr, Ipv4Addr), protocol: u8, content: &[&[u8]]) -> Vec<u8> {
    let length = 20 + content.iter().map(|piece| piece.len()).sum::<usize>();
    let mut packet = Vec::with_capacity(length);
    packet.extend([0x45, 0]);
    packet.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
    // The identification matters only for packets that may be fragmented (RFC 6864).
    packet.extend(if length > MTU { rand::random() } else { [0, 0] });
    packet.extend([if length > MTU { 0 } else { 0x40 }, 0, 64, protocol, 0, 0]);
    packet.extend(src.octets());
    packet.extend(dst.octets());
    let sum = checksum(sum(&packet, 0));
    packet[10..12].copy_from_slice(&sum);
    content.iter().for_each(|piece| packet.extend_from_slice(piece));
    packet
}

/// Returns a UDP datagram. Content that does not fit into a packet is truncated.
pub(crate) fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), content: &[u8]) -> Vec<u8> {
    let content = &content[..content.len().min(65_507)];
    let length = u16::try_from(8 + content.len()).unwrap_or(u16::MAX);
    let mut header = [0; 8];
    header[0..2].copy_from_slice(&src.1.to_be_bytes());
    header[2..4].copy_from_slice(&dst.1.to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let pseudo = sum(&dst.0.octets(), sum(&src.0.octets(), u32::from(UDP) + u32::from(length)));
    let found = checksum(sum(content, sum(&header, pseudo)));
    // Zero would mean that there is no checksum.
    header[6..8].copy_from_slice(&if found == [0, 0] { [0xff; 2] } else { found });
    ipv4((src.0, dst.0), UDP, &[&header, content])
}

/// Splits a packet that may be fragmented into packets of at most [`MTU`] bytes.
pub(crate) fn fragments(bytes: Vec<u8>) -> Vec<Vec<u8>> {
    let Some(packet) = Packet::parse(&bytes).filter(|packet| packet.bytes.len() > MTU) else {
        return vec![bytes];
    };
    let header = &bytes[..packet.header];
    let (offset, more) = (u16_at(&bytes, 6).unwrap_or_default() & 0x1fff, bytes[6] & 0x20 != 0);
    let each = (MTU - header.len()) / 8 * 8;
    let pieces = packet.payload().chunks(each);
    let last = pieces.len().saturating_sub(1);
    let fragments = pieces.enumerate().map(|(number, piece)| {
        let mut fragment = header.to_vec();
        let length = u16::try_from(header.len() + piece.len()).unwrap_or(u16::MAX);
        fragment[2..4].copy_from_slice(&length.to_be_bytes());
        let fragment_offset = offset + u16::try_from(number * each / 8).unwrap_or(u16::MAX);
        let flags = if more || number < last { 0x2000 } else { 0 };
        fragment[6..8].copy_from_slice(&(fragment_offset & 0x1fff | flags).to_be_bytes());
        fragment[10..12].fill(0);
        let sum = checksum(sum(&fragment, 0));
        fragment[10..12].copy_from_slice(&sum);
        fragment.extend_from_slice(piece);
        fragment
    });
    fragments.collect()
}

/// Returns a packet with this content, for tests and fuzzing.
pub(crate) fn packet(ends: (Ipv4Addr, Ipv4Addr), protocol: u8, content: &[u8]) -> Vec<u8> {
    ipv4(ends, protocol, &[content])
}
