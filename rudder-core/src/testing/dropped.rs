//! Futures that are dropped before they complete: whichever method it is and at whatever point, what that leaves is
//! what `destroy` and `reap` remove, and the operation can be repeated.

use super::{
    NotPassed, Rig, TestResult,
    modules::{captured, draft, halted, published, template, whole},
    rig::{BLANK, SSH, eventually, network},
    test_result::{During as _, ensure, expect_equal, fail},
};
use crate::{
    Error, ErrorKind, Result,
    backend::{ImportRequest, Lab, LabInfo, LabSpec, Progress, Retention, Site, SiteFile, Stop},
    capability::Capability,
    fetch::FetchRequest,
    plan::{PlannedSource, PlannedUrl},
};
use std::{collections::BTreeMap, sync::Arc, task::Poll, time::Duration};

/// How often a future is polled before it is dropped. Futures that need more polls are dropped only near their
/// beginning; most need fewer.
const POLL_COUNTS: [usize; 9] = [1, 2, 3, 4, 6, 9, 14, 22, 40];
/// A future that is pending for longer is dropped, however often it was polled.
const PENDING_LIMIT: Duration = Duration::from_millis(300);

/// Polls a future `polls` times, and drops it. Returns its output if it completed before.
async fn cut<F: Future>(future: F, polls: usize) -> Option<F::Output> {
    let mut future = Box::pin(future);
    let mut left = polls;
    let looked = std::future::poll_fn(move |context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
    });
    tokio::time::timeout(PENDING_LIMIT, looked).await.ok().flatten()
}

/// Whether a future completed before it was dropped. An error fails the test: dropping does not excuse it.
fn ended<T>(result: Option<Result<T>>, what: &str) -> TestResult<bool> {
    match result {
        None => Ok(false),
        Some(result) => result.during(what).map(|_| true),
    }
}

/// Runs an operation in fresh labs, dropping it later each time, until it completes; each lab is then destroyed, and
/// nothing may be left.
async fn everywhere<F>(rig: &Rig, what: &str, act: impl Fn(Arc<dyn Lab>, usize) -> F) -> TestResult
where
    F: Future<Output = TestResult<bool>>,
{
    for polls in POLL_COUNTS {
        let lab = rig.lab("cut").await?;
        let is_over = act(Arc::clone(&lab), polls).await.map_err(|problem| problem.at(what, polls))?;
        lab.destroy().await.during("destroy the lab").map_err(|problem| problem.at(what, polls))?;
        drop(lab);
        let left = rig.expect_nothing_left("after the lab was destroyed").await;
        left.map_err(|problem| problem.at(what, polls))?;
        if is_over {
            break;
        }
    }
    Ok(())
}

impl NotPassed {
    /// Adds the point at which a future was dropped.
    fn at(self, what: &str, polls: usize) -> Self {
        match self {
            Self::Failed(why) => Self::Failed(format!("{what}, dropped after {polls} polls: {why}")),
            skipped @ Self::Skipped(_) => skipped,
        }
    }
}

/// Reaps until nothing is left: background work of a dropped future may take a moment to end.
async fn reaped(rig: &Rig, when: &str) -> TestResult {
    eventually(rig.options().settle, || async {
        let report = rig.backend().reap().await.during("reap")?;
        ensure!(report.failed.is_empty(), "reap: expected no failure, but found {:?}", report.failed);
        Ok(rig.left().await?.is_empty())
    })
    .await?;
    rig.expect_nothing_left(when).await
}

/// Opening a lab may be dropped.
pub async fn opening_a_lab_may_be_dropped(rig: &Rig) -> TestResult {
    for polls in POLL_COUNTS {
        let spec = LabSpec::new("cut", network());
        let opened = cut(rig.backend().open_lab(&spec), polls).await;
        let is_over = ended(opened, "open a lab")?;
        reaped(rig, "after opening a lab was dropped, and reaping").await?;
        if is_over {
            break;
        }
    }
    Ok(())
}

/// Opening a lab that stays may be dropped: the lab is then listed and can be removed, or nothing of it is left.
pub async fn opening_a_lab_that_stays_may_be_dropped(rig: &Rig) -> TestResult {
    for polls in POLL_COUNTS {
        let mut spec = LabSpec::new("cut", network());
        spec.retention = Retention::UntilRemoved { expires: None };
        let is_over = ended(cut(rig.backend().open_lab(&spec), polls).await, "open a lab that stays")?;
        remove_kept_labs(rig).await?;
        let left = rig.expect_nothing_left("after opening a lab that stays was dropped").await;
        left.map_err(|problem| problem.at("opening a lab that stays", polls))?;
        if is_over {
            break;
        }
    }
    Ok(())
}

