//! Two guests that boot at once in one lab: each has its own processors, memory, name, disks and consoles, and the
//! power-off of one is reported in time while the other continues to run.

use super::{
    Rig, TestResult,
    guest::{Booted, Prepared},
    test_result::{During as _, ensure, expect_equal, fail},
};
use crate::{
    backend::{Exit, Stop},
    capability::Capability,
    console::Console,
};
use futures::future::join_all;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// The names of the two guests.
const NAMES: [&str; 2] = ["one", "two"];
/// How long what a guest wrote may take to appear on its screen.
const SCREEN_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(90);
/// Interval between checks whether a machine exists, seen from outside.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// What the first guest writes before it powers off.
const LAST_OUTPUT: &str = "last-words-of-one";

/// Two running guests, the second with one more processor and twice the memory.
pub(super) type Pair = [Booted; 2];

/// Boots the two at once.
pub(super) async fn boot(rig: &Rig, lab: Arc<dyn crate::backend::Lab>) -> TestResult<Pair> {
    let mut prepared = Vec::new();
    for (index, name) in NAMES.into_iter().enumerate() {
        let mut guest = Prepared::new(rig, &*lab, name, None).await?;
        // They share the host.
        guest.boots_within = guest.boots_within * 3 / 2;
        if index == 1 {
            guest.spec.cpus += 1;
            guest.spec.memory *= 2;
        }
        prepared.push(guest);
    }
    let boots = prepared.into_iter().map(|guest| guest.boot(rig, Arc::clone(&lab)));
    let mut booted = join_all(boots).await.into_iter();
    match (booted.next(), booted.next()) {
        (Some(one), Some(two)) => Ok([one?, two?]),
        _ => fail!("expected two guests, but found fewer"),
    }
}

/// Machines that are created at once each have their own disk, seed and name.
pub async fn machines_created_concurrently_are_separate(rig: &Rig) -> TestResult {
    // Each accepts only its own key, and a disk that both write to would not be started twice.
    let pair = rig.pair().await?;
    for (booted, name) in pair.iter().zip(NAMES) {
        expect_equal(&booted.run("hostname").await?.trim(), &name, "the name of a guest")?;
        booted.run(&format!("echo {name} >/srv/whose")).await?;
    }
    for (booted, name) in pair.iter().zip(NAMES) {
        expect_equal(&booted.run("cat /srv/whose").await?.trim(), &name, "what a guest wrote on its disk")?;
    }
    Ok(())
}

/// Each guest has as many processors and as much memory as requested.
pub async fn processors_and_memory_are_as_requested(rig: &Rig) -> TestResult {
    let pair = rig.pair().await?;
    let image = rig.image()?;
    let wanted = [(image.cpus, image.memory), (image.cpus + 1, image.memory * 2)];
    for (booted, (cpus, memory)) in pair.iter().zip(wanted) {
        let name = booted.machine.name();
        let processors = booted.run("cat /proc/cpuinfo").await?;
        let found = processors.lines().filter(|line| line.starts_with("processor")).count();
        expect_equal(&found, &(cpus as usize), &format!("the number of processors of {name}"))?;
        // `MemTotal:  245678 kB` (proc(5)): without what the firmware and the kernel reserved.
        let reported = booted.run("cat /proc/meminfo").await?;
        let total = reported.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let total = total.and_then(|total| total.split_whitespace().next()?.parse::<u64>().ok());
        let Some(total) = total.map(|kib| kib << 10) else {
            fail!("expected the memory of {name} in /proc/meminfo, but found {reported:?}")
        };
        ensure!(
            total <= memory && total > memory / 10 * 6,
            "the memory of {name}: expected about {memory} bytes, but found {total}"
        );
    }
    Ok(())
}

