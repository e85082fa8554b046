//! Labs that outlive their owner: kept for inspection, or opened to stay. Another process lists, attaches to and removes them;
//! those that have expired are reaped.

use super::{
    Rig, TestResult,
    consoles::until,
    guest::{Booted, Prepared},
    owners::{Owned, STAYS, STAYS_WITH_A_GUEST},
    rig::{BLANK, SSH, eventually, network},
    streams::greeted,
    test_result::{During as _, ensure, expect_equal, fail, refused},
};
use crate::{
    ErrorKind,
    backend::{
        Exit, ImportRequest, Lab, LabId, LabInfo, LabSpec, LabState, Machine, Progress, Retention, Stop,
    },
    capability::Capability,
    guest::{BuildKey, Login},
    plan::PlannedSource,
    secret::Secret,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::io::AsyncReadExt as _;

/// The name of the labs that stay.
const NAME: &str = "stays";
/// The file of the lab with the key to its guest.
const KEY: &str = "login.key";
/// How long a display may take to send its greeting, on a slow host.
const GREETED_WITHIN: Duration = Duration::from_secs(60);
/// How long a machine that must run on is watched.
const WATCHED: Duration = Duration::from_millis(200);

fn spec(name: &str, retention: Retention) -> LabSpec {
    let mut spec = LabSpec::new(name, network());
    spec.retention = retention;
    spec
}

/// Opens a lab that stays, with a running machine.
pub(super) async fn stay(rig: &Rig) -> TestResult<Arc<dyn Lab>> {
    let spec = spec(NAME, Retention::UntilRemoved { expires: None });
    let lab = rig.backend().open_lab(&spec).await.during("open a lab that stays")?;
    rig.running(&*lab, "web").await?;
    Ok(lab)
}

/// Opens a lab that stays, with a guest that has booted, and stores the key to it.
pub(super) async fn stay_with_a_guest(rig: &Rig) -> TestResult<Arc<dyn Lab>> {
    let spec = spec(NAME, Retention::UntilRemoved { expires: None });
    let lab = rig.backend().open_lab(&spec).await.during("open a lab that stays")?;
    let prepared = Prepared::new(rig, &*lab, "web", None).await?;
    let key = prepared.key.to_openssh().during("encode the key")?;
    lab.store_file(KEY, key.expose().as_bytes()).await.during("store the key with the lab")?;
    let booted = prepared.boot(rig, Arc::clone(&lab)).await?;
    drop(booted);
    Ok(lab)
}

async fn found(backend: &dyn crate::backend::Backend, id: &LabId) -> TestResult<Option<LabInfo>> {
    let labs = backend.labs().await.during("list labs")?;
    ensure!(labs.is_sorted_by(|a, b| a.id < b.id), "expected labs sorted by id, but found {labs:?}");
    Ok(labs.into_iter().find(|lab| lab.id == *id))
}

/// Returns the only machine of a lab, which is called `web`.
async fn only_machine(lab: &dyn Lab) -> TestResult<Arc<dyn Machine>> {
    let mut machines = lab.machines().await.during("list the machines of the lab")?;
    let names: Vec<&str> = machines.iter().map(|machine| machine.name()).collect();
    expect_equal(&names, &vec!["web"], "the machines of the lab")?;
    match machines.pop() {
        Some(machine) => Ok(machine),
        None => fail!("expected a machine, but found none"),
    }
}

async fn runs_on(machine: &dyn Machine, when: &str) -> TestResult {
    let waited = tokio::time::timeout(WATCHED, machine.wait()).await;
    ensure!(waited.is_err(), "expected the machine to run on {when}, but found {waited:?}");
    Ok(())
}

/// A lab that stays outlives its owner. Another process finds it, attaches, connects to its consoles, stops and starts its machine,
/// detaches without an effect, and destroys it.
pub async fn a_lab_that_stays_is_attached_by_another_process(rig: &Rig) -> TestResult {
    let owned = Owned::of_a_lab_that_stays(rig, STAYS).await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    let id = owned.die().await?;
    for backend in [rig.backend(), &*another] {
        backend.reap().await.during("reap")?;
        let kept = Some(LabInfo::new(id.clone(), NAME, LabState::Kept { expires: None }));
        expect_equal(&found(backend, &id).await?, &kept, "the lab in the list")?;
    }
    ensure!(
        rig.adapter().is_running(&id, "web").await?,
        "expected the machine to run on after its owner died"
    );

    let lab = another.attach(&id).await.during("attach to the lab")?;
    expect_equal(lab.id(), &id, "the id of the attached lab")?;
    let machine = only_machine(&*lab).await?;
    runs_on(&*machine, "after another process attached").await?;
    refused(machine.start().await, ErrorKind::Conflict, "start the machine, which is running")?;
    let has = |capability| rig.backend().capabilities().has(capability);
    if has(Capability::Serial) {
        machine.serial().await.during("connect to the serial console")?;
        machine.serial_tail(100).await.during("read the serial log")?;
    }
    if has(Capability::Display) {
        let mut display = machine.display().await.during("connect to the display")?;
        let mut greeting = [0; 4];
        let read = tokio::time::timeout(GREETED_WITHIN, display.read_exact(&mut greeting)).await;
        ensure!(
            matches!(read, Ok(Ok(_))) && greeting == *b"RFB ",
            "expected RFB, but found {greeting:?} ({read:?})"
        );
    }
    if has(Capability::Screenshot) {
        machine.screenshot().await.during("take a screenshot")?;
    }
    drop((machine, lab));
    another.reap().await.during("reap after detaching")?;
    ensure!(rig.adapter().is_running(&id, "web").await?, "expected the machine to run on after detaching");

    let lab = eventually_attached(rig, &id).await?;
    let machine = only_machine(&*lab).await?;
    let exit = machine.stop(Stop::Kill).await.during("stop the machine")?;
    ensure!(matches!(exit, Exit::Killed { .. }), "expected Killed, but found {exit:?}");
    expect_equal(&machine.wait().await.during("wait for the machine")?, &exit, "its exit")?;
    // Whether the lab may grow or not, its machines stay as they are.
    let request = ImportRequest::new("other", "root", PlannedSource::Blank, Some(BLANK));
    match lab.import(&request, &Progress::none()).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        imported => drop(imported.during("import a disk into an attached lab")?),
    }
    machine.start().await.during("start the machine again")?;
    runs_on(&*machine, "after it was started again").await?;
    machine.stop(Stop::Kill).await.during("stop the machine again")?;
    lab.destroy().await.during("destroy the lab")?;
    drop((machine, lab));
    rig.expect_nothing_left("after an attached lab was destroyed").await?;
    refused(another.attach(&id).await, ErrorKind::NotFound, "attach to a lab that was destroyed")?;
    expect_equal(&found(rig.backend(), &id).await?, &None, "the lab in the list")
}

