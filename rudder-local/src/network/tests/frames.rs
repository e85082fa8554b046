//! ARP, ping, DHCP, DNS, ICMP errors and switching, frame by frame.

use super::*;
use crate::network::wire::{Arp, BROADCAST, Frame, Packet, Payload, ipv4_header, packet, udp};
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, Icmpv4Packet};

fn echo(length: usize) -> Vec<u8> {
    let mut message = Icmpv4Packet::new_unchecked(vec![0; 8 + length]);
    message.set_msg_type(smoltcp::wire::Icmpv4Message::EchoRequest);
    message.fill_checksum();
    message.into_inner()
}

/// Returns the type and code of an ICMP message in a packet, which must be for this guest.
fn icmp(guest: &Guest, bytes: &[u8]) -> (u8, u8) {
    let packet = Packet::parse(bytes).unwrap();
    assert_eq!((packet.protocol, packet.dst), (1, guest.ip()));
    (packet.payload()[0], packet.payload()[1])
}

#[tokio::test]
async fn the_gateway_answers_arp_and_ping() {
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, None));
    assert_eq!(web.ip(), Ipv4Addr::new(10, 0, 2, 15));
    let ping = packet((web.ip(), web.gateway), 1, &echo(56));
    web.send_packet(&ping).await;
    let reply = web.packet().await;
    assert_eq!(icmp(&web, &reply), (0, 0));
    assert!(Icmpv4Packet::new_checked(&reply[20..]).unwrap().verify_checksum());
    assert_eq!(reply.len(), ping.len());
}

