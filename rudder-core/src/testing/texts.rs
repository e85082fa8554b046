//! Names and texts with quotes, commas, spaces and non-ASCII characters: they work unchanged or are refused, and are
//! never changed or interpreted.

use super::{
    NotPassed, Rig, TestResult,
    modules::{draft, template, whole},
    rig::{BLANK, network},
    test_result::{During as _, ensure, expect_equal, fail},
};
use crate::{
    Error, ErrorKind, Result,
    backend::{ImportRequest, Lab, LabSpec, Progress, Stop},
    plan::{PlannedSource, PlannedUrl},
};
use std::time::Duration;

/// Names that are special to a shell, a file system, QEMU's command line, XML, a query or printf.
const UNUSUAL: [&str; 12] = [
    "with a blank",
    "a,b=c,,d",
    "it's \"quoted\"",
    "../../../escape",
    "ünïcödé 🦀",
    "-rf",
    "$(touch pwned) `id`",
    "new\nline",
    "%s%n",
    "<tag>&amp;]]>",
    "back\\slash",
    ".",
];

/// Returns the value, or `None` if the name was refused as invalid; any other error fails the test.
fn or_refused<T>(result: Result<T>, what: &str, name: &str) -> TestResult<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(None),
        Err(error) => fail!(
            "{what} {name:?}: expected it to work or InvalidInput, but found {:?}: {}",
            error.kind(),
            error.report()
        ),
    }
}

/// Labs, machines, disks and modules with odd names work, or the names are refused; neither leaves anything behind.
pub async fn unusual_names_work_or_are_refused(rig: &Rig) -> TestResult {
    for name in UNUSUAL {
        let opened = rig.backend().open_lab(&LabSpec::new(name, network())).await;
        if let Some(lab) = or_refused(opened, "a lab", name)? {
            lab.destroy().await.during("destroy a lab with an unusual name")?;
        }
        let lab = rig.lab("odd").await?;
        machine(rig, &*lab, name).await?;
        module(rig, &*lab, name).await?;
        lab.destroy().await.during("destroy a lab with unusual names in it")?;
        rig.expect_nothing_left(&format!("after the name {name:?}")).await?;
    }
    Ok(())
}

/// The maximum length of a name: a label of the Domain Name System (RFC 1123).
const MAX_LENGTH: usize = 63;

/// Two names of maximum length that differ only in their last character stay distinct: machines, disks and modules.
pub async fn long_names_remain_distinct(rig: &Rig) -> TestResult {
    let names = ["a", "b"].map(|last| format!("{}{last}", "n".repeat(MAX_LENGTH - 1)));
    let lab = rig.lab(&names[0]).await?;
    let mut machines = Vec::new();
    for name in &names {
        let mut spec = rig.bare(&*lab, name).await?;
        spec.disks[0].name.clone_from(name);
        let other = names.iter().find(|other| *other != name).unwrap_or(name);
        spec.disks.push(rig.blank(&*lab, name, other).await?);
        let machine = lab.create_machine(&spec).await.during("create a machine with a long name")?;
        expect_equal(&machine.name(), &name.as_str(), "the name of a machine")?;
        machine.start().await.during("start a machine with a long name")?;
        machines.push(machine);
    }
    machines[0].stop(Stop::Kill).await.during("stop one of two machines")?;
    let waits = tokio::time::timeout(Duration::from_millis(200), machines[1].wait()).await;
    ensure!(waits.is_err(), "expected the other machine to keep running, but found {waits:?}");
    machines[1].stop(Stop::Kill).await.during("stop the other")?;
    for (machine, module) in machines.iter().zip(&names) {
        let mut disks = Vec::new();
        for name in &names {
            let disk =
                machine.capture(name, &Progress::none()).await.during("capture a disk with a long name")?;
            expect_equal(&disk.name, name, "the name of a captured disk")?;
            disks.push(disk);
        }
        let published = lab.publish(draft(module, vec![template(machine.name(), disks)])).await;
        published.during("publish a module with a long name")?;
    }
    lab.destroy().await.during("destroy the lab")?;
    let modules = rig.backend().modules().await.during("list modules")?;
    let found: Vec<_> = modules.iter().map(|module| module.name.clone()).collect();
    expect_equal(&found, &names.to_vec(), "the names of the modules")?;
    for module in &modules {
        expect_equal(&module.machines[0].name, &module.name, "the VM of a module")?;
        whole(module).await?;
        rig.backend().remove_module(&module.name).await.during("remove a module with a long name")?;
    }
    Ok(())
}

