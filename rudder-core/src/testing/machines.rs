//! The life cycle of machines: start, wait and stop in every order and twice, and death.

use super::{
    Rig, TestResult,
    test_result::{During as _, ensure, expect_equal, fail, refused},
};
use crate::{
    ErrorKind,
    backend::{Death, Exit, Lab, Machine, Progress, Stop},
    capability::Capability,
};
use futures::{StreamExt as _, TryStreamExt as _, future::join_all};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a future that must stay pending is observed.
const OBSERVED_FOR: Duration = Duration::from_millis(100);

/// Number of machines that are tested concurrently: most of the time is spent waiting for them.
const CONCURRENT: usize = 3;

/// An operation on a machine.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Act {
    Start,
    Wait,
    Stop,
}

/// Start, wait and stop follow the contract in every order of three of them.
pub async fn start_wait_and_stop_work_in_every_order(rig: &Rig) -> TestResult {
    const ACTS: [Act; 3] = [Act::Start, Act::Wait, Act::Stop];
    let lab = rig.lab("orders").await?;
    let orders = futures::stream::iter(0..27_usize).map(Ok);
    let played = orders.try_for_each_concurrent(CONCURRENT, |order| {
        let lab = &lab;
        async move {
            let acts = [ACTS[order / 9], ACTS[order / 3 % 3], ACTS[order % 3]];
            let machine = rig.machine(&**lab, &format!("m{order}")).await?;
            perform(&*machine, acts).await.map_err(|problem| match problem {
                super::NotPassed::Failed(why) => super::NotPassed::Failed(format!("{acts:?}: {why}")),
                skipped => skipped,
            })
        }
    });
    played.await?;
    lab.destroy().await.during("destroy the lab")
}

async fn perform(machine: &dyn Machine, acts: [Act; 3]) -> TestResult {
    let mut runs = false;
    let mut ended: Option<Exit> = None;
    for act in acts {
        match act {
            Act::Start if runs => {
                refused(machine.start().await, ErrorKind::Conflict, "start a running machine")?;
            }
            Act::Start => {
                machine.start().await.during("start a machine at rest")?;
                (runs, ended) = (true, None);
            }
            Act::Wait if runs => {
                let waited = tokio::time::timeout(OBSERVED_FOR, machine.wait()).await;
                ensure!(
                    waited.is_err(),
                    "expected a running machine not to have ended, but found {waited:?}"
                );
            }
            Act::Wait => match &ended {
                Some(exit) => {
                    expect_equal(
                        &machine.wait().await.during("wait for an ended machine")?,
                        exit,
                        "its exit",
                    )?;
                }
                None => {
                    refused(machine.wait().await, ErrorKind::Conflict, "wait for a machine never started")?;
                }
            },
            Act::Stop if runs => {
                let exit = machine.stop(Stop::Kill).await.during("stop a running machine")?;
                ensure!(matches!(exit, Exit::Killed { .. }), "expected Killed, but found {exit:?}");
                (runs, ended) = (false, Some(exit));
            }
            Act::Stop => match &ended {
                Some(exit) => {
                    let again = machine.stop(Stop::Kill).await.during("stop an ended machine")?;
                    expect_equal(&again, exit, "its exit")?;
                }
                None => {
                    let stopped = machine.stop(Stop::Kill).await;
                    refused(stopped, ErrorKind::Conflict, "stop a machine never started")?;
                }
            },
        }
    }
    if runs {
        machine.stop(Stop::Kill).await.during("stop a running machine")?;
    }
    Ok(())
}

/// All callers that wait for a machine get the same result, including those that call after its end.
pub async fn any_number_of_callers_can_wait(rig: &Rig) -> TestResult {
    let lab = rig.lab("waiters").await?;
    let machine = rig.running(&*lab, "web").await?;
    let waiting =
        async { futures::join!(join_all((0..8).map(|_| machine.wait())), machine.stop(Stop::Kill)) };
    let Ok((exits, stopped)) = tokio::time::timeout(rig.options().patience, waiting).await else {
        fail!(
            "expected all waiting callers to return, but some still wait after {:?}",
            rig.options().patience
        )
    };
    let stopped = stopped.during("stop a machine")?;
    for exit in exits {
        expect_equal(&exit.during("wait for a machine")?, &stopped, "the exit reported to one of many")?;
    }
    expect_equal(
        &machine.wait().await.during("wait afterwards")?,
        &stopped,
        "the exit reported to a late caller",
    )?;
    lab.destroy().await.during("destroy the lab")
}

