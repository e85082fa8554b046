//! Servers that are slow, wrong, gone, or fine.

use super::{
    child::Child,
    server::{Reply, Server},
    *,
};
use crate::store::{
    lock::{FileLock, Mode},
    partial_download::{Origin, PartialDownload},
};
use std::os::unix::fs::PermissionsExt;

const ETAG: &str = "\"one\"";

#[tokio::test]
async fn an_image_is_downloaded_once_and_then_revalidated() {
    let disk = raw_disk(300_032);
    let server = Server::start({
        let disk = disk.clone();
        move |request, _| Reply::file(request, &disk, ETAG)
    });
    let fixture = Fixture::new();
    let url = server.url("disk.img");
    let image = fixture.image(&url, None).await.unwrap();
    assert_eq!((image.format, image.virtual_size), (ImageFormat::Raw, 300_032));
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    assert_eq!(fs::metadata(&image.path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(image.input.content.verifiable(), Some((300_032, Digest::of(&disk))));
    // Without a checksum the server is asked, and reports that nothing has changed.
    let again = fixture.image(&url, None).await.unwrap();
    assert_eq!(again.path, image.path);
    assert_eq!(server.requests()[1].header("if-none-match"), Some(ETAG));
    // With a checksum, no server is asked.
    fixture.image(&url, Some(Digest::of(&disk))).await.unwrap();
    assert_eq!(server.count(), 2);
    assert_eq!(server.requests()[0].header("accept-encoding"), Some("identity"));
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn content_that_changed_or_has_no_validator_is_downloaded_again() {
    let server = Server::start(|request, number| match number {
        0 => Reply::file(request, &raw_disk(1024), "\"a\""),
        1 => Reply::file(request, &raw_disk(2048), "\"b\""),
        _ => Reply::ok(&raw_disk(4096)),
    });
    let fixture = Fixture::new();
    let url = server.url("disk.img");
    for size in [1024, 2048, 4096, 4096] {
        assert_eq!(fixture.image(&url, None).await.unwrap().virtual_size, size);
    }
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn an_interrupted_transfer_is_resumed() {
    let disk = raw_disk(400_384);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| {
            let reply = Reply::file(request, &disk, ETAG);
            if number < 2 { reply.stop_after(150_000) } else { reply }
        }
    });
    let fixture = Fixture::new();
    let image = fixture.image(&server.url("disk.img"), Some(Digest::of(&disk))).await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    let request = server.requests();
    assert_eq!(request[0].header("range"), None);
    assert_eq!(request[1].header("range"), Some("bytes=150000-"));
    assert_eq!(request[1].header("if-range"), Some(ETAG));
    assert_eq!(request[2].header("range"), Some("bytes=300000-"));
    assert_eq!(request.len(), 3);
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn a_download_starts_over_without_range_support_or_with_new_content() {
    for changed in [false, true] {
        let (old, new) = (raw_disk(100_352), raw_disk(if changed { 120_832 } else { 100_352 }));
        let server = Server::start({
            let new = new.clone();
            move |_, number| match number {
                0 => Reply::ok(&old).with("ETag", ETAG).stop_after(50_000),
                _ => Reply::ok(&new).with("ETag", if changed { "\"two\"" } else { ETAG }),
            }
        });
        let fixture = Fixture::new();
        let image = fixture.image(&server.url("disk.img"), None).await.unwrap();
        assert_eq!(fs::read(&image.path).unwrap(), new);
        assert_eq!(server.count(), 2);
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn a_wrong_range_is_rejected() {
    let disk = raw_disk(100_352);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| match number {
            0 => Reply::file(request, &disk, ETAG).stop_after(50_000),
            1 => Reply { status: 206, body: vec![0; 352], ..Reply::default() }
                .with("Content-Range", "bytes 100000-100351/100352"),
            _ => Reply::file(request, &disk, ETAG),
        }
    });
    let fixture = Fixture::new();
    let image = fixture.image(&server.url("disk.img"), None).await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    assert_eq!(server.requests()[2].header("range"), None);
}

#[tokio::test]
async fn a_resumed_download_with_a_wrong_checksum_starts_over() {
    let disk = raw_disk(100_352);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| {
            let reply = Reply::file(request, &disk, ETAG);
            match number {
                0 => Reply::ok(&vec![7; 100_352]).with("ETag", ETAG).stop_after(50_000),
                _ => reply,
            }
        }
    });
    let fixture = Fixture::new();
    let image = fixture.image(&server.url("disk.img"), Some(Digest::of(&disk))).await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    assert_eq!(server.count(), 3);
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn a_missing_file_fails_at_once() {
    for (status, kind, text) in [
        (
            404,
            ErrorKind::NotFound,
            "expected the file, but the server answered 404 Not Found\n  help: check the URL: the server has no such file",
        ),
        (
            403,
            ErrorKind::Download,
            "expected the file, but the server answered 403 Forbidden\n  help: check the credentials in the URL",
        ),
    ] {
        let server = Server::start(move |_, _| Reply::status(status));
        let fixture = Fixture::new();
        let mut url = server.url("disk.img");
        url.set_username("ann").unwrap();
        url.set_password(Some("geheim")).unwrap();
        let error = fixture.image(&url, None).await.unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (kind, false));
        url.set_username("***").unwrap();
        url.set_password(None).unwrap();
        assert_eq!(error.report(), format!("url {url}: {text}"));
        assert_eq!(server.count(), 1);
        assert!(server.requests()[0].header("authorization").unwrap().starts_with("Basic "));
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn a_failing_server_is_retried_a_limited_number_of_times() {
    let disk = raw_disk(1024);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| if number < 2 { Reply::status(503) } else { Reply::file(request, &disk, ETAG) }
    });
    let fixture = Fixture::new();
    fixture.image(&server.url("disk.img"), None).await.unwrap();
    assert_eq!(server.count(), 3);

    let server = Server::start(|_, _| Reply::status(503));
    let url = server.url("disk.img");
    let error = fixture.image(&url, None).await.unwrap_err();
    assert_eq!(server.count(), 3);
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Download, true));
    assert_eq!(
        error.report(),
        format!(
            "url {url}: the download failed after 3 attempts\n  because: expected the file, but the server answered \
             503 Service Unavailable\n  help: try again later"
        )
    );
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn redirects_are_followed_up_to_a_limit() {
    let disk = raw_disk(1024);
    let server = Server::start({
        let disk = disk.clone();
        move |request, _| match request.path.as_str() {
            "/old.img" => Reply::status(302).with("Location", "/new.img"),
            "/round.img" => Reply::status(302).with("Location", "/round.img"),
            _ => Reply::file(request, &disk, ETAG),
        }
    });
    let fixture = Fixture::new();
    fixture.image(&server.url("old.img"), None).await.unwrap();
    let before = server.count();
    let error = fixture.image(&server.url("round.img"), None).await.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Download, false));
    assert_eq!(error.to_string(), "expected at most 10 redirects to http or https");
    assert_eq!(server.count() - before, 11);
}

