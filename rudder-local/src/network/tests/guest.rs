//! A simulated guest: reads and writes frames like QEMU, by hand or with a TCP stack.

use super::PATIENCE;
use crate::network::wire::{Arp, BROADCAST, Frame, Mac, Packet, Payload, ipv4_header, packet, udp};
use smoltcp::{
    iface::{Config, Interface, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
    wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr},
};
use std::{collections::VecDeque, net::Ipv4Addr, time::Duration};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

pub(super) struct Guest {
    stream: DuplexStream,
    pub(super) mac: Mac,
    pub(super) address: Option<Ipv4Addr>,
    pub(super) gateway: Ipv4Addr,
}

impl Guest {
    pub(super) fn new(stream: DuplexStream, mac: Mac, address: Option<Ipv4Addr>, gateway: Ipv4Addr) -> Self {
        Self { stream, mac, address, gateway }
    }

    pub(super) fn ip(&self) -> Ipv4Addr {
        self.address.unwrap()
    }

    pub(super) async fn send(&mut self, frame: &[u8]) {
        self.stream.write_u32(u32::try_from(frame.len()).unwrap()).await.unwrap();
        self.stream.write_all(frame).await.unwrap();
    }

    /// Returns the next frame.
    pub(super) async fn frame(&mut self) -> Vec<u8> {
        tokio::time::timeout(PATIENCE, read(&mut self.stream)).await.expect("a frame").unwrap()
    }

    /// Waits until the other side closes the connection.
    pub(super) async fn ended(&mut self) {
        while read(&mut self.stream).await.is_ok() {}
    }

    /// Sends a ping, and returns all frames that arrive until the gateway answers it: any earlier frame has arrived by then.
    pub(super) async fn frames_before_a_ping(&mut self) -> Vec<Vec<u8>> {
        let mark = b"\x08\x00\x00\x00\x7a\x7aping-to-see-what-came-before";
        let sum = smoltcp::wire::Icmpv4Packet::new_unchecked(mark.to_vec());
        let mut sum = sum;
        sum.fill_checksum();
        let (ip, gateway) = (self.ip(), self.gateway);
        self.send_packet(&packet((ip, gateway), 1, sum.as_ref())).await;
        let mut frames = Vec::new();
        loop {
            let frame = self.frame().await;
            if frame.windows(12).any(|window| window == b"ping-to-see-") {
                return frames;
            }
            frames.push(frame);
        }
    }

    /// Sends an IPv4 packet to the gateway.
    pub(super) async fn send_packet(&mut self, packet: &[u8]) {
        let mac = self.gateway_mac().await;
        self.send(&[&ipv4_header(mac, self.mac), packet].concat()).await;
    }

    /// Asks for the gateway's hardware address, which also announces the guest's own.
    pub(super) async fn gateway_mac(&mut self) -> Mac {
        let sender = (self.mac, self.address.unwrap_or(Ipv4Addr::UNSPECIFIED));
        let request = Arp { request: true, sender, target: ([0; 6], self.gateway) };
        self.send(&request.frame(BROADCAST)).await;
        loop {
            let bytes = self.frame().await;
            let frame = Frame::parse(&bytes).unwrap();
            if let Payload::Arp(arp) = frame.payload
                && let Some(arp) = Arp::parse(arp)
                && !arp.request
                && arp.sender.1 == self.gateway
            {
                return arp.sender.0;
            }
        }
    }

    /// Returns the next IPv4 packet for this guest.
    pub(super) async fn packet(&mut self) -> Vec<u8> {
        loop {
            let bytes = self.frame().await;
            if let Some(Frame { to, payload: Payload::Ipv4(packet), .. }) = Frame::parse(&bytes)
                && (to == self.mac || to == BROADCAST)
            {
                return packet.to_vec();
            }
        }
    }

    /// Sends a datagram to a host behind the gateway, and returns the answer: its protocol and its content.
    pub(super) async fn ask(&mut self, to: (Ipv4Addr, u16), content: &[u8]) -> (u8, Vec<u8>) {
        let from = (self.ip(), 40_000);
        self.send_packet(&udp(from, to, content)).await;
        let reply = self.packet().await;
        let packet = Packet::parse(&reply).unwrap();
        (
            packet.protocol,
            packet.datagram().filter(|_| packet.protocol == 17).unwrap_or(packet.payload()).to_vec(),
        )
    }

    /// Runs a TCP stack with these sockets until `done` returns a value; it is called after every step.
    pub(super) async fn run<T>(
        self,
        sockets: SocketSet<'static>,
        mut step: impl FnMut(&mut Interface, &mut SocketSet<'static>) -> Option<T>,
    ) -> T {
        let Self { stream, mac, address, gateway } = self;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (frames, mut received) = tokio::sync::mpsc::channel(64);
        let _reading = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
            while let Ok(frame) = read(&mut reader).await {
                if frames.send(frame).await.is_err() {
                    return;
                }
            }
        }));
        let (mut sockets, mut queues, started) = (sockets, Queues::default(), std::time::Instant::now());
        let mut interface = Interface::new(
            Config::new(HardwareAddress::Ethernet(EthernetAddress(mac))),
            &mut queues,
            Instant::ZERO,
        );
        interface.update_ip_addrs(|all| {
            let _ = all.push(IpCidr::new(IpAddress::Ipv4(address.unwrap()), 24));
        });
        interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
        loop {
            let now = Instant::from_micros(i64::try_from(started.elapsed().as_micros()).unwrap());
            interface.poll(now, &mut queues, &mut sockets);
            let done = step(&mut interface, &mut sockets);
            interface.poll(now, &mut queues, &mut sockets);
            for frame in std::mem::take(&mut queues.1) {
                let _ = writer.write_u32(u32::try_from(frame.len()).unwrap()).await;
                let _ = writer.write_all(&frame).await;
            }
            if let Some(done) = done {
                return done;
            }
            // Continues without a frame, because the step may have its own reasons to run.
            if let Ok(Some(frame)) = tokio::time::timeout(Duration::from_millis(2), received.recv()).await {
                queues.0.push_back(frame);
                while let Ok(frame) = received.try_recv() {
                    queues.0.push_back(frame);
                }
            }
        }
    }
}

async fn read(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut frame = vec![0; usize::try_from(stream.read_u32().await?).unwrap()];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

#[derive(Default)]
struct Queues(VecDeque<Vec<u8>>, Vec<Vec<u8>>);
struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut frame = vec![0; length];
        let result = write(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.0.pop_front()?), Tx(&mut self.1)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.1))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}