/// Removes kept labs, and reaps others, until nothing is left.
async fn remove_kept_labs(rig: &Rig) -> TestResult {
    eventually(rig.options().settle, || async {
        for lab in kept_labs(rig).await? {
            match rig.backend().remove_lab(&lab.id).await {
                // Its removal had already begun.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Conflict) => {}
                removed => removed.during("remove a kept lab")?,
            }
        }
        rig.backend().reap().await.during("reap")?;
        Ok(rig.left().await?.is_empty())
    })
    .await?;
    Ok(())
}

/// Importing, fetching and serving may be dropped; repeating them works.
pub async fn importing_and_serving_may_be_dropped(rig: &Rig) -> TestResult {
    let mut sources = Vec::new();
    if rig.backend().capabilities().has(Capability::SourceBlank) {
        sources.push((PlannedSource::Blank, Some(BLANK)));
    }
    if let (true, Some(guest)) =
        (rig.backend().capabilities().has(Capability::SourceUrl), rig.adapter().guest())
    {
        sources.push((PlannedSource::Url(guest.image), None));
    }
    for (source, size) in sources {
        let request = &ImportRequest::new("web", "root", source, size);
        everywhere(rig, "importing", |lab, polls| async move {
            let imported = cut(lab.import(request, &Progress::none()), polls).await;
            lab.import(request, &Progress::none()).await.during("import it again")?;
            ended(imported, "import")
        })
        .await?;
    }
    let made = |error| Error::io("create a file to fetch", error);
    let file = tempfile::NamedTempFile::new().map_err(made)?;
    std::fs::write(file.path(), "a file of the suite").map_err(made)?;
    let Ok(url) = url::Url::from_file_path(file.path()) else {
        fail!("expected a path that a URL can express")
    };
    let request = &FetchRequest::new(PlannedUrl { url, sha256: None });
    let fetcher = &rig.backend().fetcher();
    everywhere(rig, "fetching", |_lab, polls| async move {
        let fetched = cut(fetcher.fetch(request, &Progress::none()), polls).await;
        fetcher.fetch(request, &Progress::none()).await.during("fetch it again")?;
        ended(fetched, "fetch")
    })
    .await?;
    if rig.backend().capabilities().has(Capability::HttpDirectory) {
        everywhere(rig, "serving", |lab, polls| async move {
            let files = BTreeMap::from([("a".to_owned(), SiteFile::bytes(*b"a"))]);
            let served = cut(lab.serve(Site::new(files.clone(), |_| {})), polls).await;
            lab.serve(Site::new(files, |_| {})).await.during("serve again")?;
            ended(served, "serve")
        })
        .await?;
    }
    Ok(())
}

/// Defining and starting a machine may be dropped; a machine whose start was dropped is running or not, and may be
/// stopped.
pub async fn starting_a_machine_may_be_dropped(rig: &Rig) -> TestResult {
    everywhere(rig, "defining a machine", |lab, polls| async move {
        let spec = rig.bare(&*lab, "web").await?;
        let created = cut(lab.create_machine(&spec), polls).await;
        rig.machine(&*lab, "other").await?;
        ended(created, "define a machine")
    })
    .await?;
    everywhere(rig, "starting a machine", |lab, polls| async move {
        let machine = rig.machine(&*lab, "web").await?;
        ended(cut(machine.start(), polls).await, "start a machine")
    })
    .await?;
    everywhere(rig, "starting a machine, then stopped", |lab, polls| async move {
        let machine = rig.machine(&*lab, "web").await?;
        let started = cut(machine.start(), polls).await;
        match machine.stop(Stop::Kill).await {
            Err(error) if error.kind() == ErrorKind::Conflict && started.is_none() => {}
            stopped => drop(stopped.during("stop a machine whose start was dropped")?),
        }
        ended(started, "start a machine")
    })
    .await
}

/// Waiting and stopping may be dropped; repeating them returns how the machine ended.
pub async fn waiting_and_stopping_may_be_dropped(rig: &Rig) -> TestResult {
    everywhere(rig, "waiting", |lab, polls| async move {
        let machine = rig.running(&*lab, "web").await?;
        let waited = cut(machine.wait(), polls).await;
        ensure!(waited.is_none(), "expected a running machine not to have ended, but found {waited:?}");
        let exit = machine.stop(Stop::Kill).await.during("stop the machine")?;
        expect_equal(&machine.wait().await.during("wait again")?, &exit, "its exit")?;
        Ok(false)
    })
    .await?;
    for how in [Stop::Kill, Stop::Graceful { limit: Duration::from_secs(600) }] {
        everywhere(rig, "stopping", |lab, polls| async move {
            let machine = rig.running(&*lab, "web").await?;
            let stopped = cut(machine.stop(how), polls).await;
            let again = tokio::time::timeout(Duration::from_secs(30), machine.stop(Stop::Kill)).await;
            let Ok(again) = again else { fail!("expected a machine to be killed within 30 s, but it runs") };
            let exit = again.during("stop it again")?;
            expect_equal(&machine.wait().await.during("wait for it")?, &exit, "its exit")?;
            ended(stopped, "stop a machine")
        })
        .await?;
    }
    Ok(())
}