#[tokio::test]
async fn a_stalled_or_short_transfer_is_retried_and_kept() {
    let disk = raw_disk(100_352);
    let server = Server::start(move |request, _| {
        let reply = Reply::file(request, &disk, ETAG);
        let rest = reply.body.len() / 2;
        reply.hold_after(rest)
    });
    let fixture = Fixture::new();
    let url = server.url("disk.img");
    let error = fixture.image(&url, None).await.unwrap_err();
    assert_eq!(server.count(), 3);
    assert_eq!(
        error.report(),
        format!(
            "url {url}: the download failed after 3 attempts\n  because: the server sent nothing for 0.5 s\n  help: try \
             again later: the download resumes after the 85.7 KiB that were received"
        )
    );
    // The next call continues from there.
    server.open_gate();
    fixture.image(&url, None).await.unwrap();
    assert_eq!(server.requests()[3].header("range"), Some("bytes=87808-"));
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn an_unreachable_server_is_reported() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/disk.img", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let error = Fixture::new().image(&url, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Download);
    let report = error.report();
    assert!(report.contains("because: cannot connect to the server"), "{report}");
    assert!(report.contains("help: check the host name"), "{report}");
}

#[tokio::test]
async fn correcting_a_checksum_downloads_nothing() {
    for packed in [false, true] {
        let disk = raw_disk(50_176);
        let served =
            if packed { image::pack(super::unpack::Packing::Gzip, &disk).await } else { disk.clone() };
        let server = Server::start({
            let served = served.clone();
            move |request, _| Reply::file(request, &served, ETAG)
        });
        let fixture = Fixture::new();
        let url = server.url("disk.img");
        let wrong = Digest::of(b"something else");
        let error = fixture.image(&url, Some(wrong)).await.unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::ChecksumMismatch, false));
        assert_eq!(
            error.report(),
            format!(
                "url {url}: expected sha256 {wrong}, but found {}\n  help: if the server is right, correct `checksum` in \
                 the manifest: the bytes are kept in the store and are not downloaded again",
                Digest::of(&served)
            )
        );
        // Still wrong: the server is asked whether its content has changed.
        assert_eq!(fixture.image(&url, Some(wrong)).await.unwrap_err().kind(), ErrorKind::ChecksumMismatch);
        assert_eq!(server.requests()[1].header("if-none-match"), Some(ETAG));
        let image = fixture.image(&url, Some(Digest::of(&served))).await.unwrap();
        assert_eq!(fs::read(&image.path).unwrap(), disk);
        assert_eq!(server.count(), 2);
        fixture.assert_no_leftovers();
    }
}

