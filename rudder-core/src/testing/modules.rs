//! The results of a lab: captured disks, and modules, which are either complete or absent.

use super::{
    Rig, TestResult,
    guest::{Booted, Prepared},
    rig::{BLANK, ProgressLog, SSH, network},
    test_result::{During as _, ensure, expect_equal, fail, fails, refused},
};
use crate::{
    Error, ErrorKind,
    backend::{Exit, ImportRequest, Lab, Machine, MachineDisk, ModuleDraft, Progress, Stop},
    capability::Capability,
    content::Content,
    digest::Digest,
    hardware::{Bus, Firmware},
    module::{CapturedDisk, Module, Provenance, TemplateMachine},
    plan::{PlannedBuildRef, PlannedSource},
};
use std::{sync::Arc, time::Duration};
use tokio::io::AsyncReadExt as _;

/// How long a guest may take to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(90);

/// Returns a VM of a module with these disks.
pub(super) fn template(name: &str, disks: Vec<CapturedDisk>) -> TemplateMachine {
    TemplateMachine {
        name: name.to_owned(),
        cpus: 1,
        memory: 64 << 20,
        firmware: Firmware::Bios,
        tpm: false,
        nics: Vec::new(),
        disks,
        state: Vec::new(),
        invisible: false,
    }
}

/// Returns the draft of a module with these VMs, whose manifest contains special characters.
pub(super) fn draft(name: &str, machines: Vec<TemplateMachine>) -> ModuleDraft {
    let manifest = "name: odd # \"quotes\", 'quotes', commas, ünïcödé 🦀, <tags> & $(commands) `x` \\ 100%\n";
    let mut provenance = Provenance::new(manifest, Digest::of(name.as_bytes()));
    provenance.warnings.push("a \"warning\", with\nlines".to_owned());
    ModuleDraft::new(name, machines, network(), provenance)
}

/// Starts and stops a machine with a disk.
pub(super) async fn halted(rig: &Rig, lab: &dyn Lab, name: &str) -> TestResult<Arc<dyn Machine>> {
    let machine = rig.running(lab, name).await?;
    machine.stop(Stop::Kill).await.during("stop a machine")?;
    Ok(machine)
}

/// Captures the disk of a machine that needs no guest.
pub(super) async fn captured(machine: &dyn Machine) -> TestResult<CapturedDisk> {
    machine.capture("root", &Progress::none()).await.during("capture a disk")
}

/// Publishes a module of one machine that needs no guest.
pub(super) async fn published(rig: &Rig, lab: &dyn Lab, name: &str) -> TestResult<Module> {
    let machine = halted(rig, lab, "web").await?;
    let disk = captured(&*machine).await?;
    lab.publish(draft(name, vec![template("web", vec![disk])])).await.during("publish a module")
}

/// Checks that a module is complete: its files, if it has any, match their description.
pub(super) async fn whole(module: &Module) -> TestResult {
    let Some(record) = &module.path else { return Ok(()) };
    let directory = record.parent().unwrap_or(record);
    let disks = module.machines.iter().flat_map(|machine| &machine.disks);
    let disks = disks.map(|disk| (&disk.file, &disk.content));
    let state = module.machines.iter().flat_map(|machine| &machine.state);
    let state = state.map(|state| (&state.file, &state.content));
    for (file, content) in disks.chain(state) {
        let path = directory.join(file);
        let bytes = tokio::fs::read(&path).await;
        let bytes =
            bytes.map_err(|error| Error::io(format!("read {} of a module", path.display()), error))?;
        expect_equal(&Content::of(&bytes), content, "the content of a module's file")?;
    }
    Ok(())
}

