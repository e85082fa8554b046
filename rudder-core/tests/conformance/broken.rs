//! The memory backend, broken in one way.

use async_trait::async_trait;
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        Backend, BoxedStream, Exit, FetchRequest, Fetched, HostReport, ImportRequest, Imported, KeptLab, Lab,
        LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, ReapReport, Seed, Served, Site, Stop,
        Volume,
    },
    capability::{Capabilities, Capability},
    module::{CapturedDisk, CapturedState, Module},
    plan::PlannedSource,
    testing::{Adapter, BadImages, GuestImage, MemoryAdapter, Owners},
};
use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A way of being wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// The death of a machine is told long after.
    SeesDeathLate,
    /// `reap` takes what living owners have.
    ReapsTheLiving,
    /// A lab cannot be destroyed again.
    DestroysOnce,
    /// Opening a lab leaves it for good when it is dropped in the middle.
    LeaksWhenDropped,
    /// Ending one half of a connection ends the other.
    ClosesBothHalves,
    /// A bit of the second mebibyte of a connection is wrong.
    FlipsABit,
    /// Images are not compared with what was promised of them.
    BelievesAnyDigest,
    /// Whoever imports the same image gets the same volume.
    SharesVolumes,
    /// Machines that are created at once get the same seed.
    MixesSeeds,
    /// Machines of the same name are stopped together, whatever their lab.
    MixesLabsUp,
    /// A running machine may be started.
    StartsTwice,
    /// Of each VM, one disk is published.
    PublishesParts,
    /// The serial console is for one.
    HasOneReader,
    /// A closed port is an error of an unknown kind.
    CannotSayRefused,
    /// What it does not like in a name is left out.
    CleansNames,
    /// It claims what it cannot do.
    ClaimsTooMuch,
    /// The host lacks something.
    IsNotReady,
}

#[derive(Debug)]
pub(crate) struct BrokenAdapter {
    good: MemoryAdapter,
    broken: Arc<Broken>,
}

impl BrokenAdapter {
    pub(crate) fn new(wrong: Wrong) -> Self {
        let good = MemoryAdapter::new();
        let inner = good.backend();
        let claims = inner.capabilities().iter();
        let extra = (wrong == Wrong::ClaimsTooMuch).then_some(Capability::SourcePvc);
        let capabilities = Capabilities::new("memory", claims.chain(extra));
        let shared = Arc::new(Shared::new(wrong));
        Self { good, broken: Arc::new(Broken { inner, capabilities, shared }) }
    }
}

#[async_trait]
impl Adapter for BrokenAdapter {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.broken) as Arc<dyn Backend>
    }

    async fn another(&self) -> Result<Arc<dyn Backend>> {
        Ok(self.backend())
    }

    async fn traces(&self) -> Result<Vec<String>> {
        self.good.traces().await
    }

    async fn kill(&self, lab: &LabId, machine: &str) -> Result<()> {
        self.good.kill(lab, machine).await
    }

    fn guest(&self) -> Option<GuestImage> {
        self.good.guest()
    }

    fn bad_images(&self) -> Option<BadImages> {
        self.good.bad_images()
    }

    fn owners(&self) -> Owners {
        self.good.owners()
    }
}

/// What the parts of a broken backend share.
#[derive(Debug)]
struct Shared {
    wrong: Wrong,
    /// Labs that are being opened.
    opening: Mutex<Vec<Arc<dyn Lab>>>,
    labs: Mutex<Vec<Weak<dyn Lab>>>,
    machines: Mutex<Vec<Weak<dyn Machine>>>,
    /// The volume of each image.
    volumes: Mutex<BTreeMap<String, Volume>>,
    /// The seed of the machine that was asked for last.
    seed: Mutex<Option<Seed>>,
}

impl Shared {
    fn new(wrong: Wrong) -> Self {
        Self {
            wrong,
            opening: Mutex::default(),
            labs: Mutex::default(),
            machines: Mutex::default(),
            volumes: Mutex::default(),
            seed: Mutex::default(),
        }
    }