/// Several callers may stop a machine at once; it ends once.
pub async fn several_callers_can_stop_a_machine(rig: &Rig) -> TestResult {
    let lab = rig.lab("stoppers").await?;
    let machine = rig.running(&*lab, "web").await?;
    let limit = Duration::from_secs(30);
    let stopping = async {
        futures::join!(
            machine.stop(Stop::Graceful { limit }),
            machine.stop(Stop::Kill),
            machine.stop(Stop::Kill)
        )
    };
    let Ok((one, two, three)) = tokio::time::timeout(rig.options().patience, stopping).await else {
        fail!(
            "expected all callers that stop a machine to return, but some still wait after {:?}",
            rig.options().patience
        )
    };
    let one = one.during("stop a machine gracefully")?;
    expect_equal(&two.during("kill it meanwhile")?, &one, "the exit reported to the second caller")?;
    expect_equal(&three.during("kill it again")?, &one, "the exit reported to the third caller")?;
    lab.destroy().await.during("destroy the lab")
}

/// A machine that does not power off is killed after the limit.
pub async fn a_graceful_stop_ends_after_its_limit(rig: &Rig) -> TestResult {
    let lab = rig.lab("graceful").await?;
    let machine = rig.running(&*lab, "web").await?;
    let limit = Duration::from_millis(300);
    let began = Instant::now();
    let stopped = tokio::time::timeout(rig.options().patience, machine.stop(Stop::Graceful { limit })).await;
    let Ok(exit) = stopped else { fail!("expected the machine to be killed after {limit:?}, but it runs") };
    let took = began.elapsed();
    match exit.during("stop a machine gracefully")? {
        Exit::PoweredOff => {}
        Exit::Killed { why } => {
            ensure!(!why.is_empty(), "expected the reason of the kill, but found none");
            ensure!(took >= limit, "expected {limit:?} before the kill, but found {took:?}");
        }
        other => fail!("expected PoweredOff or Killed, but found {other:?}"),
    }
    lab.destroy().await.during("destroy the lab")
}

/// When what runs a machine is killed from outside, callers of `wait` are notified within two seconds, and the machine
/// may be started again.
pub async fn a_death_is_reported_in_time(rig: &Rig) -> TestResult {
    let lab = rig.lab("death").await?;
    let machine = rig.running(&*lab, "web").await?;
    let other = rig.running(&*lab, "other").await?;
    for round in 0..2 {
        let killed = async {
            // The waiter comes first.
            tokio::task::yield_now().await;
            rig.adapter().kill(lab.id(), "web").await.map(|()| Instant::now())
        };
        let patience = rig.options().reaction + Duration::from_secs(30);
        let (waited, killed) = futures::join!(
            async {
                let exit = tokio::time::timeout(patience, machine.wait()).await;
                (exit, Instant::now())
            },
            killed
        );
        let killed = killed.during("kill a machine from outside")?;
        let (Ok(exit), reported_at) = waited else {
            fail!("expected the death of a machine to be reported within {patience:?}, but it was not")
        };
        let took = reported_at.saturating_duration_since(killed);
        ensure!(
            took <= rig.options().reaction,
            "expected the death of a machine to be reported within {:?}, but it took {took:?}",
            rig.options().reaction
        );
        match exit.during("wait for a machine that was killed from outside")? {
            Exit::Died { cause: Death::Hypervisor, detail } => {
                ensure!(!detail.is_empty(), "expected what is known of the death, but found nothing");
            }
            exit => fail!("expected the death of the hypervisor, but found {exit:?}"),
        }
        if round == 0 {
            machine.start().await.during("start a machine that died")?;
        }
    }
    let waited = tokio::time::timeout(OBSERVED_FOR, other.wait()).await;
    ensure!(waited.is_err(), "expected the other machine to keep running, but found {waited:?}");
    lab.destroy().await.during("destroy the lab")
}