/// A captured disk is described correctly, may be captured again, and its progress is reported.
pub async fn a_captured_disk_is_described(rig: &Rig) -> TestResult {
    let lab = rig.lab("capture").await?;
    let spec = rig.bare(&*lab, "web").await?;
    let machine = lab.create_machine(&spec).await.during("create a machine")?;
    machine.start().await.during("start a machine")?;
    machine.stop(Stop::Kill).await.during("stop a machine")?;
    for _ in 0..2 {
        let log = ProgressLog::default();
        let disk = machine.capture("root", &log.progress()).await.during("capture a disk")?;
        expect_equal(&disk.name.as_str(), &"root", "the name of a captured disk")?;
        expect_equal(&disk.bus, &spec.disks[0].bus, "the bus of a captured disk")?;
        expect_equal(&disk.virtual_size, &BLANK, "the size of a captured disk")?;
        ensure!(
            disk.content.id.is_some() && disk.content.size != Some(0) && !disk.format.is_empty(),
            "expected an identity and a format, but found {disk:?}"
        );
        ensure!(log.check()?, "expected progress of a capture, but found none");
    }
    machine.start().await.during("start a machine whose disk was captured")?;
    lab.destroy().await.during("destroy the lab")
}

/// A module is visible to every process as it was published, outlives its lab, and is removed once.
pub async fn a_module_is_published_listed_and_removed(rig: &Rig) -> TestResult {
    let lab = rig.lab("publisher").await?;
    let machine = halted(rig, &*lab, "web").await?;
    let wanted = draft("base", vec![template("web", vec![captured(&*machine).await?])]);
    let module = lab.publish(wanted.clone()).await.during("publish a module")?;
    lab.destroy().await.during("destroy the lab")?;
    drop((machine, lab));
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        let modules = backend.modules().await.during("list modules")?;
        ensure!(modules.len() == 1, "expected one module, but found {modules:?}");
        expect_equal(&modules[0], &module, "the module as it was published")?;
        expect_equal(&modules[0].name, &wanted.name, "the name of the module")?;
        expect_equal(&modules[0].network, &wanted.network, "the network of the module")?;
        expect_equal(&modules[0].provenance, &wanted.provenance, "the provenance of the module")?;
        let machine = &modules[0].machines[0];
        expect_equal(&machine.name, &wanted.machines[0].name, "the VM of the module")?;
        expect_equal(&machine.disks[0].content, &wanted.machines[0].disks[0].content, "its disk's content")?;
        whole(&modules[0]).await?;
    }
    another.remove_module("base").await.during("remove a module")?;
    for backend in [rig.backend(), &*another] {
        let modules = backend.modules().await.during("list modules")?;
        ensure!(modules.is_empty(), "expected no module once it was removed, but found {modules:?}");
    }
    if let Some(directory) = module.path.as_deref().and_then(|record| record.parent()) {
        ensure!(
            !directory.exists(),
            "expected nothing of a removed module to remain, but {} still exists",
            directory.display()
        );
    }
    let again = rig.backend().remove_module("base").await;
    refused(again, ErrorKind::NotFound, "remove a module that was removed")?;
    refused(
        rig.backend().remove_module("never-there").await,
        ErrorKind::NotFound,
        "remove a module that never existed",
    )?;
    Ok(())
}

/// A module replaces an existing one with the same name as a whole; modules are listed in the order of their names.
pub async fn a_module_replaces_another(rig: &Rig) -> TestResult {
    let lab = rig.lab("first").await?;
    let first = published(rig, &*lab, "base").await?;
    lab.destroy().await.during("destroy the lab")?;
    let lab = rig.lab("second").await?;
    let machine = halted(rig, &*lab, "db").await?;
    let disk = captured(&*machine).await?;
    let wanted = draft("base", vec![template("db", vec![disk])]);
    let second = lab.publish(wanted).await.during("publish another module with the same name")?;
    ensure!(
        first.digest != second.digest,
        "expected another digest of another module, but found {}",
        first.digest
    );
    let disk = captured(&*machine).await?;
    let other = lab.publish(draft("a-base", vec![template("db", vec![disk])])).await;
    other.during("publish a second module from the lab")?;
    lab.destroy().await.during("destroy the lab")?;
    let modules = rig.backend().modules().await.during("list modules")?;
    let found: Vec<_> = modules.iter().map(|module| (module.name.as_str(), module.digest)).collect();
    ensure!(
        found.len() == 2 && found[0].0 == "a-base",
        "expected a-base and base, in order, but found {found:?}"
    );
    expect_equal(&found[1], &("base", second.digest), "the module that replaced it")?;
    for module in &modules {
        whole(module).await?;
        rig.backend().remove_module(&module.name).await.during("remove a module")?;
    }
    Ok(())
}

