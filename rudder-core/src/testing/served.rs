//! Files that a lab serves to its machines.

use super::{
    NotPassed, Owners, Rig, TestResult,
    guest::Booted,
    rig::lock,
    test_result::{During as _, ensure, fail},
};
use crate::{
    Error,
    backend::{Site, SiteFile},
    digest::Digest,
};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A guest gets what is served to it, whatever its name and size, and nothing else; each request is reported; and
/// serving ends.
pub async fn files_are_served_to_the_guest(rig: &Rig) -> TestResult {
    let booted = rig.shared().await?;
    let large = super::streams::noise(11, rig.image()?.large / 4);
    let made = |error| Error::io("create a file to serve", error);
    let on_disk = tempfile::NamedTempFile::new().map_err(made)?;
    std::fs::write(on_disk.path(), &large).map_err(made)?;
    let files = BTreeMap::from([
        ("small.txt".to_owned(), SiteFile::bytes(*b"small")),
        ("an odd, \"name\" é&;'$(x).txt".to_owned(), SiteFile::bytes(*b"odd")),
        ("large.bin".to_owned(), SiteFile::path(on_disk.path().to_owned())),
    ]);
    let log = Arc::new(Mutex::new(Vec::new()));
    let site = Site::new(files, {
        let log = Arc::clone(&log);
        move |request| lock(&log).push((request.path.clone(), request.status))
    });
    let served = booted.lab.serve(site).await.during("serve files")?;
    let subnet = super::rig::network().subnets.first().map(|subnet| subnet.name.clone()).unwrap_or_default();
    let Some(address) = served.addresses.get(&subnet) else {
        fail!("expected an address on subnet {subnet}, but found {:?}", served.addresses)
    };
    let at = |name: &str| format!("http://{address}:{}/{name}", served.port);
    for (name, bytes) in [
        ("small.txt", &b"small"[..]),
        ("an%20odd%2C%20%22name%22%20%C3%A9%26%3B%27%24%28x%29.txt", b"odd"),
        ("large.bin", &large),
    ] {
        let found = get(rig, &booted, &at(name)).await?;
        let wanted = Digest::of(bytes).to_string();
        ensure!(
            found.as_deref() == Some(&*wanted),
            "{name}: expected the digest {wanted}, but found {found:?}"
        );
    }
    for name in ["missing.txt", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd"] {
        let found = get(rig, &booted, &at(name)).await?;
        ensure!(found.is_none(), "{name}: expected nothing, but found {found:?}");
    }
    let reported = lock(&log).clone();
    ensure!(
        reported.iter().any(|(path, status)| path.contains("small.txt") && *status == 200),
        "expected a report of the request for small.txt, but found {reported:?}"
    );
    let url = at("small.txt");
    drop(served);
    let found = get(rig, &booted, &url).await?;
    ensure!(found.is_none(), "expected nothing once serving ended, but found {found:?}");
    Ok(())
}

/// What is served is only for the machines of the lab: no other process of the host gets it, neither while it is served
/// nor once the lab is gone.
pub async fn files_are_served_only_to_machines_of_the_lab_while_it_exists(rig: &Rig) -> TestResult {
    const SECRET: &str = "for the machines of this lab only";
    let lab = rig.lab("served").await?;
    let machine = rig.running(&*lab, "web").await?;
    let files = BTreeMap::from([("file".to_owned(), SiteFile::bytes(SECRET.as_bytes()))]);
    let served = lab.serve(Site::new(files, |_| {})).await.during("serve files")?;
    let mut addresses = vec![Ipv4Addr::LOCALHOST];
    // Only addresses of the host can be reached from it.
    let is_of_host = |address: &&Ipv4Addr| std::net::TcpListener::bind((**address, 0)).is_ok();
    addresses.extend(served.addresses.values().filter(is_of_host));
    let has_secret = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
    for address in &addresses {
        let reported = match rig.adapter().owners() {
            // This process is not one of the lab's machines.
            Owners::Process(_) => {
                fetch(&format!("http://{address}:{}/file", served.port)).await?.unwrap_or_default()
            }
            Owners::Handle => ask_as_another_process(*address, served.port).await?,
        };
        ensure!(
            !has_secret(&reported),
            "{address}: expected only machines to be answered, but this process was"
        );
    }
    lab.destroy().await.during("destroy the lab")?;
    for address in &addresses {
        let reported = fetch(&format!("http://{address}:{}/file", served.port)).await?.unwrap_or_default();
        ensure!(
            !has_secret(&reported),
            "{address}: expected no answers after the lab was destroyed, but found one"
        );
    }
    drop((served, machine));
    Ok(())
}

/// Returns what another process of this host receives.
async fn ask_as_another_process(address: Ipv4Addr, port: u16) -> TestResult<Vec<u8>> {
    let script = r#"exec 3<>"/dev/tcp/$0/$1" && printf 'GET /file HTTP/1.0\r\n\r\n' >&3 && cat <&3"#;
    let mut command = tokio::process::Command::new("bash");
    command.args(["-c", script, &address.to_string(), &port.to_string()]).stdin(Stdio::null());
    command.kill_on_drop(true);
    let Ok(output) = tokio::time::timeout(ANSWER_LIMIT, command.output()).await else {
        fail!("expected another process to be refused within {ANSWER_LIMIT:?}, but it waits")
    };
    // If refused, it fails.
    Ok(output.map_err(|error| Error::io("start bash", error))?.stdout)
}

/// Returns what a guest gets from a URL: the digest of the body of a successful response.
async fn get(rig: &Rig, booted: &Booted, url: &str) -> TestResult<Option<String>> {
    if let Owners::Handle = rig.adapter().owners() {
        // The guests are part of this process.
        return Ok(fetch(url).await?.map(|body| Digest::of(&body).to_string()));
    }
    let command = format!("wget -q -O /tmp/got '{url}' && sha256sum /tmp/got || echo none");
    let reported = booted.run(&command).await?;
    let digest = reported.split_whitespace().next().unwrap_or_default();
    Ok(Some(digest.to_owned()).filter(|digest| digest != "none"))
}

/// Returns what this process gets from a URL, over HTTP/1.0 (RFC 1945).
async fn fetch(url: &str) -> TestResult<Option<Vec<u8>>> {
    let url: url::Url = url.parse().map_err(|error| NotPassed::Failed(format!("{url}: {error}")))?;
    let talk = async {
        let address = (url.host_str().unwrap_or_default(), url.port().unwrap_or(80));
        let mut stream = TcpStream::connect(address).await?;
        let path = url.path();
        stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: suite\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let Ok(answer) = tokio::time::timeout(ANSWER_LIMIT, talk).await else {
        fail!("{url}: expected an answer within {ANSWER_LIMIT:?}, but found none")
    };
    // Without a server, there is nothing to get.
    let Ok(answer) = answer else { return Ok(None) };
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let is_good = answer.split(|byte| *byte == b' ').nth(1) == Some(b"200");
    Ok(end.filter(|_| is_good).map(|end| answer[end + 4..].to_vec()))
}
