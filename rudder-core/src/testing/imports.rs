//! What is imported into a lab: images, blank disks, files; concurrently, verified, and refused when the content
//! differs from what was expected.

use super::{
    NotPassed, Rig, TestResult,
    rig::{BLANK, ProgressLog},
    test_result::{During as _, ensure, expect_equal, fail, refused},
};
use crate::{
    Error, ErrorKind,
    backend::{ImportRequest, Progress},
    content::Content,
    digest::Digest,
    fetch::FetchRequest,
    plan::{PlannedSource, PlannedUrl},
};
use futures::future::join_all;

/// Returns a digest that matches no content.
fn wrong() -> Digest {
    Digest::of(b"something else")
}

/// Blank disks have the requested size and no origin, and are independent of each other.
pub async fn blank_disks_have_their_size(rig: &Rig) -> TestResult {
    let lab = rig.lab("blank").await?;
    let request = ImportRequest::new("web", "data", PlannedSource::Blank, Some(BLANK));
    let progress = Progress::none();
    let both = futures::join!(lab.import(&request, &progress), lab.import(&request, &progress));
    let both = [both.0.during("import a blank disk")?, both.1.during("import another at once")?];
    for imported in &both {
        expect_equal(&imported.volume.virtual_size, &BLANK, "the size of a blank disk")?;
        ensure!(
            imported.input.is_none(),
            "expected no origin of a blank disk, but found {:?}",
            imported.input
        );
    }
    ensure!(
        both[0].volume.id != both[1].volume.id,
        "expected two volumes, but found one: {:?}",
        both[0].volume
    );
    let sizeless = ImportRequest::new("web", "data", PlannedSource::Blank, None);
    let sizeless = lab.import(&sizeless, &progress).await;
    refused(sizeless, ErrorKind::InvalidInput, "import a blank disk of no size")?;
    lab.destroy().await.during("destroy the lab")
}

/// An image is imported by several callers at once: each gets a volume of its own, and all the same origin.
pub async fn an_image_can_be_imported_concurrently(rig: &Rig) -> TestResult {
    let image = rig.image()?.image;
    let (one, two) = (rig.lab("importers").await?, rig.lab("importers").await?);
    let request = ImportRequest::new("web", "root", PlannedSource::Url(image), None);
    let labs = [&one, &two, &one, &two];
    let log = [(); 4].map(|()| ProgressLog::default());
    let imports = labs.iter().zip(&log).map(|(lab, log)| {
        let request = &request;
        async move { lab.import(request, &log.progress()).await }
    });
    let imports = join_all(imports).await;
    let mut all = Vec::new();
    for imported in imports {
        all.push(imported.during("import an image that others import as well")?);
    }
    let Some(input) = all[0].input.clone() else { fail!("expected the origin of an image, but found none") };
    ensure!(
        input.content.size != Some(0) && input.url.contains(':'),
        "expected its origin and its size, but found {input:?}"
    );
    for imported in &all {
        expect_equal(
            &imported.volume.virtual_size,
            &all[0].volume.virtual_size,
            "the size of the same image",
        )?;
        expect_equal(&imported.input, &all[0].input, "the origin of the same image")?;
    }
    ensure!(
        all[0].volume.id != all[2].volume.id,
        "expected two volumes in a lab, but found {:?}",
        all[0].volume
    );
    for log in &log {
        log.check()?;
    }
    one.destroy().await.during("destroy the lab")?;
    two.destroy().await.during("destroy the other lab")
}

/// A disk may be larger than its image, and never smaller.
pub async fn a_disk_has_the_requested_size(rig: &Rig) -> TestResult {
    let image = PlannedSource::Url(rig.image()?.image);
    let lab = rig.lab("sizes").await?;
    let progress = Progress::none();
    let request = |size| ImportRequest::new("web", "root", image.clone(), size);
    let own = lab.import(&request(None), &progress).await.during("import an image as it is")?;
    let own = own.volume.virtual_size;
    let larger = own + (64 << 20);
    let found =
        lab.import(&request(Some(larger)), &progress).await.during("import an image into more space")?;
    expect_equal(&found.volume.virtual_size, &larger, "the size of a disk")?;
    let smaller = lab.import(&request(Some(own / 2)), &progress).await;
    let error = refused(smaller, ErrorKind::InvalidInput, "import an image into too little space")?;
    ensure!(!error.is_retryable(), "expected an error that is not retryable, but found {}", error.report());
    lab.destroy().await.during("destroy the lab")
}

/// Content without the expected digest is refused; content with that digest is not.
pub async fn an_expected_digest_is_verified(rig: &Rig) -> TestResult {
    let image = rig.image()?.image;
    let lab = rig.lab("digests").await?;
    let progress = Progress::none();
    let request = |sha256| {
        let source = PlannedSource::Url(PlannedUrl { url: image.url.clone(), sha256 });
        ImportRequest::new("web", "root", source, None)
    };
    let imported = lab.import(&request(Some(wrong())), &progress).await;
    refused(imported, ErrorKind::ChecksumMismatch, "import an image of another digest")?;
    let imported =
        lab.import(&request(None), &progress).await.during("import it without an expected digest")?;
    let Some(input) = imported.input else { fail!("expected the origin of an image, but found none") };
    // A backend need not know the digest of what it imported.
    if let Some(sha256) = input.content.sha256() {
        let imported = lab.import(&request(Some(sha256)), &progress).await;
        imported.during("import it with the reported digest")?;
    }
    let imported = lab.import(&request(Some(wrong())), &progress).await;
    refused(imported, ErrorKind::ChecksumMismatch, "import it once more with another digest")?;
    lab.destroy().await.during("destroy the lab")
}