/// A disk that was not captured is not published, and leaves no module.
pub async fn a_disk_that_was_not_captured_is_not_published(rig: &Rig) -> TestResult {
    let lab = rig.lab("invented").await?;
    let machine = halted(rig, &*lab, "web").await?;
    let mut disk = captured(&*machine).await?;
    disk.file = "no-such-file".to_owned();
    disk.content = Content::of(b"invented");
    let published = lab.publish(draft("invented", vec![template("web", vec![disk])])).await;
    fails(published, "publish a disk that was not captured")?;
    let modules = rig.backend().modules().await.during("list modules")?;
    ensure!(modules.is_empty(), "expected no module, but found {modules:?}");
    lab.destroy().await.during("destroy the lab")
}

/// A module stays as it is when its replacement cannot be published, and only what was captured replaces it.
pub async fn a_module_is_kept_if_its_successor_cannot_be_published(rig: &Rig) -> TestResult {
    let lab = rig.lab("first").await?;
    let first = published(rig, &*lab, "base").await?;
    lab.destroy().await.during("destroy the lab")?;
    let lab = rig.lab("second").await?;
    let machine = halted(rig, &*lab, "db").await?;
    let disk = captured(&*machine).await?;
    let mut invented = disk.clone();
    invented.name = "data".to_owned();
    invented.file = "no-such-file".to_owned();
    invented.content = Content::of(b"invented");
    let published = lab.publish(draft("base", vec![template("db", vec![disk, invented])])).await;
    fails(published, "publish a disk that was not captured over a module")?;
    let modules = rig.backend().modules().await.during("list modules")?;
    expect_equal(&modules, &vec![first], "the module that is kept")?;
    whole(&modules[0]).await?;
    lab.destroy().await.during("destroy the lab")?;
    rig.backend().remove_module("base").await.during("remove the module")
}

/// A module that an existing lab builds on stays; importing what it does not contain fails with an error that says so.
pub async fn a_module_in_use_is_not_removed(rig: &Rig) -> TestResult {
    let lab = rig.lab("parent").await?;
    let module = published(rig, &*lab, "base").await?;
    lab.destroy().await.during("destroy the lab")?;
    let lab = rig.lab("child").await?;
    let parent = PlannedBuildRef { module: "base".to_owned(), digest: module.digest, vm: "web".to_owned() };
    let request = |parent: PlannedBuildRef, disk: Option<&str>| {
        let mut request = ImportRequest::new("child", "root", PlannedSource::BuildRef(parent), None);
        request.parent_disk = disk.map(str::to_owned);
        request
    };
    let progress = Progress::none();
    let imported =
        lab.import(&request(parent.clone(), None), &progress).await.during("import a module's disk")?;
    expect_equal(&imported.volume.virtual_size, &BLANK, "the size of a module's disk")?;
    let named = lab.import(&request(parent.clone(), Some("root")), &progress).await;
    let named = named.during("import a module's disk by its name")?;
    ensure!(named.volume.id != imported.volume.id, "expected two volumes, but found {:?}", named.volume);
    let Some(input) = imported.input else {
        fail!("expected the origin of a disk of a module, but found none")
    };
    ensure!(input.url.contains("base"), "expected the origin to name the module, but found {input:?}");
    for (what, vm, digest, disk) in [
        ("a VM that a module does not have", "db", module.digest, None),
        ("a module of another digest", "web", Digest::of(b"other"), None),
        ("a disk that a VM does not have", "web", module.digest, Some("data")),
    ] {
        let parent = PlannedBuildRef { module: "base".to_owned(), digest, vm: vm.to_owned() };
        let imported = lab.import(&request(parent, disk), &progress).await;
        refused(imported, ErrorKind::NotFound, &format!("import {what}"))?;
    }
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        refused(backend.remove_module("base").await, ErrorKind::Conflict, "remove a module in use")?;
        backend.collect().await.during("collect unused content")?;
    }
    whole(&module).await?;
    lab.destroy().await.during("destroy the lab")?;
    rig.backend().remove_module("base").await.during("remove a module that is no longer used")
}

