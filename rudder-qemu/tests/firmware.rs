//! What a host must provide for UEFI, Secure Boot and a TPM, and a TPM that dies. The machines stay in their firmware.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fixture, blank_machine, eventually, network, processes_below};
use rudder_core::{
    ErrorKind,
    backend::{Backend as _, Death, Exit, LabSpec, Stop},
    capability::Capability,
    hardware::{Bus, Firmware},
    module::StateKind,
};
use std::{fs, path::PathBuf};

/// Returns the specification of a lab whose machines need these capabilities.
fn needing(needs: &[Capability]) -> LabSpec {
    let mut spec = LabSpec::new("test", network());
    spec.needs = needs.iter().copied().collect();
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_host_lacks_is_refused_before_anything_starts() {
    // A host with neither firmware nor swtpm.
    let empty = tempfile::tempdir().unwrap();
    let directory = empty.path().join("firmware");
    let fixture = Fixture::with(1, |builder| {
        builder.firmware_directories([directory.clone()]).swtpm(empty.path().join("swtpm"))
    })
    .await;
    let refusal = async |need| {
        let error = fixture.backend.open_lab(&needing(&[need])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostMissing);
        error.report()
    };
    let uefi = refusal(Capability::Uefi).await;
    assert!(
        uefi.contains(&format!("among the firmware descriptors of QEMU ({})", directory.display())),
        "{uefi}"
    );
    assert!(uefi.ends_with("help: install it: apt-get install --no-install-recommends ovmf"), "{uefi}");
    let secure = refusal(Capability::SecureBoot).await;
    assert!(
        secure.starts_with("expected UEFI firmware that enforces Secure Boot with enrolled keys for pc-q35-")
    );
    assert!(secure.ends_with("ovmf"), "{secure}");
    let tpm = refusal(Capability::Tpm).await;
    assert!(tpm.contains("apt-get install --no-install-recommends swtpm swtpm-tools"), "{tpm}");
    // A lab that needs none of it is not affected.
    let lab = fixture.lab().await;
    let mut spec = blank_machine(&*lab, "web", &[Bus::Virtio]).await;
    lab.create_machine(&spec).await.unwrap();
    // A machine that needs firmware is never given BIOS instead, even if its lab did not declare the need.
    spec.name = "other".to_owned();
    spec.firmware = Firmware::Uefi;
    assert_eq!(lab.create_machine(&spec).await.unwrap_err().kind(), ErrorKind::HostMissing);
    lab.destroy().await.unwrap();
    drop(lab);
    let report = fixture.backend.diagnose().await.unwrap();
    let missing: Vec<&str> = report
        .findings
        .iter()
        .filter(|finding| !finding.present)
        .map(|finding| finding.what.as_str())
        .collect();
    assert_eq!(missing, ["UEFI", "Secure Boot", "TPM"]);
    assert!(report.is_ready(), "only some manifests need them");
    fixture.assert_clean().await;
}

/// Returns the process below a directory that runs this program.
fn process(directory: &std::path::Path, program: &str) -> Option<i32> {
    let is = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with(program));
    processes_below(directory).into_iter().find(is)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tpm_lives_as_long_as_its_machine_and_its_death_is_reported() {
    let fixture = Fixture::new().await;
    let needs = [Capability::Uefi, Capability::SecureBoot, Capability::Tpm];
    let lab = fixture.backend.open_lab(&needing(&needs)).await.unwrap();
    let mut spec = blank_machine(&*lab, "web", &[Bus::Virtio]).await;
    spec.firmware = Firmware::UefiSecureBoot;
    spec.tpm = true;
    spec.memory = 256 << 20;
    let machine = lab.create_machine(&spec).await.unwrap();
    let swtpm = || process(fixture.dir.path(), "swtpm");
    assert_eq!(swtpm(), None, "made, and not running");

    // The TPM ends with the machine, and starts with it again.
    for _ in 0..2 {
        machine.start().await.unwrap();
        assert!(swtpm().is_some());
        assert_eq!(machine.capture_state().await.unwrap_err().kind(), ErrorKind::Conflict);
        assert!(matches!(machine.stop(Stop::Kill).await.unwrap(), Exit::Killed { .. }));
        assert_eq!(swtpm(), None, "it has ended when the machine has");
    }
    let state = machine.capture_state().await.unwrap();
    let kinds: Vec<_> = state.iter().map(|state| (state.kind, state.format.as_str())).collect();
    assert_eq!(kinds, [(StateKind::FirmwareVariables, "raw"), (StateKind::Tpm, "swtpm")]);
    for captured in &state {
        let path = lab_file(&fixture, &captured.file);
        assert_eq!(Some(fs::metadata(path).unwrap().len()), captured.content.size);
    }
    // Capturing may be repeated.
    assert_eq!(machine.capture_state().await.unwrap().len(), 2);

    machine.start().await.unwrap();
    let pid = rustix::process::Pid::from_raw(swtpm().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let Exit::Died { cause, detail } = machine.wait().await.unwrap() else { panic!() };
    assert_eq!(cause, Death::Hypervisor);
    assert!(
        detail.starts_with("the TPM of the machine has ended: swtpm was ended by signal 9 (SIGKILL)"),
        "{detail}"
    );

    // Dropped while running, neither process is left.
    machine.start().await.unwrap();
    drop(lab);
    drop(machine);
    eventually("the processes have ended", || processes_below(fixture.dir.path()).is_empty()).await;
    fixture.assert_clean().await;
}

/// Returns the path of a file of the only lab.
fn lab_file(fixture: &Fixture, file: &str) -> PathBuf {
    let labs = fs::read_dir(fixture.dir.path().join("labs")).unwrap();
    let lab = labs.flatten().find(|entry| !entry.file_name().to_string_lossy().starts_with('.')).unwrap();
    lab.path().join(file)
}