/// Connecting to a machine in every way, and taking a screenshot, may be dropped; the next connection works.
pub async fn connecting_may_be_dropped(rig: &Rig) -> TestResult {
    let lab = rig.lab("cut").await?;
    let machine = rig.running(&*lab, "web").await?;
    let has = |capability| rig.backend().capabilities().has(capability);
    for polls in POLL_COUNTS {
        let at = |problem: NotPassed| problem.at("connecting", polls);
        // No process listens in the guest, so an error is accepted.
        drop(cut(machine.dial(SSH), polls).await);
        if has(Capability::Display) {
            ended(cut(machine.display(), polls).await, "connect to the display").map_err(at)?;
        }
        if has(Capability::Serial) {
            ended(cut(machine.serial(), polls).await, "connect to the serial console").map_err(at)?;
            let tail = cut(machine.serial_tail(100), polls).await;
            ended(tail, "read the end of the serial console").map_err(at)?;
        }
        if has(Capability::Screenshot) {
            ended(cut(machine.screenshot(), polls).await, "take a screenshot").map_err(at)?;
        }
    }
    if has(Capability::Display) {
        machine.display().await.during("connect to the display afterwards")?;
    }
    if has(Capability::Serial) {
        machine.serial().await.during("connect to the serial console afterwards")?;
    }
    if has(Capability::Screenshot) {
        machine.screenshot().await.during("take a screenshot afterwards")?;
    }
    let waited = tokio::time::timeout(Duration::from_millis(100), machine.wait()).await;
    ensure!(waited.is_err(), "expected the machine to keep running, but found {waited:?}");
    lab.destroy().await.during("destroy the lab")
}

/// Capturing a disk, and the machine's state outside its disks, may be dropped; repeating it works.
pub async fn capturing_may_be_dropped(rig: &Rig) -> TestResult {
    everywhere(rig, "capturing a disk", |lab, polls| async move {
        let machine = halted(rig, &*lab, "web").await?;
        let taken = cut(machine.capture("root", &Progress::none()), polls).await;
        captured(&*machine).await?;
        ended(taken, "capture a disk")
    })
    .await?;
    everywhere(rig, "capturing state", |lab, polls| async move {
        let machine = halted(rig, &*lab, "web").await?;
        let taken = cut(machine.capture_state(), polls).await;
        machine.capture_state().await.during("capture state again")?;
        ended(taken, "capture state")
    })
    .await
}

/// Publishing over an existing module may be dropped: afterwards the module is the old or the new one, complete.
pub async fn publishing_may_be_dropped(rig: &Rig) -> TestResult {
    for polls in POLL_COUNTS {
        let at = |problem: NotPassed| problem.at("publishing", polls);
        let lab = rig.lab("old").await?;
        let old = published(rig, &*lab, "base").await?;
        lab.destroy().await.during("destroy the lab of the old module")?;
        drop(lab);
        let lab = rig.lab("new").await?;
        let machine = halted(rig, &*lab, "db").await?;
        let wanted = draft("base", vec![template("db", vec![captured(&*machine).await?])]);
        let is_over = ended(cut(lab.publish(wanted), polls).await, "publish").map_err(at)?;
        lab.destroy().await.during("destroy the lab").map_err(at)?;
        drop((machine, lab));
        let mut modules = rig.backend().modules().await.during("list modules").map_err(at)?;
        loop {
            ensure!(modules.len() == 1, "after {polls} polls: expected one module, but found {modules:?}");
            let module = &modules[0];
            let is_new = module.machines[0].name == "db";
            ensure!(
                is_new || (module.digest == old.digest && !is_over),
                "after {polls} polls: expected the old module or the new one, but found {module:?}"
            );
            let read = whole(module).await;
            let now = rig.backend().modules().await.during("list modules").map_err(at)?;
            // Background work of the dropped future may replace the old module while it is read.
            if read.is_ok() || is_new || now.first().is_some_and(|now| now.digest == module.digest) {
                read.map_err(at)?;
                break;
            }
            modules = now;
        }
        // Background work of the dropped future may have ended only now.
        eventually(rig.options().settle, || async {
            rig.backend().reap().await.during("reap")?;
            match rig.backend().remove_module("base").await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed => removed.during("remove the module")?,
            }
            Ok(rig.left().await?.is_empty() && rig.backend().modules().await.during("list")?.is_empty())
        })
        .await?;
        rig.expect_nothing_left("after publishing was dropped").await.map_err(at)?;
        if is_over {
            break;
        }
    }
    Ok(())
}