#[tokio::test]
async fn guests_reach_only_the_guests_of_their_vpc() {
    let network = network(&two_vpcs());
    let mut web = join(&network, "web", &nic("web", 1, None));
    let mut other = join(&network, "other", &nic("web", 2, None));
    let mut db = join(&network, "db", &nic("db", 3, None));
    let mut attacker = join(&network, "attacker", &nic("same", 1, None));
    // The same address in another VPC.
    assert_eq!(web.ip(), attacker.ip());
    for guest in [&mut web, &mut other, &mut db, &mut attacker] {
        guest.gateway_mac().await;
    }
    // Over the switch, unmodified.
    let direct =
        [&ipv4_header(other.mac, web.mac)[..], &packet((web.ip(), other.ip()), 1, &echo(8))].concat();
    web.send(&direct).await;
    loop {
        let frame = other.frame().await;
        if frame[12..14] == [8, 0] {
            assert_eq!(frame, direct);
            break;
        }
    }
    // Over the router, with a decremented TTL.
    web.send_packet(&packet((web.ip(), db.ip()), 1, &echo(8))).await;
    let arrived = db.packet().await;
    let arrived = Packet::parse(&arrived).unwrap();
    assert_eq!((arrived.src, arrived.dst, arrived.ttl), (web.ip(), db.ip(), 63));
    // Neither reached the other VPC.
    assert_eq!(attacker.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
}

#[tokio::test]
async fn icmp_reports_why_a_packet_was_refused() {
    let mut plan = two_vpcs();
    plan.vpcs[1].internet = true;
    let network = network(&plan);
    let mut web = join(&network, "web", &nic("web", 1, None));
    join(&network, "db", &nic("db", 2, None));
    let mut online = join(&network, "online", &nic("same", 3, None));
    let outside = Ipv4Addr::new(198, 51, 100, 7);
    let from = (web.ip(), 1000);
    let with_ttl = |mut bytes: Vec<u8>, ttl: u8| {
        let packet = Packet::parse(&bytes).unwrap();
        let hops = packet.ttl - ttl;
        for _ in 0..hops {
            bytes = Packet::parse(&bytes).unwrap().forwarded();
        }
        bytes
    };
    let big = packet((web.ip(), Ipv4Addr::new(10, 0, 3, 15)), 17, &[0; 1480]);
    let mut big = [big, vec![0; 100]].concat();
    big[2..4].copy_from_slice(&1600_u16.to_be_bytes());
    big = with_ttl_fixed(big);
    let cases = [
        ("no internet", udp(from, (outside, 9), b"x"), (3, 0)),
        ("an unmanaged subnet", udp(from, (Ipv4Addr::new(10, 0, 9, 2), 9), b"x"), (3, 0)),
        ("a broadcast address", udp(from, (Ipv4Addr::new(10, 0, 3, 255), 9), b"x"), (3, 13)),
        ("the gateway's port", udp(from, (web.gateway, 9), b"x"), (3, 3)),
        ("an unknown protocol", packet((web.ip(), web.gateway), 99, &[0; 8]), (3, 2)),
        ("the last hop", with_ttl(udp(from, (Ipv4Addr::new(10, 0, 3, 15), 9), b"x"), 1), (11, 0)),
        ("too big", big, (3, 4)),
        ("an unused address", udp(from, (Ipv4Addr::new(10, 0, 3, 99), 9), b"x"), (3, 1)),
    ];
    for (what, sent, expected) in cases {
        web.send_packet(&sent).await;
        let reply = web.packet().await;
        assert_eq!(icmp(&web, &reply), expected, "{what}");
        // The message quotes the packet; its TTL and checksum may be those after a hop.
        let about = &reply[28..];
        assert_eq!((&about[..8], &about[12..]), (&sent[..8], &sent[12..about.len()]), "{what}");
    }
    for inside in ["169.254.169.254", "10.0.3.4", "224.0.0.1"] {
        online.send_packet(&udp((online.ip(), 1000), (inside.parse().unwrap(), 80), b"x")).await;
        if inside == "224.0.0.1" {
            assert_eq!(online.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
        } else {
            let reply = online.packet().await;
            assert_eq!(icmp(&online, &reply), (3, 13), "{inside}");
        }
    }
}

/// Corrects the checksum of a header.
fn with_ttl_fixed(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut header = smoltcp::wire::Ipv4Packet::new_unchecked(&mut bytes);
    header.fill_checksum();
    bytes
}

fn discover(mac: [u8; 6], kind: DhcpMessageType, wanted: Option<Ipv4Addr>) -> Vec<u8> {
    let request = DhcpRepr {
        message_type: kind,
        transaction_id: 7,
        secs: 0,
        client_hardware_address: EthernetAddress(mac),
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: wanted,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
    let packet = udp((Ipv4Addr::UNSPECIFIED, 68), (Ipv4Addr::BROADCAST, 67), &bytes);
    [&ipv4_header(BROADCAST, mac)[..], &packet].concat()
}

/// Returns the kind of an answer, the address in it, and its options 3, 6 and 15.
async fn offered(guest: &mut Guest) -> (DhcpMessageType, Ipv4Addr, Vec<Vec<u8>>) {
    let packet = guest.packet().await;
    let content = Packet::parse(&packet).unwrap().datagram().unwrap().to_vec();
    let message = DhcpPacket::new_checked(&content[..]).unwrap();
    let options = [3, 6, 15]
        .map(|kind| message.options().find(|option| option.kind == kind).map(|option| option.data.to_vec()));
    let kind = DhcpRepr::parse(&message).unwrap().message_type;
    (kind, message.your_ip(), options.into_iter().flatten().collect())
}

#[tokio::test]
async fn dhcp_assigns_planned_addresses_and_free_ones_to_other_nics() {
    use DhcpMessageType as Kind;
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, Some("10.0.2.77")));
    let mut db = join(&network, "db", &nic("default", 2, None));
    let gateway = vec![10, 0, 2, 1];
    let expected = vec![gateway.clone(), gateway, b"testlab-1.internal".to_vec()];
    for (kind, wanted, answer, address) in [
        (Kind::Discover, None, Kind::Offer, [10, 0, 2, 77]),
        (Kind::Request, Some([10, 0, 2, 77]), Kind::Ack, [10, 0, 2, 77]),
        (Kind::Request, Some([10, 0, 2, 15]), Kind::Nak, [0, 0, 0, 0]),
    ] {
        web.send(&discover(web.mac, kind, wanted.map(Ipv4Addr::from))).await;
        let (found, given, options) = offered(&mut web).await;
        assert_eq!((found, given), (answer, address.into()));
        assert!(answer == Kind::Nak || options == expected, "{options:?}");
    }
    // A machine inside a guest gets the same address twice.
    for _ in 0..2 {
        web.send(&discover([2, 9, 9, 9, 9, 9], Kind::Discover, None)).await;
        // The offer is for its hardware address, over the same NIC.
        loop {
            let frame = web.frame().await;
            if frame[..6] == [2, 9, 9, 9, 9, 9] {
                assert_eq!(frame[14 + 28 + 16..][..4], [10, 0, 2, 16]);
                break;
            }
        }
    }
    // No guest gets the address of another's NIC.
    db.send(&discover(web.mac, Kind::Discover, None)).await;
    db.gateway_mac().await;
    assert_eq!(db.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
}

#[tokio::test]
async fn no_guest_can_impersonate_another() {
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, None));
    let mut impostor = join(&network, "thief", &nic("default", 2, None));
    web.gateway_mac().await;
    let gateway = impostor.gateway_mac().await;
    let impersonated =
        Arp { request: false, sender: (impostor.mac, web.ip()), target: (gateway, impostor.gateway) };
    impostor.send(&impersonated.frame(gateway)).await;
    // With the other guest's IP address, and with its hardware address.
    impostor
        .send(
            &[&ipv4_header(gateway, impostor.mac)[..], &packet((web.ip(), impostor.gateway), 1, &echo(8))]
                .concat(),
        )
        .await;
    impostor
        .send(
            &[&ipv4_header(gateway, web.mac)[..], &packet((web.ip(), impostor.gateway), 1, &echo(8))]
                .concat(),
        )
        .await;
    assert_eq!(impostor.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
    let still = network.vpcs[0].lock().segments[0].has_learned(web.ip(), 0);
    assert!(still);
    assert_eq!(web.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
}

#[tokio::test]
async fn an_unmanaged_subnet_only_switches_frames() {
    let network = network(&two_vpcs());
    let mut server = join(&network, "server", &nic("bare", 1, None));
    let mut client = join(&network, "client", &nic("bare", 2, None));
    assert_eq!((server.address, client.address), (None, None));
    let asked = discover(client.mac, DhcpMessageType::Discover, None);
    client.send(&asked).await;
    assert_eq!(server.frame().await, asked);
    let request =
        Arp { request: true, sender: (client.mac, [10, 0, 9, 7].into()), target: ([0; 6], client.gateway) };
    client.send(&request.frame(BROADCAST)).await;
    assert_eq!(server.frame().await, request.frame(BROADCAST));
    // The client receives what the server sends, and nothing from a gateway.
    let answer = [&ipv4_header(client.mac, server.mac)[..], b"offer"].concat();
    server.send(&answer).await;
    assert_eq!(client.frame().await, answer);
    assert_eq!(network.dial("client", 22).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn names_of_the_lab_are_answered_and_others_forwarded() {
    let stub = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let options = NetworkOptions::new("lab").resolver(stub.local_addr().unwrap());
    let network = network_with(&undeclared(), &options);
    let mut web = join(&network, "web", &nic("default", 1, None));
    let _db = join(&network, "db", &nic("default", 2, None));
    let question =
        |name: &[u8], id: u8| [&[id, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], name, &[0, 1, 0, 1]].concat();
    let (_, answer) = web.ask((web.gateway, 53), &question(b"\x02db\x00", 1)).await;
    assert!(answer.ends_with(&[10, 0, 2, 16]), "{answer:?}");
    let asked = question(b"\x07example\x03org\x00", 2);
    let server = async {
        let mut buffer = [0; 512];
        let (length, from) = stub.recv_from(&mut buffer).await.unwrap();
        let answer = [&buffer[..2], &[0x81, 0x80], &buffer[4..length], b"the answer"].concat();
        stub.send_to(&answer, from).await.unwrap();
        buffer[..length].to_vec()
    };
    let ((_, answer), heard) = tokio::join!(web.ask((web.gateway, 53), &asked), server);
    assert_eq!(heard, asked);
    assert!(answer.ends_with(b"the answer"), "{answer:?}");
}

#[tokio::test]
async fn without_internet_no_query_is_forwarded() {
    let stub = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let options = NetworkOptions::new("lab").resolver(stub.local_addr().unwrap());
    let network = network_with(&two_vpcs(), &options);
    let mut web = join(&network, "web", &nic("web", 1, None));
    let _other = join(&network, "secret", &nic("same", 2, None));
    for name in [&b"\x07example\x03org\x00"[..], b"\x06secret\x00"] {
        let question = [&[1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], name, &[0, 1, 0, 1]].concat();
        let (_, answer) = web.ask((web.gateway, 53), &question).await;
        assert_eq!(answer[3] & 15, 3, "{answer:?}");
    }
    let mut buffer = [0; 512];
    assert!(stub.try_recv(&mut buffer).is_err());
}

#[tokio::test]
async fn datagrams_reach_the_outside_and_replies_return() {
    let outside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = outside.local_addr().unwrap().port();
    let network = network(&undeclared());
    let mut web = join(&network, "web", &nic("default", 1, None));
    let server = async {
        let mut buffer = vec![0; 4000];
        let (length, from) = outside.recv_from(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"question");
        outside.send_to(&[7; 3000], from).await.unwrap();
    };
    let ((protocol, first), ()) = tokio::join!(web.ask((Ipv4Addr::LOCALHOST, port), b"question"), server);
    // The answer is larger than a packet: its first fragment is not a complete datagram.
    assert_eq!((protocol, first.len()), (17, 1480));
    let second = web.packet().await;
    let third = web.packet().await;
    let lengths = [second, third].map(|packet| Packet::parse(&packet).unwrap().payload().len());
    assert_eq!(lengths, [1480, 48]);
    drop(outside);
    // Nothing listens there any more: the first datagram triggers the error.
    let (protocol, reply) = web.ask((Ipv4Addr::LOCALHOST, port), b"again").await;
    assert_eq!((protocol, reply[0], reply[1]), (1, 3, 3));
}

#[tokio::test]
async fn a_frame_for_an_unknown_address_is_flooded_and_then_learned() {
    let network = network(&two_vpcs());
    let mut guests = Vec::new();
    for number in 1..4 {
        guests.push(join(&network, &format!("m{number}"), &nic("web", number, None)));
    }
    let inner_mac = [2, 8, 8, 8, 8, 8];
    let to_inner = [&ipv4_header(inner_mac, guests[0].mac)[..], b"hello"].concat();
    guests[0].send(&to_inner).await;
    for number in [1, 2] {
        assert_eq!(guests[number].frame().await, to_inner);
    }
    let from_inner = [&ipv4_header(guests[0].mac, inner_mac)[..], b"reply"].concat();
    guests[1].send(&from_inner).await;
    assert_eq!(guests[0].frame().await, from_inner);
    guests[0].send(&to_inner).await;
    assert_eq!(guests[1].frame().await, to_inner);
    guests[2].gateway_mac().await;
    assert!(!guests[2].frames_before_a_ping().await.contains(&to_inner));
    let Some(Frame { payload: Payload::Ipv4(_), .. }) = Frame::parse(&to_inner) else { panic!("a frame") };
}

#[tokio::test]
async fn a_machine_may_answer_for_its_address_over_another_of_its_nics() {
    let network = network(&undeclared());
    let nics = [nic("default", 1, None), PlannedNic { name: "nic2".to_owned(), ..nic("default", 2, None) }];
    network.add_machine("web", &nics).unwrap();
    let mut first = connect_nic(&network, "web", 0);
    let mut second = connect_nic(&network, "web", 1);
    let (own, gateway) = (second.address, second.gateway_mac().await);
    // As Linux does with two NICs on one subnet: the address of the first, over the second.
    second.address = first.address;
    second
        .send(
            &[&ipv4_header(gateway, second.mac)[..], &packet((first.ip(), first.gateway), 1, &echo(8))]
                .concat(),
        )
        .await;
    second.address = own;
    // The answer goes to the NIC that has the address.
    let reply = first.packet().await;
    assert_eq!(icmp(&first, &reply), (0, 0));
    // And the first NIC continues to use it.
    assert_eq!(first.frames_before_a_ping().await, Vec::<Vec<u8>>::new());
}
