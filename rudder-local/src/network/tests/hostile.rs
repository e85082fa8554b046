//! Malicious guests: arbitrary bytes, floods, scans, silence. Nothing panics, memory is bounded, and neighbours keep working.

use super::*;
use crate::network::{
    fuzz,
    wire::{Arp, BROADCAST, ipv4_header, packet, udp},
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        fuzz::frames(&bytes);
        fuzz::packet(&bytes);
        fuzz::ip(&bytes);
        fuzz::dhcp(&bytes);
        fuzz::dns(&bytes);
        runtime.block_on(tokio::task::yield_now());
    }

    /// Headers that are valid except for a few bytes reach deeper than noise does.
    #[test]
    fn nearly_valid_packets_do_no_harm(
        kind in any::<u8>(),
        content in proptest::collection::vec(any::<u8>(), 0..200),
        flips in proptest::collection::vec((0..300_usize, any::<u8>()), 0..4),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _guard = runtime.enter();
        let mut message = [&[kind][..], &content].concat();
        fuzz::packet(&message);
        let mut bytes = packet(([10, 0, 2, 15].into(), [10, 0, 2, 1].into()), 17, &content);
        let mut dhcp = vec![0; 240];
        dhcp[..4].copy_from_slice(&[1, 1, 6, 0]);
        dhcp[236..].copy_from_slice(&[99, 130, 83, 99]);
        dhcp.extend(&content);
        for bytes in [&mut bytes, &mut message, &mut dhcp] {
            for (at, byte) in &flips {
                if let Some(found) = bytes.get_mut(*at) {
                    *found = *byte;
                }
            }
        }
        fuzz::ip(&bytes);
        fuzz::packet(&message);
        fuzz::dhcp(&dhcp);
        fuzz::dns(&[&[1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &content].concat());
    }

    /// Fragments carry the whole packet.
    #[test]
    fn fragments_reassemble_to_the_packet(length in 1473..20_000_usize) {
        let content: Vec<u8> = (0..length).map(|index| u8::try_from(index % 251).unwrap()).collect();
        let whole = udp(([10, 0, 2, 1].into(), 1), ([10, 0, 2, 15].into(), 2), &content);
        let mut joined = Vec::new();
        let pieces = wire::fragments(whole.clone());
        let count = pieces.len();
        for (number, piece) in pieces.iter().enumerate() {
            let packet = wire::Packet::parse(piece).unwrap();
            prop_assert!(piece.len() <= wire::MTU && packet.fragment);
            let offset = usize::from(u16::from_be_bytes([piece[6], piece[7]]) & 0x1fff) * 8;
            prop_assert_eq!(offset, joined.len());
            prop_assert_eq!(piece[6] & 0x20 != 0, number + 1 < count);
            joined.extend_from_slice(packet.payload());
        }
        prop_assert!(joined == whole[20..]);
    }
}

#[tokio::test]
async fn the_state_that_a_guest_can_cause_is_bounded() {
    let network = network(&two_vpcs());
    let mut web = join(&network, "web", &nic("web", 1, None));
    let mut other = join(&network, "other", &nic("web", 2, None));
    let gateway = web.gateway_mac().await;
    other.gateway_mac().await;
    let from = (web.ip(), 1000_u16);
    for number in 0..3000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        // Hardware addresses, IP addresses, hosts that do not exist, connections.
        let mac = [2, 1, 0, 0, high, low];
        let address = Ipv4Addr::new(10, 0, 2, 20 + low % 200);
        web.send(
            &Arp { request: true, sender: (mac, address), target: ([0; 6], web.gateway) }.frame(BROADCAST),
        )
        .await;
        let scanned = Ipv4Addr::new(10, 0, 3, 20 + low % 200);
        let mut syn = vec![0; 20];
        syn[..4].copy_from_slice(&[high, low, 0, 53]);
        syn[12..14].copy_from_slice(&[0x50, 0x02]);
        for bytes in [udp(from, (scanned, 9), b"x"), packet((web.ip(), web.gateway), 6, &syn)] {
            web.send(&[&ipv4_header(gateway, web.mac)[..], &bytes].concat()).await;
        }
        // Replies arrive; a guest that does not read them would block.
        while tokio::time::timeout(Duration::ZERO, web.frame()).await.is_ok() {}
    }
    web.frames_before_a_ping().await;
    let (flows, nics) = {
        let inner = network.vpcs[0].lock();
        let nics = inner.segments[0].nics.len();
        (inner.segments[0].nics[0].flows, nics)
    };
    assert!((1..=256).contains(&flows), "{flows}");
    assert_eq!(nics, 2);
    let size = network.vpcs[0].lock().segments.iter().map(Segment::state_size).max();
    assert!(size.is_some_and(|size| size < 1000), "{size:?}");
    // The neighbour is still served.
    other.frames_before_a_ping().await;
}

#[tokio::test]
async fn a_guest_that_does_not_read_delays_its_neighbours_only_briefly() {
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, None));
    // It never reads.
    let stalled = join(&network, "deaf", &nic("default", 2, None));
    web.gateway_mac().await;
    let frame = [&ipv4_header(stalled.mac, web.mac)[..], &[0; 1500]].concat();
    // More than its queue holds.
    for _ in 0..6000 {
        web.send(&frame).await;
    }
    web.frames_before_a_ping().await;
    let queued = network.vpcs[0].lock().segments[0].nics[1].port.queued();
    assert!(queued <= 4 << 20, "{queued}");
    drop(stalled);
}

#[tokio::test]
async fn an_oversized_frame_disconnects_only_its_sender() {
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, None));
    let mut other = join(&network, "other", &nic("default", 2, None));
    other.gateway_mac().await;
    web.send(&vec![0; 70 << 10]).await;
    assert!(tokio::time::timeout(PATIENCE, web.ended()).await.is_ok());
    other.frames_before_a_ping().await;
}
