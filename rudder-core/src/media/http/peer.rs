//! Which process of this host is at the other end of a loopback connection (Linux: proc(5)).

use super::Caller;
use std::{
    fs,
    net::{SocketAddr, SocketAddrV4},
    path::Path,
};

/// Whether the caller's end of a connection is a socket of this process. `false` where that is unknown: for a process
/// of another user, for a connection over IPv6, and for one that has ended.
#[must_use]
pub fn is_of_process(caller: Caller, pid: u32) -> bool {
    let (SocketAddr::V4(peer), SocketAddr::V4(local)) = (caller.peer, caller.local) else { return false };
    let Ok(table) = fs::read_to_string("/proc/self/net/tcp") else { return false };
    inode(&table, peer, local).is_some_and(|inode| has_socket(pid, inode))
}

/// Returns the inode of the socket whose own address is `own` and that is connected to `other`.
///
/// A line of the table (proc(5), `/proc/net/tcp`): number, both addresses as hexadecimal numbers in the byte order of
/// the host with their ports, state, queues, timers, owner, timeout, inode…
fn inode(table: &str, own: SocketAddrV4, other: SocketAddrV4) -> Option<u64> {
    let (own, other) = (address(own), address(other));
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        if fields.next()? != own || fields.next()? != other {
            return None;
        }
        // 0: no process has it any more.
        fields.nth(6)?.parse().ok().filter(|inode| *inode != 0)
    })
}

/// Formats an address as in the table.
fn address(address: SocketAddrV4) -> String {
    format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port())
}

/// Whether a process has this socket open.
fn has_socket(pid: u32, inode: u64) -> bool {
    let wanted = format!("socket:[{inode}]");
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|link| link == Path::new(&wanted)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{
        net::{TcpListener, TcpStream},
        process::{Command, Stdio},
    };

    fn accepted(listener: &TcpListener) -> Caller {
        let (stream, peer) = listener.accept().unwrap();
        let local = stream.local_addr().unwrap();
        // Kept open, since the caller is identified during its call.
        std::mem::forget(stream);
        Caller { peer, local }
    }

    #[test]
    fn a_connection_belongs_to_the_process_that_made_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let caller = accepted(&listener);
        assert!(is_of_process(caller, std::process::id()));
        // With the addresses exchanged, it is the listener's end, which also belongs to this process; another pair
        // belongs to no process.
        let unconnected = Caller { peer: "127.0.0.1:1".parse().unwrap(), ..caller };
        assert!(!is_of_process(unconnected, std::process::id()));
        assert!(!is_of_process(caller, 1) || std::process::id() == 1);
        drop(own);
    }

    #[test]
    fn a_connection_of_a_child_is_not_attributed_to_its_parent() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; read line");
        let mut child = Command::new("bash").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
        let caller = accepted(&listener);
        assert!(is_of_process(caller, child.id()));
        assert!(!is_of_process(caller, std::process::id()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!is_of_process(caller, child.id()));
    }

    #[test]
    fn a_socket_is_found_by_both_of_its_addresses() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 41 1 0 100 0 0 10 0\n   \
                     1: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 42 1 0 20 4 30 10 -1\n   \
                     2: 0100007F:C351 0100007F:1F90 06 00000000:00000000 03:00000D9A 00000000     0        0 0 3 0\n";
        let v4 = |port| SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port);
        if cfg!(target_endian = "little") {
            assert_eq!(inode(table, v4(50_000), v4(8080)), Some(42));
            assert_eq!(inode(table, v4(50_001), v4(8080)), None);
            assert_eq!(inode(table, v4(8080), v4(50_000)), None);
        }
    }
}
