//! The owners of labs, and what happens to a lab when its owner dies: it is reaped when the owner is dead, and never
//! while it lives.

use super::{
    Adapter, NotPassed, Owners, Rig, TestResult,
    kept::{stay, stay_with_a_guest},
    modules::{captured, draft, halted, published, template, whole},
    rig::eventually,
    test_result::{During as _, ensure, expect_equal, fail, refused},
};
use crate::{
    Error, ErrorKind,
    backend::{Backend, Lab, LabId, LabState, Machine},
};
use std::{
    env,
    io::{Read as _, Write as _},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// The environment variable of a process that must call [`own`]; its value selects what the owner does.
pub const OWNER_VARIABLE: &str = "RUDDER_SUITE_OWNER";

/// The roles of an owner whose lab outlives it: with a machine that need not boot, and with a guest.
pub(super) const STAYS: &str = "stay";
pub(super) const STAYS_WITH_A_GUEST: &str = "stay-with-a-guest";

/// Prefix of the line in which an owner writes the id of its lab, once it has done what was requested.
const ID_PREFIX: &str = "rudder-suite-lab ";
/// How long an owner may take until it reports that it is ready: it may have to boot a guest on a slow host.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// How long an owner may run after it began to publish, before it is killed, in ms.
const PUBLISHING_DELAYS: [u64; 6] = [0, 1, 3, 8, 20, 60];

/// Acts as the owner of a lab, in a process of its own, until it is killed or its standard input ends. Returns only on
/// failure.
pub async fn own(adapter: Arc<dyn Adapter>) -> NotPassed {
    // When the input ends, the parent process is gone: this process must not outlive it.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let rig = Rig::new(adapter, super::Options::new());
    let played = async {
        let role = env::var(OWNER_VARIABLE).unwrap_or_default();
        let lab = match role.as_str() {
            "hold" => {
                let lab = rig.lab("owned").await?;
                rig.running(&*lab, "web").await?;
                lab
            }
            "publish" => {
                let lab = rig.lab("owned").await?;
                let machine = halted(&rig, &*lab, "new").await?;
                loop {
                    let disk = captured(&*machine).await?;
                    report_id(lab.id())?;
                    let wanted = draft("base", vec![template("new", vec![disk])]);
                    lab.publish(wanted).await.during("publish")?;
                }
            }
            STAYS => stay(&rig).await?,
            STAYS_WITH_A_GUEST => stay_with_a_guest(&rig).await?,
            other => fail!("expected a role in {OWNER_VARIABLE}, but found {other:?}"),
        };
        report_id(lab.id())?;
        std::future::pending::<TestResult>().await
    };
    match played.await {
        Ok(()) => NotPassed::Failed("it ended".to_owned()),
        Err(problem) => problem,
    }
}

fn report_id(id: &LabId) -> TestResult {
    let said = writeln!(std::io::stdout(), "{ID_PREFIX}{id}");
    Ok(said.map_err(|error| Error::io("report the id of the lab", error))?)
}

/// A lab with another owner.
pub(super) struct Owned {
    pub(super) id: LabId,
    owner: Owner,
}

enum Owner {
    Process(Box<Child>),
    Handle(Arc<dyn Lab>, Option<Arc<dyn Machine>>),
}

impl Owned {
    /// Opens a lab with a running machine for another owner.
    async fn new(rig: &Rig) -> TestResult<Self> {
        match rig.adapter().owners() {
            Owners::Process(command) => Self::spawn(command, "hold").await,
            Owners::Handle => {
                let lab = rig.lab("owned").await?;
                let machine = rig.running(&*lab, "web").await?;
                Ok(Self { id: lab.id().clone(), owner: Owner::Handle(lab, Some(machine)) })
            }
        }
    }

    /// Opens a lab that outlives another owner, who plays this role.
    pub(super) async fn of_a_lab_that_stays(rig: &Rig, role: &str) -> TestResult<Self> {
        let lab = match rig.adapter().owners() {
            Owners::Process(command) => return Self::spawn(command, role).await,
            Owners::Handle if role == STAYS => stay(rig).await?,
            Owners::Handle => stay_with_a_guest(rig).await?,
        };
        Ok(Self { id: lab.id().clone(), owner: Owner::Handle(lab, None) })
    }

    /// Starts a process for this role. Returns once it reports that it is ready.
    async fn spawn(command: std::process::Command, role: &str) -> TestResult<Self> {
        let mut command = Command::from(command);
        command.env(OWNER_VARIABLE, role).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|error| Error::io("start an owner", error))?;
        let stdout = child.stdout.take();
        let mut said = String::new();
        let reported = async {
            let mut lines = BufReader::new(stdout?).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some((_, id)) = line.split_once(ID_PREFIX) {
                    let id = LabId::parse(id.trim()).ok();
                    // Its further output is discarded, so that it never blocks.
                    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                    return id;
                }
                said.push_str(&line);
                said.push('\n');
            }
            None
        };
        match tokio::time::timeout(READY_WITHIN, reported).await {
            Ok(Some(id)) => Ok(Self { id, owner: Owner::Process(Box::new(child)) }),
            _ => fail!("expected the owner to report the id of its lab, but it wrote:\n{said}"),
        }
    }

    /// Kills the owner without warning.
    pub(super) async fn die(self) -> TestResult<LabId> {
        match self.owner {
            Owner::Process(mut child) => {
                let killed = child.kill().await;
                killed.map_err(|error| Error::io("kill the owner", error))?;
            }
            Owner::Handle(lab, machine) => drop((lab, machine)),
        }
        Ok(self.id)
    }
}