/// A guest powers off by its button and keeps its disks, and what it wrote to several of them is captured and
/// inherited; what a child writes does not reach its parent. Connections end with their machine.
pub async fn what_a_guest_wrote_is_captured_and_inherited(rig: &Rig) -> TestResult {
    let lab = rig.lab("writer").await?;
    let mut prepared = Prepared::new(rig, &*lab, "web", None).await?;
    let files = rig.image()?.data_disks;
    let capabilities = rig.backend().capabilities();
    let data = if capabilities.has(Capability::SourceBlank) && capabilities.has(Capability::DiskVirtio) {
        files.len().min(2)
    } else {
        0
    };
    let names: Vec<String> = (0..data).map(|number| format!("data{number}")).collect();
    for name in &names {
        let mut disk = rig.blank(&*lab, "web", name).await?;
        disk.bus = Bus::Virtio;
        prepared.spec.disks.push(disk);
    }
    let booted = prepared.boot(rig, lab).await?;
    let mut written = "printf 'on the root disk\\n' >/srv/written".to_owned();
    for (name, file) in names.iter().zip(&files) {
        written.push_str(&format!(" && printf 'on {name}\\n' >{file}"));
    }
    booted.run(&format!("{written} && sync")).await?;
    let mut stream = booted.machine.dial(SSH).await.during("dial")?;
    let stopped = booted.machine.stop(Stop::Graceful { limit: POWER_OFF_LIMIT }).await;
    expect_equal(&stopped.during("press the power button")?, &Exit::PoweredOff, "how the guest ended")?;
    let rest = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut Vec::new())).await;
    ensure!(rest.is_ok(), "expected a connection to end with its machine, but it is still open after 20 s");

    let first = captured(&*booted.machine).await?;
    // What was written before the last capture counts; it is enough that the guest synchronised it.
    let booted = booted.boot_again(rig).await?;
    booted.run("printf 'in the second run\\n' >/srv/again && sync").await?;
    booted.machine.stop(Stop::Kill).await.during("stop the second run")?;
    let mut disks = Vec::new();
    for name in std::iter::once("root").chain(names.iter().map(String::as_str)) {
        let disk = booted.machine.capture(name, &Progress::none()).await;
        disks.push(disk.during(&format!("capture disk {name}"))?);
    }
    ensure!(
        disks[0].content != first.content,
        "expected another digest of a disk that was written to, but found that of the first capture"
    );
    let wanted = draft("written", vec![template("web", disks)]);
    let module = booted.lab.publish(wanted).await.during("publish what was captured")?;
    booted.lab.destroy().await.during("destroy the lab")?;
    drop((stream, booted));
    inherit(rig, &module, &names, &files).await?;
    whole(&module).await?;
    rig.backend().remove_module("written").await.during("remove the module")
}

/// Boots a child of a module, reads what the parent wrote, and overwrites it.
async fn inherit(rig: &Rig, module: &Module, names: &[String], files: &[String]) -> TestResult {
    let lab = rig.lab("child").await?;
    let parent = PlannedSource::BuildRef(PlannedBuildRef {
        module: module.name.clone(),
        digest: module.digest,
        vm: "web".to_owned(),
    });
    let mut prepared = Prepared::new(rig, &*lab, "web", Some(parent.clone())).await?;
    // In another order than before: names matter, not positions.
    for name in names.iter().rev() {
        let mut request = ImportRequest::new("web", name, parent.clone(), None);
        request.parent_disk = Some(name.clone());
        let imported = lab.import(&request, &Progress::none()).await.during("import a second disk")?;
        let disk = MachineDisk { name: name.clone(), bus: Bus::Virtio, volume: imported.volume };
        prepared.spec.disks.push(disk);
    }
    let booted: Booted = prepared.boot(rig, lab).await?;
    expect_equal(&booted.run("cat /srv/written").await?.trim(), &"on the root disk", "what a child found")?;
    let again = booted.run("cat /srv/again").await?;
    expect_equal(&again.trim(), &"in the second run", "what a child found of the second run")?;
    for (name, file) in names.iter().rev().zip(files) {
        let found = booted.run(&format!("head -n 1 {file}")).await?;
        expect_equal(&found.trim(), &format!("on {name}").as_str(), "what a child found on a second disk")?;
        booted.run(&format!("printf 'by the child\\n' >{file} && sync")).await?;
    }
    booted.run("printf 'by the child\\n' >/srv/written && sync").await?;
    booted.lab.destroy().await.during("destroy the lab of the child")
}