    fn is(&self, wrong: Wrong) -> bool {
        self.wrong == wrong
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Broken {
    inner: Arc<dyn Backend>,
    capabilities: Capabilities,
    shared: Arc<Shared>,
}

#[async_trait]
impl Backend for Broken {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn diagnose(&self) -> Result<HostReport> {
        let mut report = self.inner.diagnose().await?;
        if self.shared.is(Wrong::IsNotReady) {
            for finding in &mut report.findings {
                finding.present = false;
                finding.detail = "it is broken".to_owned();
            }
        }
        Ok(report)
    }

    async fn open_lab(&self, spec: &LabSpec) -> Result<Arc<dyn Lab>> {
        let inner = self.inner.open_lab(spec).await?;
        if self.shared.is(Wrong::LeaksWhenDropped) {
            lock(&self.shared.opening).push(Arc::clone(&inner));
            tokio::task::yield_now().await;
            lock(&self.shared.opening).pop();
        }
        lock(&self.shared.labs).push(Arc::downgrade(&inner));
        Ok(Arc::new(BrokenLab { inner, shared: Arc::clone(&self.shared), destroyed: AtomicBool::new(false) }))
    }

    async fn modules(&self) -> Result<Vec<Module>> {
        self.inner.modules().await
    }

    async fn remove_module(&self, name: &str) -> Result<()> {
        self.inner.remove_module(name).await
    }

    async fn kept_labs(&self) -> Result<Vec<KeptLab>> {
        self.inner.kept_labs().await
    }

    async fn remove_lab(&self, id: &LabId) -> Result<()> {
        self.inner.remove_lab(id).await
    }

    async fn reap(&self) -> Result<ReapReport> {
        let mut report = self.inner.reap().await?;
        if self.shared.is(Wrong::ReapsTheLiving) {
            let living: Vec<_> = lock(&self.shared.labs).iter().filter_map(Weak::upgrade).collect();
            for lab in living {
                lab.destroy().await?;
                report.removed.push(format!("lab {}", lab.id()));
            }
        }
        Ok(report)
    }

    async fn collect(&self) -> Result<ReapReport> {
        self.inner.collect().await
    }
}

#[derive(Debug)]
struct BrokenLab {
    inner: Arc<dyn Lab>,
    shared: Arc<Shared>,
    destroyed: AtomicBool,
}

#[async_trait]
impl Lab for BrokenLab {
    fn id(&self) -> &LabId {
        self.inner.id()
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.inner.versions()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        let mut request = request.clone();
        if let (PlannedSource::Url(url), true) =
            (&mut request.source, self.shared.is(Wrong::BelievesAnyDigest))
        {
            url.sha256 = None;
        }
        let mut imported = self.inner.import(&request, progress).await?;
        if let (PlannedSource::Url(url), true) = (&request.source, self.shared.is(Wrong::SharesVolumes)) {
            let key = format!("{} {} {:?}", self.inner.id(), url.url, request.size);
            imported.volume = lock(&self.shared.volumes).entry(key).or_insert(imported.volume).clone();
        }
        Ok(imported)
    }

    async fn fetch(&self, request: &FetchRequest, progress: &Progress) -> Result<Fetched> {
        self.inner.fetch(request, progress).await
    }

    async fn serve(&self, site: Site) -> Result<Served> {
        self.inner.serve(site).await
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let mut spec = spec.clone();
        if self.shared.is(Wrong::CleansNames) {
            spec.name.retain(|character| character.is_ascii_alphanumeric());
        }
        if self.shared.is(Wrong::MixesSeeds) {
            lock(&self.shared.seed).clone_from(&spec.seed);
            tokio::time::sleep(Duration::from_millis(20)).await;
            spec.seed.clone_from(&lock(&self.shared.seed));
        }
        let inner = self.inner.create_machine(&spec).await?;
        lock(&self.shared.machines).push(Arc::downgrade(&inner));
        let (shared, readers) = (Arc::clone(&self.shared), Arc::default());
        Ok(Arc::new(BrokenMachine { inner, shared, readers }))
    }

    async fn publish(&self, mut draft: ModuleDraft) -> Result<Module> {
        if self.shared.is(Wrong::PublishesParts) {
            for machine in &mut draft.machines {
                machine.disks.truncate(1);
            }
        }
        self.inner.publish(draft).await
    }

    async fn keep(&self) -> Result<KeptLab> {
        self.inner.keep().await
    }

    async fn destroy(&self) -> Result<()> {
        let again = self.destroyed.swap(true, Ordering::SeqCst);
        if again && self.shared.is(Wrong::DestroysOnce) {
            return Err(Error::new(ErrorKind::NotFound, "there is no such lab"));
        }
        self.inner.destroy().await
    }
}

#[derive(Debug)]
struct BrokenMachine {
    inner: Arc<dyn Machine>,
    shared: Arc<Shared>,
    /// Held by everybody who reads the serial console.
    readers: Arc<()>,
}

#[async_trait]
impl Machine for BrokenMachine {
    fn name(&self) -> &str {
        self.inner.name()
    }

    async fn start(&self) -> Result<()> {
        match self.inner.start().await {
            Err(error) if error.kind() == ErrorKind::Conflict && self.shared.is(Wrong::StartsTwice) => Ok(()),
            started => started,
        }
    }

    async fn wait(&self) -> Result<Exit> {
        let exit = self.inner.wait().await?;
        if let (Exit::Died { .. }, true) = (&exit, self.shared.is(Wrong::SeesDeathLate)) {
            tokio::time::sleep(Duration::from_secs(8)).await;
        }
        Ok(exit)
    }

    async fn stop(&self, how: Stop) -> Result<Exit> {
        if self.shared.is(Wrong::MixesLabsUp) {
            let all: Vec<_> = lock(&self.shared.machines).iter().filter_map(Weak::upgrade).collect();
            for machine in all.iter().filter(|machine| machine.name() == self.inner.name()) {
                // One that was never started cannot be stopped.
                let _ = machine.stop(how).await;
            }
        }
        self.inner.stop(how).await
    }

    async fn dial(&self, port: u16) -> Result<BoxedStream> {
        let stream = self.inner.dial(port).await.map_err(|error| {
            let unclear = port == 9 && self.shared.is(Wrong::CannotSayRefused);
            if unclear { Error::new(ErrorKind::Internal, "it did not work") } else { error }
        })?;
        let (shared, hold) = (Arc::clone(&self.shared), None);
        Ok(Box::new(Crooked { inner: Some(stream), shared, read: 0, _hold: hold }))
    }

    async fn display(&self) -> Result<BoxedStream> {
        self.inner.display().await
    }

    async fn serial(&self) -> Result<BoxedStream> {
        if self.shared.is(Wrong::HasOneReader) && Arc::strong_count(&self.readers) > 1 {
            return Err(Error::new(ErrorKind::Conflict, "somebody reads the serial console"));
        }
        let hold = Some(Arc::clone(&self.readers));
        let stream = self.inner.serial().await?;
        Ok(Box::new(Crooked { inner: Some(stream), shared: Arc::clone(&self.shared), read: 0, _hold: hold }))
    }

    async fn serial_tail(&self, limit: usize) -> Result<Vec<u8>> {
        self.inner.serial_tail(limit).await
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        self.inner.screenshot().await
    }

    fn access(&self) -> Vec<String> {
        self.inner.access()
    }

    async fn capture(&self, disk: &str, progress: &Progress) -> Result<CapturedDisk> {
        self.inner.capture(disk, progress).await
    }

    async fn capture_state(&self) -> Result<Vec<CapturedState>> {
        self.inner.capture_state().await
    }
}

/// A connection that may be wrong.
struct Crooked {
    /// `None` once it is closed.
    inner: Option<BoxedStream>,
    shared: Arc<Shared>,
    /// Bytes that were read.
    read: usize,
    _hold: Option<Arc<()>>,
}

/// The byte that is wrong.
const WRONG_BYTE: usize = (1 << 20) + 7;

fn closed() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncRead for Crooked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(Ok(())) };
        let before = buffer.filled().len();
        ready!(Pin::new(inner).poll_read(context, buffer))?;
        let bytes = &mut buffer.filled_mut()[before..];
        let count = bytes.len();
        if let (Some(place), true) = (WRONG_BYTE.checked_sub(self.read), self.shared.is(Wrong::FlipsABit))
            && let Some(byte) = bytes.get_mut(place)
        {
            *byte ^= 1;
        }
        self.read += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Crooked {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_write(context, bytes),
            None => Poll::Ready(Err(closed())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_flush(context),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shared.is(Wrong::ClosesBothHalves) {
            self.inner = None;
        }
        match &mut self.inner {
            Some(inner) => Pin::new(inner).poll_shutdown(context),
            None => Poll::Ready(Ok(())),
        }
    }
}