#[tokio::test]
async fn a_file_is_stored_as_served() {
    let server = Server::start(|request, _| Reply::file(request, b"hello", ETAG));
    let fixture = Fixture::new();
    let url = planned(&server.url("hello.txt"), None);
    let file = fixture.store.file(&url, &Progress::none()).await.unwrap();
    assert_eq!(fs::read(&file.path).unwrap(), b"hello");
    assert_eq!(file.input.content.sha256(), Some(Digest::of(b"hello")));
}

#[tokio::test]
async fn a_download_that_does_not_fit_is_not_started() {
    let server = Server::start(|request, _| {
        let mut reply = Reply::file(request, &raw_disk(1024), ETAG);
        reply.length = Some(1 << 60);
        reply
    });
    let error = Fixture::new().image(&server.url("disk.img"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostDiskFull);
    assert!(error.to_string().starts_with("expected 1024.0 PiB of free space in /"), "{error}");
    assert_eq!(server.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_tasks_share_one_download() {
    let disk = raw_disk(100_352);
    let server = Arc::new(Server::start({
        let disk = disk.clone();
        move |_, _| Reply::ok(&disk).hold_after(50_000)
    }));
    let fixture = Fixture::new();
    let url = planned(&server.url("disk.img"), None);
    let waiting = Arc::new(Mutex::new(0));
    let tasks = (0..4).map(|_| {
        let (store, url, server, waiting) =
            (fixture.store.clone(), url.clone(), server.clone(), waiting.clone());
        tokio::spawn(async move {
            let progress = Progress::new(move |event| {
                if matches!(event, ProgressEvent::Notice(_)) {
                    *waiting.lock().unwrap() += 1;
                    if *waiting.lock().unwrap() == 3 {
                        server.open_gate();
                    }
                }
            });
            store.image(&url, &progress).await.unwrap().path
        })
    });
    let paths = futures::future::join_all(tasks).await;
    assert!(paths.iter().all(|path| path.as_ref().unwrap() == &fixture.store.blob_path(&Digest::of(&disk))));
    assert_eq!(server.count(), 1);
    fixture.assert_no_leftovers();
}

#[tokio::test]
async fn a_dropped_download_is_resumed() {
    let disk = raw_disk(100_352);
    let server = Server::start({
        let disk = disk.clone();
        move |request, number| {
            let reply = Reply::file(request, &disk, ETAG);
            if number == 0 { reply.hold_after(60_000) } else { reply }
        }
    });
    let fixture = Fixture::new();
    let url = planned(&server.url("disk.img"), None);
    let (arrived, mut arrival) = tokio::sync::mpsc::unbounded_channel();
    let progress = Progress::new(move |event| {
        if matches!(event, ProgressEvent::Bytes { done: 60_000, .. }) {
            let _ = arrived.send(());
        }
    });
    tokio::select! {
        _ = fixture.store.image(&url, &progress) => panic!("the server holds it back"),
        _ = arrival.recv() => {}
    }
    let image = fixture.store.image(&url, &Progress::none()).await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    assert!(server.requests()[1].header("range").is_some());
    fixture.assert_no_leftovers();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_share_one_download() {
    let disk = raw_disk(100_352);
    let server = Server::start({
        let disk = disk.clone();
        move |_, _| Reply::ok(&disk).hold_after(50_000)
    });
    let fixture = Fixture::new();
    let url = server.url("disk.img");
    let mut one = Child::download(fixture.store.root(), &url);
    one.wait_for("bytes 50000");
    let mut two = Child::download(fixture.store.root(), &url);
    two.wait_for("notice waiting for another download");
    server.open_gate();
    let path = fixture.store.blob_path(&Digest::of(&disk));
    one.wait_for(&format!("done {}", path.display()));
    two.wait_for(&format!("done {}", path.display()));
    assert_eq!(server.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn downloading_a_large_image_needs_little_memory() {
    let server = Server::start(|_, _| Reply { repeats: 127, ..Reply::ok(&raw_disk(1 << 20)) });
    let fixture = Fixture::new();
    let mut child = Child::start(fixture.store.root(), &format!("measure {}", server.url("large.img")));
    let line = child.wait_for("grew by ");
    let kibibytes: u64 = line.split(' ').nth(2).unwrap().parse().unwrap();
    assert!(kibibytes < 32 * 1024, "128 MiB were downloaded, and the process {line} KiB");
}

#[tokio::test]
async fn downloads_that_cannot_be_resumed_are_reaped() {
    let fixture = Fixture::new();
    let key = Digest::of(b"url").to_string();
    let part = fixture.store.part_path(&key);
    fs::write(&part, b"half").unwrap();
    let report = fixture.store.reap().await.unwrap();
    assert_eq!(report.removed, [format!("partial download {}", &key[..12])]);
    fixture.assert_no_leftovers();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_download_of_a_killed_process_is_resumed_by_another() {
    let disk = raw_disk(100_352);
    let served = image::pack(super::unpack::Packing::Gzip, &disk).await;
    let server = Server::start({
        let served = served.clone();
        move |request, number| {
            let reply = Reply::file(request, &served, ETAG);
            if number == 0 { reply.hold_after(50_000) } else { reply }
        }
    });
    let fixture = Fixture::new();
    let url = server.url("disk.img.gz");
    let part = fixture.store.part_path(&Store::url_key(&url));
    let mut child = Child::download(fixture.store.root(), &url);
    child.wait_for("bytes 50000");
    child.wait_until(|| fs::metadata(&part).is_ok_and(|meta| meta.len() == 50_000));
    child.wait_until(|| fixture.names("downloads").iter().any(|name| name.starts_with(".tmp-")));
    child.kill();
    // What it unpacked so far is reaped; what it downloaded stays.
    let report = fixture.store.reap().await.unwrap();
    assert_eq!(report.removed.len(), 1, "{report:?}");
    assert!(report.removed[0].starts_with("temporary file"), "{report:?}");
    let image = fixture.image(&url, None).await.unwrap();
    assert_eq!(fs::read(&image.path).unwrap(), disk);
    assert_eq!(server.requests()[1].header("range"), Some("bytes=50000-"));
    assert_eq!(server.count(), 2);
    fixture.assert_no_leftovers();
}

/// The record of a download's origin is written under a temporary name first.
#[tokio::test(flavor = "multi_thread")]
async fn reaping_does_not_disturb_a_process_that_records_a_download() {
    let fixture = Fixture::new();
    let (store, done) =
        (fixture.store.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let (reaped, ended) = (store.clone(), done.clone());
    let reaping = tokio::spawn(async move {
        while !ended.load(std::sync::atomic::Ordering::Relaxed) {
            assert_eq!(reaped.reap().await.unwrap().removed, Vec::<String>::new());
        }
    });
    let writing = tokio::task::spawn_blocking(move || {
        let lock = FileLock::wait(&store.lock_path("download-key"), Mode::Exclusive).unwrap();
        let mut part = PartialDownload::open(&store, "key", false, std::sync::Arc::new(lock)).unwrap();
        let origin = Origin {
            url: "http://example/".to_owned(),
            etag: None,
            last_modified: None,
            if_range: Some("\"1\"".to_owned()),
            total: Some(1),
            boot_id: String::new(),
        };
        (0..300).try_for_each(|_| part.restart(Some(origin.clone())))
    });
    let written = writing.await.unwrap();
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    reaping.await.unwrap();
    written.unwrap();
}