/// Destroying a lab may be dropped, whether it is repeated or the lab is dropped.
pub async fn destroying_may_be_dropped(rig: &Rig) -> TestResult {
    everywhere(rig, "destroying", |lab, polls| async move {
        rig.running(&*lab, "web").await?;
        ended(cut(lab.destroy(), polls).await, "destroy a lab")
    })
    .await?;
    for polls in POLL_COUNTS {
        let lab = rig.lab("cut").await?;
        rig.running(&*lab, "web").await?;
        let is_over = ended(cut(lab.destroy(), polls).await, "destroy a lab")?;
        drop(lab);
        let left = reaped(rig, "after destroying a lab was dropped, and reaping").await;
        left.map_err(|problem| problem.at("destroying, then leaking the lab", polls))?;
        if is_over {
            break;
        }
    }
    Ok(())
}

async fn kept_labs(rig: &Rig) -> TestResult<Vec<LabInfo>> {
    let labs = rig.backend().labs().await.during("list labs")?;
    Ok(labs.into_iter().filter(LabInfo::is_kept).collect())
}

/// Keeping a lab, and removing a kept one, may be dropped.
pub async fn keeping_may_be_dropped(rig: &Rig) -> TestResult {
    for polls in POLL_COUNTS {
        let mut spec = LabSpec::new("kept", network());
        spec.retention = Retention::MayBeKept;
        let lab = rig.backend().open_lab(&spec).await.during("open a lab")?;
        rig.running(&*lab, "web").await?;
        let kept = ended(cut(lab.keep(None), polls).await, "keep a lab")?;
        drop(lab);
        let mut removed = false;
        // A lab that is in the list is removed, in two attempts; any other is reaped.
        for lab in kept_labs(rig).await? {
            removed = ended(cut(rig.backend().remove_lab(&lab.id), polls).await, "remove a kept lab")?;
        }
        remove_kept_labs(rig).await?;
        let left = rig.expect_nothing_left("after keeping and removing were dropped").await;
        left.map_err(|problem| problem.at("keeping", polls))?;
        if kept && removed {
            break;
        }
    }
    Ok(())
}

/// The maintenance of a backend may be dropped: diagnosing, listing, removing a module, reaping, collecting.
pub async fn maintaining_a_backend_may_be_dropped(rig: &Rig) -> TestResult {
    let backend = rig.backend();
    for polls in POLL_COUNTS {
        let at = |problem: NotPassed| problem.at("maintaining the backend", polls);
        let lab = rig.lab("cut").await?;
        published(rig, &*lab, "base").await?;
        drop(lab);
        let mut is_over = ended(cut(backend.diagnose(), polls).await, "diagnose").map_err(at)?;
        is_over &= ended(cut(backend.modules(), polls).await, "list modules").map_err(at)?;
        is_over &= ended(cut(backend.labs(), polls).await, "list labs").map_err(at)?;
        is_over &= ended(cut(backend.reap(), polls).await, "reap").map_err(at)?;
        is_over &= ended(cut(backend.collect(), polls).await, "collect").map_err(at)?;
        let modules = backend.modules().await.during("list modules").map_err(at)?;
        ensure!(modules.len() == 1, "after {polls} polls: expected the module, but found {modules:?}");
        whole(&modules[0]).await.map_err(at)?;
        is_over &= ended(cut(backend.remove_module("base"), polls).await, "remove a module").map_err(at)?;
        for module in backend.modules().await.during("list modules").map_err(at)? {
            let Err(problem) = whole(&module).await else { continue };
            // Work that was begun may continue after its future was dropped, and remove the module at this moment.
            let modules = backend.modules().await.during("list modules").map_err(at)?;
            if modules.iter().any(|found| found.name == module.name) {
                return Err(at(problem));
            }
        }
        eventually(rig.options().settle, || async {
            match backend.remove_module("base").await {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed => removed.during("remove the module")?,
            }
            backend.reap().await.during("reap")?;
            Ok(rig.left().await?.is_empty())
        })
        .await?;
        rig.expect_nothing_left("after removing and reaping were dropped").await.map_err(at)?;
        if is_over {
            break;
        }
    }
    Ok(())
}
