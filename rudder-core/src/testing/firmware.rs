//! Firmware and what machines keep outside their disks: machines start with the state they were created with, it is
//! captured, and what is built on a module starts with it.

use super::{
    NotPassed, Rig, TestResult,
    modules::{captured, draft, template, whole},
    rig::network,
    test_result::{During as _, ensure, expect_equal, refused},
};
use crate::{
    ErrorKind,
    backend::{ImportRequest, Lab, LabSpec, Machine, MachineSpec, Progress, Stop},
    capability::Capability,
    hardware::Firmware,
    module::{CapturedState, StateKind},
    plan::{PlannedBuildRef, PlannedSource},
};
use std::{sync::Arc, time::Duration};

/// Enough for any firmware, in bytes.
const MEMORY: u64 = 256 << 20;
/// How long a machine is observed that must stay in its firmware.
const OBSERVED_FOR: Duration = Duration::from_millis(200);

/// A machine with UEFI starts, and its variables are captured and inherited.
pub async fn a_machine_with_uefi_keeps_its_variables(rig: &Rig) -> TestResult {
    kept(rig, Capability::Uefi, Firmware::Uefi, false, StateKind::FirmwareVariables).await
}

/// A machine with UEFI that enforces Secure Boot starts, and its variables are captured and inherited.
pub async fn a_machine_with_secure_boot_keeps_its_variables(rig: &Rig) -> TestResult {
    kept(rig, Capability::SecureBoot, Firmware::UefiSecureBoot, false, StateKind::FirmwareVariables).await
}

/// A machine with a TPM starts, and the TPM's memory is captured and inherited.
pub async fn a_machine_with_a_tpm_keeps_its_state(rig: &Rig) -> TestResult {
    let uefi = rig.backend().capabilities().has(Capability::Uefi);
    let firmware = if uefi { Firmware::Uefi } else { Firmware::Bios };
    kept(rig, Capability::Tpm, firmware, true, StateKind::Tpm).await
}

/// A machine with only a BIOS keeps nothing outside its disks.
pub async fn a_machine_with_bios_keeps_nothing_outside_its_disks(rig: &Rig) -> TestResult {
    let lab = rig.lab("bios").await?;
    let machine = rig.running(&*lab, "web").await?;
    refused(machine.capture_state().await, ErrorKind::Conflict, "capture the state of a running machine")?;
    machine.stop(Stop::Kill).await.during("stop a machine")?;
    let state = machine.capture_state().await.during("capture state")?;
    ensure!(state.is_empty(), "expected nothing outside the disks, but found {state:?}");
    lab.destroy().await.during("destroy the lab")
}

/// Opens a lab whose machines need this capability.
async fn lab(rig: &Rig, need: Capability, firmware: Firmware) -> TestResult<Arc<dyn Lab>> {
    let mut spec = LabSpec::new("firmware", network());
    spec.needs.insert(need);
    if firmware != Firmware::Bios {
        spec.needs.insert(Capability::Uefi);
    }
    match rig.backend().open_lab(&spec).await {
        Err(error) if error.kind() == ErrorKind::HostMissing => {
            Err(NotPassed::Failed(format!("{need} is claimed: {}", error.report())))
        }
        opened => opened.during("open a lab"),
    }
}

/// Starts a machine, which must stay in its firmware, and stops it. Returns the state that it keeps.
async fn state(machine: &dyn Machine) -> TestResult<Vec<CapturedState>> {
    machine.start().await.during("start a machine")?;
    let waited = tokio::time::timeout(OBSERVED_FOR, machine.wait()).await;
    ensure!(waited.is_err(), "expected the machine to stay in its firmware, but found {waited:?}");
    refused(machine.capture_state().await, ErrorKind::Conflict, "capture the state of a running machine")?;
    machine.stop(Stop::Kill).await.during("stop the machine")?;
    machine.capture_state().await.during("capture state")?;
    machine.capture_state().await.during("capture state again")
}

async fn kept(rig: &Rig, need: Capability, firmware: Firmware, tpm: bool, kind: StateKind) -> TestResult {
    let of = |spec: &mut MachineSpec| {
        (spec.memory, spec.firmware, spec.tpm) = (MEMORY, firmware, tpm);
    };
    let parent_lab = lab(rig, need, firmware).await?;
    let mut spec = rig.bare(&*parent_lab, "web").await?;
    of(&mut spec);
    let machine = parent_lab.create_machine(&spec).await.during("create a machine")?;
    let state_of_parent = state(&*machine).await?;
    ensure!(
        state_of_parent.iter().any(|state| state.kind == kind && state.content.size != Some(0)),
        "expected {} to be captured, but found {state_of_parent:?}",
        kind.name()
    );
    let mut wanted = template("web", vec![captured(&*machine).await?]);
    (wanted.firmware, wanted.tpm, wanted.state) = (firmware, tpm, state_of_parent.clone());
    let module = parent_lab.publish(draft("firmware", vec![wanted])).await.during("publish a module")?;
    parent_lab.destroy().await.during("destroy the lab")?;
    let published = &module.machines[0];
    expect_equal(
        &(published.firmware, published.tpm),
        &(firmware, tpm),
        "the firmware and TPM of the module",
    )?;
    let digests =
        |state: &[CapturedState]| state.iter().map(|state| state.content.clone()).collect::<Vec<_>>();
    expect_equal(&digests(&published.state), &digests(&state_of_parent), "the state of the module")?;
    whole(&module).await?;

    let parent = PlannedBuildRef { module: module.name.clone(), digest: module.digest, vm: "web".to_owned() };
    let child_lab = lab(rig, need, firmware).await?;
    let source = PlannedSource::BuildRef(parent.clone());
    let request = ImportRequest::new("child", "root", source, None);
    let imported = child_lab.import(&request, &Progress::none()).await.during("import a module's disk")?;
    let mut spec = rig.bare(&*child_lab, "child").await?;
    of(&mut spec);
    spec.disks[0].volume = imported.volume;
    spec.state_of = Some(parent);
    let child = child_lab.create_machine(&spec).await.during("create a machine on a module's state")?;
    let inherited = child.capture_state().await.during("capture the state of a machine that has not run")?;
    expect_equal(&digests(&inherited), &digests(&state_of_parent), "what a child starts with")?;
    let state_of_child = state(&*child).await?;
    let kinds = |state: &[CapturedState]| state.iter().map(|state| state.kind).collect::<Vec<_>>();
    expect_equal(&kinds(&state_of_child), &kinds(&state_of_parent), "what a child keeps")?;
    child_lab.destroy().await.during("destroy the lab of the child")?;
    // Changes by the child have not reached its parent.
    whole(&module).await?;
    rig.backend().remove_module("firmware").await.during("remove the module")
}