/// Attaches to a lab that this process has just detached from.
async fn eventually_attached(rig: &Rig, id: &LabId) -> TestResult<Arc<dyn Lab>> {
    let attached = std::sync::Mutex::new(None);
    eventually(rig.options().settle, || async {
        match rig.backend().attach(id).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(false),
            lab => {
                let lab = lab.during("attach to the lab again")?;
                *attached.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(lab);
                Ok(true)
            }
        }
    })
    .await?;
    match attached.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(lab) => Ok(lab),
        None => fail!("expected to attach to lab {id}"),
    }
}

/// Another process logs in to the guest of a lab that stays, and shuts it down.
pub async fn a_guest_is_reached_in_an_attached_lab(rig: &Rig) -> TestResult {
    let image = rig.image()?;
    let owned = Owned::of_a_lab_that_stays(rig, STAYS_WITH_A_GUEST).await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    let id = owned.die().await?;
    let key = another.lab_file(&id, KEY).await.during("read the key that is stored with the lab")?;
    let key = String::from_utf8(key.unwrap_or_default()).unwrap_or_default();
    let login = Login::new(Prepared::USER, BuildKey::import(&Secret::new(key)).during("read the key")?);
    let lab = another.attach(&id).await.during("attach to the lab")?;
    let machine = only_machine(&*lab).await?;
    greeted(&*machine, SSH, image.boots_within).await?;
    let guest = Booted::log_in(rig, Arc::clone(&lab), Arc::clone(&machine), login).await?;
    guest.run("true").await?;
    if rig.backend().capabilities().has(Capability::Serial) {
        let mut serial = machine.serial().await.during("connect to the serial console")?;
        guest.run("echo after-attaching >/dev/ttyS0").await?;
        until(&mut serial, "after-attaching", "the process that attached").await?;
    }
    let exit =
        machine.stop(Stop::Graceful { limit: image.boots_within }).await.during("shut the guest down")?;
    expect_equal(&exit, &Exit::PoweredOff, "how the guest ended")?;
    lab.destroy().await.during("destroy the lab")?;
    drop((guest, machine, lab));
    rig.expect_nothing_left("after an attached lab was destroyed").await
}