/// Creates a machine with a disk and a NIC, all with this name.
async fn machine(rig: &Rig, lab: &dyn Lab, name: &str) -> TestResult {
    let request = ImportRequest::new(name, name, PlannedSource::Blank, Some(BLANK));
    let imported = lab.import(&request, &Progress::none()).await;
    let imported = or_refused(imported, "a disk", name)?;
    let mut spec = rig.bare(lab, "web").await?;
    if let Some(imported) = imported {
        spec.disks[0].volume = imported.volume;
        spec.disks[0].name = name.to_owned();
    }
    spec.nics[0].name = name.to_owned();
    spec.name = name.to_owned();
    let Some(machine) = or_refused(lab.create_machine(&spec).await, "a machine", name)? else {
        return Ok(());
    };
    expect_equal(&machine.name(), &name, "the name of a machine")?;
    machine.start().await.during(&format!("start a machine of the name {name:?}"))?;
    machine.stop(Stop::Kill).await.during("stop it")?;
    if let Some(disk) =
        or_refused(machine.capture(&spec.disks[0].name, &Progress::none()).await, "a captured disk", name)?
    {
        expect_equal(&disk.name, &spec.disks[0].name, "the name of a captured disk")?;
    }
    Ok(())
}

/// Publishes a module with a VM, both with this name.
async fn module(rig: &Rig, lab: &dyn Lab, name: &str) -> TestResult {
    let spec = rig.bare(lab, "good").await?;
    let machine = lab.create_machine(&spec).await.during("create a machine")?;
    machine.start().await.during("start it")?;
    machine.stop(Stop::Kill).await.during("stop it")?;
    let disk = machine.capture("root", &Progress::none()).await.during("capture its disk")?;
    let published = lab.publish(draft(name, vec![template(name, vec![disk])])).await;
    let published = or_refused(published, "a module", name)?;
    let modules = rig.backend().modules().await.during("list modules")?;
    let Some(module) = published else {
        ensure!(modules.is_empty(), "expected no module of the name {name:?}, but found {modules:?}");
        return Ok(());
    };
    expect_equal(&module.name.as_str(), &name, "the name of a module")?;
    expect_equal(&modules, &vec![module.clone()], "the modules")?;
    whole(&module).await?;
    rig.backend().remove_module(name).await.during("remove a module with an unusual name")
}

/// An image is imported from a file with any name, if the adapter's image is a file.
pub async fn an_image_with_an_unusual_name_is_imported(rig: &Rig) -> TestResult {
    let image = rig.image()?.image;
    let Ok(file) = image.url.to_file_path() else {
        return Err(NotPassed::Skipped("the adapter's image is not a file".to_owned()));
    };
    let made = |error| Error::io("create a file with an unusual name", error);
    let directory = tempfile::tempdir().map_err(made)?;
    let unusual = directory.path().join("an \"image\", isn't it= é 🦀 %20&;$(x).img");
    std::os::unix::fs::symlink(file, &unusual).map_err(made)?;
    let Ok(url) = url::Url::from_file_path(&unusual) else { fail!("expected a path that a URL can express") };
    let lab = rig.lab("odd").await?;
    let source = PlannedSource::Url(PlannedUrl { url, sha256: None });
    let request = ImportRequest::new("web", "root", source, None);
    let imported =
        lab.import(&request, &Progress::none()).await.during("import an image with an unusual name")?;
    ensure!(imported.volume.virtual_size > 0, "expected a volume, but found {:?}", imported.volume);
    lab.destroy().await.during("destroy the lab")
}