/// What a killed owner left is gone after `reap`, even when several processes reap at once.
pub async fn resources_of_a_dead_owner_are_reaped(rig: &Rig) -> TestResult {
    let owned = Owned::new(rig).await?;
    ensure!(!rig.left().await?.is_empty(), "expected traces of a lab with a machine, but found none");
    owned.die().await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    // The system may take a moment to notice a death.
    let gone = eventually(rig.options().settle, || async {
        let (one, two) = futures::join!(rig.backend().reap(), another.reap());
        for report in [one.during("reap")?, two.during("reap concurrently")?] {
            ensure!(report.failed.is_empty(), "reap: expected no failure, but found {:?}", report.failed);
        }
        Ok(rig.left().await?.is_empty())
    });
    gone.await?;
    rig.expect_nothing_left("after a dead owner's lab was reaped").await
}

/// What belongs to a living owner is never reaped or removed, by any process.
pub async fn a_living_owner_is_never_reaped(rig: &Rig) -> TestResult {
    let owned = Owned::new(rig).await?;
    let lab = rig.lab("mine").await?;
    let machine = rig.running(&*lab, "web").await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        spares(backend, &[&owned.id, lab.id()]).await?;
    }
    let waited = tokio::time::timeout(Duration::from_millis(200), machine.wait()).await;
    ensure!(waited.is_err(), "expected a machine of a living owner to keep running, but found {waited:?}");
    if let Owner::Handle(_, Some(machine)) = &owned.owner {
        let waited = tokio::time::timeout(Duration::from_millis(200), machine.wait()).await;
        ensure!(
            waited.is_err(),
            "expected a machine of a living owner to keep running, but found {waited:?}"
        );
    }
    let id = owned.id.clone();
    let traces = rig.left().await?;
    ensure!(
        traces.iter().any(|line| line.contains(id.as_str())),
        "expected the lab of a living owner to exist, but found only {traces:?}"
    );
    lab.destroy().await.during("destroy the lab")?;
    drop((machine, lab));
    owned.die().await?;
    eventually(rig.options().settle, || async {
        rig.backend().reap().await.during("reap")?;
        Ok(rig.left().await?.is_empty())
    })
    .await?;
    Ok(())
}

async fn spares(backend: &dyn Backend, ids: &[&LabId]) -> TestResult {
    let report = backend.reap().await.during("reap while owners live")?;
    ensure!(report.removed.is_empty(), "expected nothing to be reaped, but found {:?}", report.removed);
    for id in ids {
        let removed = backend.remove_lab(id).await;
        refused(removed, ErrorKind::Conflict, "remove the lab of a living owner")?;
    }
    let labs = backend.labs().await.during("list labs")?;
    for id in ids {
        let found = labs.iter().find(|lab| lab.id == **id).map(|lab| lab.state);
        expect_equal(&found, &Some(LabState::Owned), "the state of a lab with a living owner")?;
        refused(backend.attach(id).await, ErrorKind::Conflict, "attach to the lab of a living owner")?;
    }
    Ok(())
}

/// A publisher may be killed at any moment: the module is either the previous or the new one, complete.
pub async fn a_module_is_complete_if_its_publisher_is_killed(rig: &Rig) -> TestResult {
    let lab = rig.lab("old").await?;
    let old = published(rig, &*lab, "base").await?;
    lab.destroy().await.during("destroy the lab of the old module")?;
    drop(lab);
    // From here on, the traces of the module count as having existed before.
    rig.begin().await?;
    for after in PUBLISHING_DELAYS.map(Duration::from_millis) {
        match rig.adapter().owners() {
            Owners::Process(command) => {
                let owned = Owned::spawn(command, "publish").await?;
                tokio::time::sleep(after).await;
                owned.die().await?;
            }
            Owners::Handle => {
                let lab = rig.lab("owned").await?;
                let machine = halted(rig, &*lab, "new").await?;
                let wanted = draft("base", vec![template("new", vec![captured(&*machine).await?])]);
                let _ = tokio::time::timeout(after, lab.publish(wanted)).await;
            }
        }
        let another = rig.adapter().another().await.during("open the backend once more")?;
        for _ in 0..2 {
            let modules = another.modules().await.during("list modules")?;
            ensure!(
                modules.len() == 1,
                "killed {after:?} into publishing: expected one module, but found {modules:?}"
            );
            let name = &modules[0].machines[0].name;
            ensure!(
                name == "new" || (name == "web" && modules[0].digest == old.digest),
                "killed {after:?} into publishing: expected the old module or the new one, but found {:?}",
                modules[0]
            );
            whole(&modules[0]).await?;
            eventually(rig.options().settle, || async {
                another.reap().await.during("reap")?;
                Ok(rig.left().await?.is_empty())
            })
            .await?;
            rig.expect_nothing_left("after the publisher was killed, and reaping").await?;
        }
    }
    let lab = rig.lab("next").await?;
    let next = published(rig, &*lab, "base").await?;
    lab.destroy().await.during("destroy the lab")?;
    let modules = rig.backend().modules().await.during("list modules")?;
    expect_equal(
        &modules.iter().map(|module| module.digest).collect(),
        &vec![next.digest],
        "the module that was published next",
    )?;
    rig.backend().remove_module("base").await.during("remove the module")
}