/// The name of a machine is unique in its lab.
pub async fn a_name_can_be_used_once_in_a_lab(rig: &Rig) -> TestResult {
    let lab = rig.lab("names").await?;
    let spec = rig.bare(&*lab, "web").await?;
    let machine = lab.create_machine(&spec).await.during("create a machine")?;
    expect_equal(&machine.name(), &"web", "the name of the machine")?;
    refused(lab.create_machine(&spec).await, ErrorKind::Conflict, "create a machine of the same name")?;
    machine.start().await.during("start the first, which is not affected")?;
    refused(
        lab.create_machine(&spec).await,
        ErrorKind::Conflict,
        "create a machine of the same name while it runs",
    )?;
    let spec = rig.bare(&*lab, "twins").await?;
    let (one, two) = futures::join!(lab.create_machine(&spec), lab.create_machine(&spec));
    let (created, other) = if one.is_ok() { (one, two) } else { (two, one) };
    let created = created.during("create one of two machines of the same name at once")?;
    refused(other, ErrorKind::Conflict, "create the other")?;
    created.start().await.during("start the one that was created")?;
    lab.destroy().await.during("destroy the lab")
}

/// What only a running machine can do is refused before and after it runs, and what only a stopped machine can do is
/// refused while it runs.
pub async fn operations_in_the_wrong_state_are_refused(rig: &Rig) -> TestResult {
    let lab = rig.lab("refusals").await?;
    let machine = rig.machine(&*lab, "web").await?;
    let has_serial = rig.backend().capabilities().has(Capability::Serial);
    off(&*machine, has_serial, "never started").await?;
    machine.start().await.during("start a machine")?;
    refused(
        machine.capture("root", &Progress::none()).await,
        ErrorKind::Conflict,
        "capture a disk of a running machine",
    )?;
    refused(
        machine.dial(4).await,
        ErrorKind::InvalidInput,
        "dial a port that the machine was not created with",
    )?;
    machine.stop(Stop::Kill).await.during("stop a machine")?;
    off(&*machine, has_serial, "ended").await?;
    refused(
        machine.capture("no-such-disk", &Progress::none()).await,
        ErrorKind::NotFound,
        "capture a disk that the machine does not have",
    )?;
    lab.destroy().await.during("destroy the lab")
}

async fn off(machine: &dyn Machine, has_serial: bool, state: &str) -> TestResult {
    let dialled = machine.dial(super::rig::SSH).await;
    refused(dialled, ErrorKind::Conflict, &format!("dial a machine that {state}"))?;
    if has_serial {
        let tail = machine.serial_tail(100).await.during("read what it wrote on its serial console")?;
        ensure!(tail.len() <= 100, "expected at most 100 bytes, but found {}", tail.len());
    }
    Ok(())
}

/// Machines of a lab start at once, and end one by one.
pub async fn machines_run_independently(rig: &Rig) -> TestResult {
    let lab = rig.lab("side-by-side").await?;
    let mut machines = Vec::new();
    for name in ["one", "two", "three"] {
        machines.push(rig.machine(&*lab, name).await?);
    }
    for started in join_all(machines.iter().map(|machine| machine.start())).await {
        started.during("start machines at once")?;
    }
    machines[1].stop(Stop::Kill).await.during("stop one of three")?;
    for index in [0, 2] {
        let waited = tokio::time::timeout(OBSERVED_FOR, machines[index].wait()).await;
        ensure!(waited.is_err(), "expected the others to keep running, but found {waited:?}");
    }
    end_with(&*lab, &machines[0]).await
}

async fn end_with(lab: &dyn Lab, machine: &Arc<dyn Machine>) -> TestResult {
    lab.destroy().await.during("destroy the lab")?;
    let exit = machine.wait().await.during("wait for a machine whose lab was destroyed")?;
    ensure!(matches!(exit, Exit::Killed { .. }), "expected Killed, but found {exit:?}");
    Ok(())
}
