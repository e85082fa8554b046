//! Downloads over TLS and through proxies. Trusted certificates and proxies are set in the environment of a process, so child
//! processes perform the downloads.

use super::{child::Child, server::*, *};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_configured_authority_is_trusted() {
    let disk = raw_disk(100_352);
    let authority = Authority::new();
    let server = Server::start_tls(&authority, {
        let disk = disk.clone();
        move |_, _| Reply::ok(&disk)
    });
    let fixture = Fixture::new();
    let trusted = fixture.write("authority.pem", authority.pem.as_bytes());
    let task = format!("download {}", server.url("disk.img"));
    let mut child = Child::start_in(fixture.store.root(), &task, &[("SSL_CERT_FILE", trusted.path())]);
    child.wait_for(&format!("done {}", fixture.store.blob_path(&Digest::of(&disk)).display()));
    assert_eq!(server.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_an_unknown_authority_is_refused_at_once() {
    let server = Server::start_tls(&Authority::new(), |_, _| panic!("it is asked for nothing"));
    let fixture = Fixture::new();
    let url = server.url("disk.img");
    let error = fixture.image(&url, None).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Download, false));
    let report = error.report();
    for part in
        [url.as_str(), "the certificate of the server is not trusted", "UnknownIssuer", "SSL_CERT_FILE"]
    {
        assert!(report.contains(part), "{part:?} in\n{report}");
    }
    assert_eq!(server.count(), 0);
    fixture.assert_no_leftovers();
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_from_the_environment_are_used() {
    let disk = raw_disk(100_352);
    let authority = Authority::new();
    let answer = {
        let disk = disk.clone();
        move |_: &Request, _| Reply::ok(&disk)
    };
    let server = Server::start_tls(&authority, answer.clone());
    let proxy = Server::start(answer);
    let fixture = Fixture::new();
    let trusted = fixture.write("authority.pem", authority.pem.as_bytes());
    let at = proxy.url("");
    let variables =
        [("SSL_CERT_FILE", trusted.path()), ("HTTPS_PROXY", at.as_str()), ("http_proxy", at.as_str())];
    // For a server over TLS the proxy opens a tunnel, and does not see its content.
    let through = server.url("disk.img");
    for url in [through.as_str(), "http://images.invalid/disk.img"] {
        let mut child = Child::start_in(fixture.store.root(), &format!("download {url}"), &variables);
        child.wait_for("done ");
    }
    assert_eq!(server.count(), 1);
    let request: Vec<String> = proxy.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(request, [through.authority(), "http://images.invalid/disk.img"]);
}
