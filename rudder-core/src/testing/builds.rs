//! Whole builds: a manifest becomes a module, by every kind of step; a build that fails or is cancelled leaves nothing.

use super::{
    NotPassed, Rig, TestResult,
    modules::whole,
    test_result::{During as _, ensure, expect_equal, fail},
};
use crate::{
    ErrorKind,
    build::{Build, BuildHandle},
    capability::{Capabilities, Capability},
    event::{Event, EventKind, VmPhase},
    hardware::NicModel,
    module::Module,
    plan::{PlanContext, PlannedUrl, prepare},
};
use serde_json::{Value, json};

/// The name of the builds.
const NAME: &str = "suite";
/// A text with characters that are special in shells, in YAML, and on command lines.
const UNUSUAL_TEXT: &str = "it's \"quoted\", a,b=c; $HOME `id` $(id) \\ %s é 🦀 <x>&amp; #not: a comment";

/// Returns a manifest of one VM with the adapter's guest, and these steps.
fn manifest(rig: &Rig, source: &PlannedUrl, steps: &Value) -> TestResult<Value> {
    let image = rig.image()?;
    // The default, which needs no capability.
    let nics = if image.nic == NicModel::Virtio { json!([]) } else { json!([{"model": image.nic}]) };
    Ok(json!({
        "name": NAME,
        "files": [{"name": "odd.txt", "inline": format!("{UNUSUAL_TEXT}\n")}],
        "vms": [{
            "name": "web",
            "source": {"url": source.url},
            "disks": [{"name": "root", "bus": image.bus}],
            "nics": nics,
            "resources": {"cpu": image.cpus, "memory": format!("{}Mi", image.memory >> 20)},
            "cloudInit": {},
            "communicator": {"sshTimeout": format!("{}s", image.boots_within.as_secs())},
            "provisioners": steps,
        }],
    }))
}

/// A build that has ended.
struct Ended {
    manifest: String,
    events: Vec<Event>,
    outcome: crate::Result<Module>,
}

impl Ended {
    /// Returns the module, which must exist and be complete.
    async fn module(&self, rig: &Rig) -> TestResult<&Module> {
        let module = match &self.outcome {
            Ok(module) => module,
            Err(failure) => fail!("build: expected a module, but found {}", failure.report()),
        };
        expect_equal(&module.name.as_str(), &NAME, "the name of the module")?;
        expect_equal(&module.provenance.manifest, &self.manifest, "the manifest in the provenance")?;
        let modules = rig.backend().modules().await.during("list modules")?;
        expect_equal(&modules, &vec![module.clone()], "the modules after the build")?;
        whole(module).await?;
        Ok(module)
    }

    /// Returns the lines that steps wrote.
    fn lines(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| match &event.kind {
                EventKind::StepOutput { line, .. } => Some(line.as_str()),
                _ => None,
            })
            .collect()
    }
}

/// Runs the build of a manifest to its end, and passes every event to a function, which may act on it.
async fn build(
    rig: &Rig,
    manifest: &Value,
    mut react: impl FnMut(&Event, &BuildHandle) -> TestResult,
) -> TestResult<Ended> {
    let manifest = manifest.to_string();
    let backend = rig.shared_backend();
    let context = PlanContext::new(backend.capabilities());
    let plans = prepare("suite.yaml", manifest.as_bytes(), &context).into_plans().during("plan")?;
    let Some(plan) = plans.into_iter().next() else { fail!("expected a plan, but found none") };
    let handle = Build::new(plan, rig.shared_backend()).start();
    let (mut reader, mut events) = (handle.events(), Vec::new());
    while let Some(event) = reader.next().await {
        react(&event, &handle)?;
        events.push(event);
    }
    Ok(Ended { manifest, events, outcome: handle.outcome().await })
}