/// A lab that was kept outlives its owner, its machines continue to run, and it is removed by its id, once.
pub async fn a_kept_lab_stays_until_it_is_removed(rig: &Rig) -> TestResult {
    let ends = rig.lab("ends").await?;
    refused(
        ends.keep(None).await,
        ErrorKind::InvalidInput,
        "keep a lab that was opened to end with its owner",
    )?;
    ends.destroy().await.during("destroy it")?;
    let spec = spec("kept", Retention::MayBeKept);
    let lab = rig.backend().open_lab(&spec).await.during("open a lab that may be kept")?;
    let machine = rig.running(&*lab, "web").await?;
    let owned = found(rig.backend(), &spec.id).await?.map(|lab| lab.state);
    expect_equal(&owned, &Some(LabState::Owned), "the state of a lab that was not kept yet")?;
    for _ in 0..2 {
        lab.keep(None).await.during("keep a lab, also twice")?;
    }
    ensure!(
        !machine.access().is_empty(),
        "expected how to access a machine of a kept lab, but found nothing"
    );
    drop((machine, lab));
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        backend.reap().await.during("reap")?;
        let kept = Some(LabInfo::new(spec.id.clone(), "kept", LabState::Kept { expires: None }));
        expect_equal(&found(backend, &spec.id).await?, &kept, "the kept lab in the list")?;
    }
    let traces = rig.left().await?;
    ensure!(
        traces.iter().any(|line| line.contains(spec.id.as_str())),
        "expected the kept lab to exist after its owner ended, but found only {traces:?}"
    );
    refused(rig.backend().open_lab(&spec).await, ErrorKind::Conflict, "open a lab of the id of a kept one")?;
    rig.adapter().kill(&spec.id, "web").await.during("find the machine of the kept lab running")?;
    another.remove_lab(&spec.id).await.during("remove a kept lab")?;
    rig.expect_nothing_left("after a kept lab was removed").await?;
    refused(rig.backend().remove_lab(&spec.id).await, ErrorKind::NotFound, "remove it again")?;
    let lab = rig.backend().open_lab(&spec).await.during("open a lab of the same id")?;
    let machine = rig.running(&*lab, "web").await?;
    lab.keep(None).await.during("keep it")?;
    lab.destroy().await.during("destroy a lab that was kept")?;
    let exit = machine.wait().await.during("wait for its machine")?;
    ensure!(matches!(exit, Exit::Killed { .. }), "expected Killed, but found {exit:?}");
    expect_equal(&found(rig.backend(), &spec.id).await?, &None, "the lab in the list after it was destroyed")
}