/// What a guest writes to its serial console and its screen appears there, and not on those of the other.
pub async fn each_machine_has_its_own_consoles(rig: &Rig) -> TestResult {
    let pair = rig.pair().await?;
    let has = |capability| rig.backend().capabilities().has(capability);
    // What each writes ends in the same text, so a mix-up is detected at once.
    let mark = |name: &str, what: &str| format!("{name}-wrote-on-{what}");
    let mut streams = Vec::new();
    if has(Capability::Serial) {
        for booted in pair.iter() {
            streams.push(booted.machine.serial().await.during("connect to the serial console")?);
        }
        for (booted, name) in pair.iter().zip(NAMES) {
            booted.run(&format!("echo {} >/dev/ttyS0", mark(name, "serial"))).await?;
        }
        for (index, (booted, name)) in pair.iter().zip(NAMES).enumerate() {
            let (own, foreign) = (mark(name, "serial"), mark(NAMES[1 - index], "serial"));
            let log = super::consoles::until(&mut streams[index], &mark("", "serial"), name).await?;
            let tail = booted.machine.serial_tail(4096).await.during("read the end of the serial console")?;
            for said in [&*log, &*String::from_utf8_lossy(&tail)] {
                ensure!(
                    said.contains(&own),
                    "{name}: expected {own:?} on its serial console, but found {said:?}"
                );
                ensure!(!said.contains(&foreign), "{name}: found what the other wrote: {said:?}");
            }
        }
    }
    if let (true, Some(screen)) = (has(Capability::Display), rig.image()?.screen) {
        for (booted, name) in pair.iter().zip(NAMES) {
            booted.run(&format!("echo {} >{screen}", mark(name, "screen"))).await?;
        }
        for (index, (booted, name)) in pair.iter().zip(NAMES).enumerate() {
            let (own, foreign) = (mark(name, "screen"), mark(NAMES[1 - index], "screen"));
            let console = Console::new(Arc::clone(&booted.machine));
            let found = console.wait_text(&mark("", "screen"), SCREEN_LIMIT).await;
            let found = found.during(&format!("{name}: wait for what it wrote on its screen"))?.to_string();
            ensure!(found.contains(&own), "{name}: expected {own:?} on its screen, but found:\n{found}");
            ensure!(!found.contains(&foreign), "{name}: found what the other wrote on its screen:\n{found}");
        }
    }
    Ok(())
}

/// When a guest powers off by itself, callers of `wait` are notified within the limit of the contract, its last output
/// is kept, and the other machine continues to run until its own power button is pressed.
pub async fn a_power_off_is_reported_in_time(rig: &Rig) -> TestResult {
    let pair = rig.pair().await?;
    let [one, two] = &*pair;
    let serial = rig.backend().capabilities().has(Capability::Serial);
    let speak = if serial { format!("echo {LAST_OUTPUT} >/dev/ttyS0; ") } else { String::new() };
    let reported = async {
        let exit = one.machine.wait().await;
        (exit, Instant::now())
    };
    let gone = async {
        // The connection may end before the command does.
        drop(one.guest().command(&format!("{speak}sync; poweroff")).await);
        while rig.adapter().is_running(one.lab.id(), one.machine.name()).await? {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        crate::Result::Ok(Instant::now())
    };
    let both = tokio::time::timeout(POWER_OFF_LIMIT, async { futures::join!(reported, gone) }).await;
    let Ok(((exit, reported), gone)) = both else {
        fail!("expected a guest to power off, and a report of that, within {POWER_OFF_LIMIT:?}")
    };
    expect_equal(
        &exit.during("wait for a guest that powers off")?,
        &Exit::PoweredOff,
        "how the guest ended",
    )?;
    let took = reported.saturating_duration_since(gone.during("check whether the machine exists")?);
    ensure!(
        took <= rig.options().reaction,
        "expected a power-off to be reported within {:?}, but it took {took:?}",
        rig.options().reaction
    );
    let again = tokio::time::timeout(SCREEN_LIMIT, one.machine.wait()).await;
    let Ok(again) = again else {
        fail!("expected the end of an ended machine to be reported at once, but it was not")
    };
    expect_equal(&again.during("wait again")?, &Exit::PoweredOff, "what is reported to a late caller")?;
    if serial {
        let tail = one.machine.serial_tail(4096).await.during("read its last output")?;
        let tail = String::from_utf8_lossy(&tail);
        ensure!(tail.contains(LAST_OUTPUT), "expected {LAST_OUTPUT:?} after its end, but found {tail:?}");
    }
    expect_equal(&two.run("hostname").await?.trim(), &NAMES[1], "the name of the guest that keeps running")?;
    let stopped = two.machine.stop(Stop::Graceful { limit: POWER_OFF_LIMIT }).await;
    expect_equal(&stopped.during("press the power button")?, &Exit::PoweredOff, "how the other guest ended")?;
    one.machine.start().await.during("start a machine that powered off")?;
    let tail = one.machine.serial_tail(1 << 20).await.during("read what it wrote since")?;
    let tail = String::from_utf8_lossy(&tail);
    ensure!(!tail.contains(LAST_OUTPUT), "expected nothing of the last run, but found {tail:?}");
    one.machine.stop(Stop::Kill).await.during("stop it")?;
    Ok(())
}
