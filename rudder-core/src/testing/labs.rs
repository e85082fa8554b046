//! The life cycle of labs, from opening to destruction, in every state and twice.

use super::{
    Rig, TestResult,
    rig::{eventually, network},
    test_result::{During as _, ensure, expect_equal, fail, fails, refused},
};
use crate::{
    ErrorKind,
    backend::{Exit, LabSpec, Progress, Stop},
};
use futures::future::join_all;
use std::time::Duration;

/// `diagnose` reports that every requirement is met, and does so again.
pub async fn diagnosis_may_be_repeated(rig: &Rig) -> TestResult {
    for _ in 0..2 {
        let report = rig.backend().diagnose().await.during("diagnose")?;
        ensure!(report.is_ready(), "expected a ready host, but found {:?}", report.findings);
        ensure!(!report.findings.is_empty(), "expected findings, but found none");
    }
    ensure!(
        rig.backend().capabilities().of == rig.backend().name(),
        "expected the capabilities of {:?}, but found those of {:?}",
        rig.backend().name(),
        rig.backend().capabilities().of
    );
    rig.expect_nothing_left("after diagnosing").await
}

/// A lab has the requested id, reports versions, and leaves nothing when it is destroyed, twice.
pub async fn a_lab_is_opened_and_destroyed_twice(rig: &Rig) -> TestResult {
    let spec = LabSpec::new("opened", network());
    let lab = rig.backend().open_lab(&spec).await.during("open a lab")?;
    expect_equal(lab.id(), &spec.id, "the id of a lab")?;
    ensure!(!lab.versions().is_empty(), "expected versions for the provenance, but found none");
    lab.destroy().await.during("destroy a lab")?;
    lab.destroy().await.during("destroy a lab again")?;
    rig.expect_nothing_left("after the lab was destroyed").await?;
    lab.destroy().await.during("destroy a lab a third time, after everything was removed")
}

/// The id of an open lab cannot be used again.
pub async fn an_id_is_in_use_while_its_lab_is_open(rig: &Rig) -> TestResult {
    let spec = LabSpec::new("taken", network());
    let lab = rig.backend().open_lab(&spec).await.during("open a lab")?;
    let again = rig.backend().open_lab(&spec).await;
    refused(again, ErrorKind::Conflict, "open a lab of the same id")?;
    let machine = rig.machine(&*lab, "web").await;
    machine.map_err(|problem| match problem {
        super::NotPassed::Failed(why) => {
            super::NotPassed::Failed(format!("the first lab is affected: {why}"))
        }
        skipped => skipped,
    })?;
    lab.destroy().await.during("destroy a lab")
}

/// A destroyed lab does nothing any more, and says so.
pub async fn a_destroyed_lab_refuses_work(rig: &Rig) -> TestResult {
    let lab = rig.lab("destroyed").await?;
    let spec = rig.bare(&*lab, "web").await?;
    let machine = lab.create_machine(&spec).await.during("create a machine")?;
    lab.destroy().await.during("destroy the lab")?;
    let mut other = spec.clone();
    other.name = "other".to_owned();
    fails(lab.create_machine(&other).await, "create a machine in a destroyed lab")?;
    fails(machine.start().await, "start a machine of a destroyed lab")?;
    fails(lab.keep(None).await, "keep a destroyed lab")?;
    rig.expect_nothing_left("after operations on a destroyed lab").await
}

/// Whatever a lab contains, destroying it, even repeatedly, removes it, and callers that wait for its machines are
/// notified.
pub async fn a_lab_can_be_destroyed_in_every_state(rig: &Rig) -> TestResult {
    for state in ["volumes", "defined", "running", "stopped", "captured"] {
        let during = |what: &str| format!("{what} a lab with something {state}");
        let lab = rig.lab(state).await?;
        if state == "volumes" {
            rig.blank(&*lab, "web", "root").await?;
        } else {
            let machine = rig.machine(&*lab, "web").await?;
            if state != "defined" {
                machine.start().await.during("start a machine")?;
            }
            if state == "stopped" || state == "captured" {
                machine.stop(Stop::Kill).await.during("stop a machine")?;
            }
            if state == "captured" {
                machine.capture("root", &Progress::none()).await.during("capture a disk")?;
            }
            if state == "running" {
                let (exit, destroyed) = futures::join!(machine.wait(), lab.destroy());
                destroyed.during(&during("destroy"))?;
                let exit = exit.during("wait for a machine whose lab is destroyed")?;
                ensure!(
                    matches!(exit, Exit::Killed { .. }),
                    "expected the machine of a destroyed lab to have been killed, but found {exit:?}"
                );
            }
        }
        lab.destroy().await.during(&during("destroy"))?;
        lab.destroy().await.during(&during("destroy again"))?;
        rig.expect_nothing_left(&during("after destroying")).await?;
    }
    Ok(())
}

/// Several callers may destroy a lab at once.
pub async fn a_lab_can_be_destroyed_concurrently(rig: &Rig) -> TestResult {
    let lab = rig.lab("several").await?;
    rig.running(&*lab, "web").await?;
    for result in join_all((0..4).map(|_| lab.destroy())).await {
        result.during("destroy a lab that others destroy as well")?;
    }
    rig.expect_nothing_left("after several destroyed a lab").await
}

/// A lab that is dropped without being destroyed is gone after `reap`.
pub async fn a_forgotten_lab_is_reaped(rig: &Rig) -> TestResult {
    let lab = rig.lab("forgotten").await?;
    let machine = rig.running(&*lab, "web").await?;
    drop(lab);
    let Ok(exit) = tokio::time::timeout(Duration::from_secs(10), machine.wait()).await else {
        fail!("expected the machine of a leaked lab to end, but it still runs after 10 s")
    };
    exit.during("wait for a machine whose lab was leaked")?;
    drop(machine);
    let gone = eventually(rig.options().settle, || async {
        let report = rig.backend().reap().await.during("reap")?;
        ensure!(report.failed.is_empty(), "reap: expected no failure, but found {:?}", report.failed);
        Ok(rig.left().await?.is_empty())
    });
    gone.await?;
    rig.expect_nothing_left("after a lab was leaked and reaped").await
}

/// Two labs with the same names in them do not affect each other.
pub async fn labs_with_the_same_names_are_separate(rig: &Rig) -> TestResult {
    let (one, two) = (rig.lab("twins").await?, rig.lab("twins").await?);
    let first = rig.running(&*one, "web").await?;
    let second = rig.running(&*two, "web").await?;
    first.stop(Stop::Kill).await.during("stop the machine of the first lab")?;
    let waits = tokio::time::timeout(Duration::from_millis(300), second.wait()).await;
    ensure!(
        waits.is_err(),
        "expected the machine of the second lab to keep running when that of the first was stopped, but found {waits:?}"
    );
    refused(
        second.start().await,
        ErrorKind::Conflict,
        "start the machine of the second lab, which runs already",
    )?;
    one.destroy().await.during("destroy the first lab")?;
    let waits = tokio::time::timeout(Duration::from_millis(300), second.wait()).await;
    ensure!(
        waits.is_err(),
        "expected the machine of the second lab to keep running when the first was destroyed, but found {waits:?}"
    );
    let traces = rig.adapter().traces().await.during("list the traces of labs")?;
    let left: Vec<_> = traces.iter().filter(|line| line.contains(one.id().as_str())).collect();
    ensure!(left.is_empty(), "expected nothing of the first lab to be left, but found {left:?}");
    second.stop(Stop::Kill).await.during("stop the machine of the second lab")?;
    two.destroy().await.during("destroy the second lab")
}