/// A kept lab that has expired is reaped, with its machines, even while the process that opened it lives; one that has not expired,
/// or never does, is not.
pub async fn an_expired_lab_is_reaped_and_no_other(rig: &Rig) -> TestResult {
    let (now, later) = (SystemTime::now(), SystemTime::now() + Duration::from_secs(3600));
    let open = async |name: &str, expires| {
        let spec = spec(name, Retention::UntilRemoved { expires });
        rig.backend().open_lab(&spec).await.during("open a lab that stays")
    };
    let (never, unexpired, expired) =
        (open("never", None).await?, open("later", Some(later)).await?, open("now", Some(later)).await?);
    let machine = rig.running(&*unexpired, "web").await?;
    let doomed = rig.running(&*expired, "web").await?;
    expired.keep(Some(now)).await.during("let a lab expire now")?;
    let state = found(rig.backend(), unexpired.id()).await?.map(|lab| lab.state);
    let Some(LabState::Kept { expires: Some(reported) }) = state else {
        fail!("expected a kept lab that expires, but found {state:?}")
    };
    let off = reported.duration_since(later).or_else(|_| later.duration_since(reported)).unwrap_or_default();
    ensure!(off < Duration::from_secs(1), "expected the lab to expire {off:?} earlier or later");
    expect_equal(
        &found(rig.backend(), expired.id()).await?.map(|lab| lab.state),
        &Some(LabState::Abandoned),
        "the state of a lab that has expired",
    )?;
    refused(
        rig.backend().attach(expired.id()).await,
        ErrorKind::Conflict,
        "attach to a lab that has expired",
    )?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    eventually(rig.options().settle, || async {
        let report = another.reap().await.during("reap")?;
        ensure!(report.failed.is_empty(), "reap: expected no failure, but found {:?}", report.failed);
        Ok(found(rig.backend(), expired.id()).await?.is_none())
    })
    .await?;
    ensure!(
        !rig.adapter().is_running(expired.id(), "web").await?,
        "expected the machine of a lab that has expired to be gone"
    );
    let exit = tokio::time::timeout(rig.options().settle, doomed.wait()).await;
    ensure!(
        matches!(exit, Ok(Ok(_))),
        "expected the machine of a lab that has expired to have ended, but found {exit:?}"
    );
    runs_on(&*machine, "in a lab that has not expired").await?;
    for lab in [&never, &unexpired] {
        ensure!(
            found(rig.backend(), lab.id()).await?.is_some(),
            "expected lab {} to stay, but it is gone",
            lab.id()
        );
        another.remove_lab(lab.id()).await.during("remove a lab that has not expired")?;
    }
    drop((machine, doomed, never, unexpired, expired));
    rig.expect_nothing_left("after labs that stay were reaped and removed").await
}

/// Files are stored with a lab, replaced, read by other processes, and removed with the lab.
pub async fn files_are_stored_with_a_lab(rig: &Rig) -> TestResult {
    let lab = rig.lab("files").await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    let read = async |name: &str| another.lab_file(lab.id(), name).await.during("read a file of the lab");
    expect_equal(&read("login.key").await?, &None, "a file that was not stored")?;
    for content in [b"first".as_slice(), b"", &[0, 255, 10].repeat(10_000)] {
        let path = lab.store_file("login.key", content).await.during("store a file with the lab")?;
        expect_equal(&read("login.key").await?.as_deref(), &Some(content), "the stored file")?;
        if let Some(path) = path {
            let found =
                std::fs::read(&path).map_err(|error| crate::Error::io("read the file by its path", error))?;
            expect_equal(&found.as_slice(), &content, "the stored file at its path")?;
        }
    }
    for name in ["", "../escape", "UPPER", "a/b"] {
        refused(
            lab.store_file(name, b"").await,
            ErrorKind::InvalidInput,
            "store a file under a name that is not allowed",
        )?;
    }
    refused(
        lab.store_file("large", &[0; 100_000]).await,
        ErrorKind::InvalidInput,
        "store a file that is too large",
    )?;
    lab.destroy().await.during("destroy the lab")?;
    refused(lab.store_file("late", b"").await, ErrorKind::Conflict, "store a file with a destroyed lab")?;
    refused(
        another.lab_file(lab.id(), "login.key").await,
        ErrorKind::NotFound,
        "read a file of a destroyed lab",
    )?;
    rig.expect_nothing_left("after a lab with files was destroyed").await
}