/// A missing image and a broken one fail with different errors.
pub async fn an_invalid_image_is_refused(rig: &Rig) -> TestResult {
    let Some(bad) = rig.adapter().bad_images() else {
        return Err(NotPassed::Skipped("the adapter knows no bad images".to_owned()));
    };
    let lab = rig.lab("bad").await?;
    let request = |url| {
        let source = PlannedSource::Url(PlannedUrl { url, sha256: None });
        ImportRequest::new("web", "root", source, None)
    };
    match lab.import(&request(bad.missing), &Progress::none()).await {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Download) => {}
        other => fail!("a missing image: expected NotFound or Download, but found {other:?}"),
    }
    let imported = lab.import(&request(bad.broken), &Progress::none()).await;
    refused(imported, ErrorKind::InvalidImage, "import something that is not an image")?;
    lab.destroy().await.during("destroy the lab")
}

/// Files are fetched by several callers at once, verified, and readable as long as they are held; names have no special
/// meaning.
pub async fn files_are_fetched_and_verified(rig: &Rig) -> TestResult {
    const CONTENT: &[u8] = b"some bytes\0\xff\n";
    let made = |error| Error::io("create a file to fetch", error);
    let directory = tempfile::tempdir().map_err(made)?;
    let path = directory.path().join("a file, \"quoted\" é 100%&;'$(x).bin");
    std::fs::write(&path, CONTENT).map_err(made)?;
    let Ok(url) = url::Url::from_file_path(&path) else { fail!("expected a path that a URL can express") };
    let request = |sha256| FetchRequest::new(PlannedUrl { url: url.clone(), sha256 });
    let (fetcher, progress) = (rig.backend().fetcher(), Progress::none());
    let promised = request(Some(Digest::of(CONTENT)));
    let requests = [promised.clone(), request(None), promised];
    for fetched in join_all(requests.iter().map(|request| fetcher.fetch(request, &progress))).await {
        let fetched = fetched.during("fetch a file")?;
        expect_equal(&fetched.input.content, &Content::of(CONTENT), "the content of a file")?;
        let read = std::fs::read(&fetched.path).map_err(|error| Error::io("read a fetched file", error))?;
        expect_equal(&read.as_slice(), &CONTENT, "the bytes of a file")?;
    }
    let fetched = fetcher.fetch(&request(Some(wrong())), &progress).await;
    refused(fetched, ErrorKind::ChecksumMismatch, "fetch a file of another digest")?;
    let absent = url::Url::from_file_path(directory.path().join("absent"));
    let Ok(absent) = absent else { fail!("expected a path that a URL can express") };
    let absent = FetchRequest::new(PlannedUrl { url: absent, sha256: None });
    match fetcher.fetch(&absent, &progress).await {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Download) => {}
        other => fail!("a missing file: expected NotFound or Download, but found {other:?}"),
    }
    Ok(())
}

/// A fetched file is not written to while it is held: neither when others fetch it, nor by collecting.
pub async fn a_fetched_file_is_not_changed(rig: &Rig) -> TestResult {
    use std::{io::Read as _, os::unix::fs::MetadataExt as _};
    let content = super::streams::noise(13, 1 << 20);
    let io = |what: &'static str| move |error| Error::io(what, error);
    let source = tempfile::NamedTempFile::new().map_err(io("create a file to fetch"))?;
    std::fs::write(source.path(), &content).map_err(io("create a file to fetch"))?;
    let Ok(url) = url::Url::from_file_path(source.path()) else {
        fail!("expected a path that a URL can express")
    };
    let request = FetchRequest::new(PlannedUrl { url, sha256: None });
    let (fetcher, progress) = (rig.backend().fetcher(), Progress::none());
    let fetched = fetcher.fetch(&request, &progress).await.during("fetch a file")?;
    let mut open = std::fs::File::open(&fetched.path).map_err(io("open a fetched file"))?;
    let written = |file: &std::fs::File| {
        let metadata = file.metadata().map_err(io("read the metadata of a fetched file"))?;
        TestResult::Ok((metadata.len(), metadata.mtime(), metadata.mtime_nsec()))
    };
    let before = written(&open)?;
    let mut read = vec![0; content.len() / 2];
    open.read_exact(&mut read).map_err(io("read a fetched file"))?;
    // Each reads as soon as it has the path, without waiting for the others.
    let readers = (0..8).map(|_| async {
        for _ in 0..4 {
            let fetched = fetcher.fetch(&request, &progress).await.during("fetch a file that others read")?;
            let found = tokio::fs::read(&fetched.path).await.map_err(io("read a fetched file"))?;
            ensure!(
                found == content,
                "expected {} bytes of a fetched file, but found {} or other ones",
                content.len(),
                found.len()
            );
        }
        Ok(())
    });
    join_all(readers).await.into_iter().collect::<TestResult>()?;
    expect_equal(
        &written(&open)?,
        &before,
        "the size and the time of the last change of a file that is open",
    )?;
    open.read_to_end(&mut read).map_err(io("read a fetched file"))?;
    ensure!(read == content, "expected the complete content of an open file, but found other bytes");
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        backend.collect().await.during("collect unused content")?;
    }
    let found = std::fs::read(&fetched.path).map_err(io("read a fetched file after collecting"))?;
    ensure!(found == content, "expected the bytes of a fetched file after collecting, but found other ones");
    Ok(())
}