/// A manifest becomes a module: shell, file and reboot steps run, and if there is a display, also a boot command and
/// a step performed by a person; special characters arrive in the guest unchanged.
pub async fn a_build_runs_every_kind_of_step(rig: &Rig) -> TestResult {
    let image = rig.image()?;
    // A person works at the display.
    let by_hand = Capabilities::engine().has(Capability::HandbuildStep)
        && rig.backend().capabilities().has(Capability::Display);
    let mut steps = vec![
        json!({"type": "shell", "name": "say", "shell": {
            "inline": ["echo \"$ODD\"", "echo before >/srv/before"],
            "env": {"ODD": UNUSUAL_TEXT},
        }}),
        json!({"type": "file", "name": "put", "file": {
            "fileRef": "odd.txt", "destination": "/srv/deep er/it's \"odd\", é.txt",
        }}),
        json!({"type": "reboot", "name": "again"}),
        json!({"type": "shell", "name": "look", "shell": {
            "inline": "cat \"/srv/deep er/it's \\\"odd\\\", é.txt\"; cat /srv/before",
        }}),
    ];
    if by_hand {
        steps.push(
            json!({"type": "handbuild", "name": "by hand", "handbuild": {"instructions": UNUSUAL_TEXT}}),
        );
    }
    let typed = image.boot_command.filter(|_| rig.backend().capabilities().has(Capability::Display));
    if typed.is_some() {
        // Before the reboot clears the directory.
        steps.insert(0, json!({"type": "shell", "name": "typed", "shell": {"inline": "cat /tmp/typed"}}));
    }
    let wanted = steps.len();
    let mut manifest = manifest(rig, &image.image, &Value::Array(steps))?;
    if let Some(command) = &typed {
        manifest["vms"][0]["bootCommand"] = json!(command);
    }
    let mut paused = 0;
    let ended = build(rig, &manifest, |event, handle| {
        if let EventKind::Paused { instructions, .. } = &event.kind {
            expect_equal(&instructions.as_str(), &UNUSUAL_TEXT, "the instructions of a step of a person")?;
            paused += 1;
            handle.resume("web").during("resume after a step of a person")?;
        }
        Ok(())
    })
    .await?;
    let module = ended.module(rig).await?;
    let lines = ended.lines();
    let unusual = lines.iter().filter(|line| **line == UNUSUAL_TEXT).count();
    ensure!(unusual == 2, "expected {UNUSUAL_TEXT:?} twice in the output of the steps, but found {lines:?}");
    ensure!(lines.contains(&"before"), "expected what existed before the reboot, but found {lines:?}");
    ensure!(
        typed.is_none() || lines.contains(&"typed on the screen"),
        "expected what was typed on the screen to have been done, but found {lines:?}"
    );
    let good = |event: &&Event| matches!(event.kind, EventKind::StepFinished { success: true, .. });
    let made = ended.events.iter().filter(good).count();
    expect_equal(&made, &wanted, "the number of steps")?;
    expect_equal(&paused, &usize::from(by_hand), "the number of pauses for a person")?;
    expect_equal(&module.machines[0].disks[0].name.as_str(), &"root", "the disk of the module")?;
    rig.backend().remove_module(NAME).await.during("remove the module")
}

/// A build that cannot succeed reports why, and leaves nothing.
pub async fn a_failed_build_leaves_nothing_behind(rig: &Rig) -> TestResult {
    let Some(bad) = rig.adapter().bad_images() else {
        return Err(NotPassed::Skipped("the adapter knows no bad images".to_owned()));
    };
    let source = PlannedUrl { url: bad.broken, sha256: None };
    let ended = build(rig, &manifest(rig, &source, &json!([]))?, |_, _| Ok(())).await?;
    match ended.outcome {
        Ok(module) => fail!("expected an invalid image to fail the build, but found {module:?}"),
        Err(failure) => {
            expect_equal(&failure.kind(), &ErrorKind::InvalidImage, "why the build failed")?;
            let vm = failure.build_failure().and_then(|failure| failure.report.vm.as_deref());
            expect_equal(&vm, &Some("web"), "the VM it failed for")?;
        }
    }
    rig.expect_nothing_left("after a build failed").await
}

/// A build that is cancelled while its machine boots ends, and leaves nothing.
pub async fn a_cancelled_build_leaves_nothing_behind(rig: &Rig) -> TestResult {
    let image = rig.image()?;
    let manifest = manifest(rig, &image.image, &json!([{"type": "reboot"}]))?;
    let ended = build(rig, &manifest, |event, handle| {
        if matches!(event.kind, EventKind::VmPhase { phase: VmPhase::Booting }) {
            handle.cancel();
        }
        Ok(())
    })
    .await?;
    match &ended.outcome {
        Ok(module) => fail!("expected a cancelled build to produce no module, but found {module:?}"),
        Err(failure) => {
            ensure!(
                failure.kind() == ErrorKind::Cancelled,
                "expected Cancelled, but found {}",
                failure.report()
            );
        }
    }
    rig.expect_nothing_left("after a build was cancelled").await
}
