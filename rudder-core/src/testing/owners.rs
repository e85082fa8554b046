//! Who owns a lab, and what becomes of it when the owner dies: reaped when dead, never while living.

use super::{
    Adapter, NotPassed, Owners, Rig, Verdict,
    rig::eventually,
    verdict::{During as _, ensure, fail, refused},
};
use crate::{
    Error, ErrorKind,
    backend::{Backend, LabId},
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

/// Set for a process that shall call [`own`]; its value says what the owner does.
pub const OWNER_VARIABLE: &str = "RUDDER_SUITE_OWNER";

/// Begins the line in which an owner tells the id of its lab.
const TELLS: &str = "rudder-suite-lab ";

/// Plays an owner of a lab, in a process of its own, until it is killed or its standard input ends. Returns when that did
/// not work.
pub async fn own(adapter: Arc<dyn Adapter>) -> NotPassed {
    // Whoever started this is gone when the input ends: nothing may outlive it.
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
            other => fail!("expected a role in {OWNER_VARIABLE}, but found {other:?}"),
        };
        let said = writeln!(std::io::stdout(), "{TELLS}{}", lab.id());
        said.map_err(|error| Error::io("tell the id of the lab", error))?;
        std::future::pending::<Verdict>().await
    };
    match played.await {
        Ok(()) => NotPassed::Failed("it ended".to_owned()),
        Err(problem) => problem,
    }
}

/// Somebody else's lab.
struct Owned {
    id: LabId,
    owner: Owner,
}

enum Owner {
    Process(Box<Child>),
    Handle(Arc<dyn crate::backend::Lab>, Arc<dyn crate::backend::Machine>),
}

impl Owned {
    /// A lab with a running machine, of somebody else.
    async fn new(rig: &Rig) -> Verdict<Self> {
        match rig.adapter().owners() {
            Owners::Process(command) => Self::spawn(command).await,
            Owners::Handle => {
                let lab = rig.lab("owned").await?;
                let machine = rig.running(&*lab, "web").await?;
                Ok(Self { id: lab.id().clone(), owner: Owner::Handle(lab, machine) })
            }
        }
    }

    async fn spawn(command: std::process::Command) -> Verdict<Self> {
        let mut command = Command::from(command);
        command.env(OWNER_VARIABLE, "hold").kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|error| Error::io("start an owner", error))?;
        let stdout = child.stdout.take();
        let mut said = String::new();
        let told = async {
            let mut lines = BufReader::new(stdout?).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some((_, id)) = line.split_once(TELLS) {
                    let id = LabId::parse(id.trim()).ok();
                    // What it says afterwards is nobody's business, and must not stop it.
                    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                    return id;
                }
                said.push_str(&line);
                said.push('\n');
            }
            None
        };
        match tokio::time::timeout(Duration::from_secs(60), told).await {
            Ok(Some(id)) => Ok(Self { id, owner: Owner::Process(Box::new(child)) }),
            _ => fail!("expected the owner to tell the id of its lab, but it said:\n{said}"),
        }
    }

    /// The owner dies without a word.
    async fn die(self) -> Verdict<LabId> {
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

/// What an owner that was killed left is gone after `reap`, also when several reap at once.
pub async fn what_a_dead_owner_left_is_reaped(rig: &Rig) -> Verdict {
    let owned = Owned::new(rig).await?;
    ensure!(!rig.left().await?.is_empty(), "expected traces of a lab with a machine, but found none");
    owned.die().await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    // The system may take a moment to notice a death.
    let gone = eventually(rig.options().settle, || async {
        let (one, two) = futures::join!(rig.backend().reap(), another.reap());
        for report in [one.during("reap")?, two.during("reap beside another")?] {
            ensure!(report.failed.is_empty(), "reap: expected no failure, but found {:?}", report.failed);
        }
        Ok(rig.left().await?.is_empty())
    });
    gone.await?;
    rig.expect_nothing_left("after a dead owner's lab was reaped").await
}

/// What a living owner has is never reaped, nor removed, by nobody.
pub async fn a_living_owner_is_never_reaped(rig: &Rig) -> Verdict {
    let owned = Owned::new(rig).await?;
    let lab = rig.lab("mine").await?;
    let machine = rig.running(&*lab, "web").await?;
    let another = rig.adapter().another().await.during("open the backend once more")?;
    for backend in [rig.backend(), &*another] {
        spares(backend, &[&owned.id, lab.id()]).await?;
    }
    let waited = tokio::time::timeout(Duration::from_millis(200), machine.wait()).await;
    ensure!(waited.is_err(), "expected a machine of a living owner to run on, but found {waited:?}");
    if let Owner::Handle(_, machine) = &owned.owner {
        let waited = tokio::time::timeout(Duration::from_millis(200), machine.wait()).await;
        ensure!(waited.is_err(), "expected a machine of a living owner to run on, but found {waited:?}");
    }
    let id = owned.id.clone();
    let traces = rig.left().await?;
    ensure!(
        traces.iter().any(|line| line.contains(id.as_str())),
        "expected the lab of a living owner to be there, but found only {traces:?}"
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

async fn spares(backend: &dyn Backend, ids: &[&LabId]) -> Verdict {
    let report = backend.reap().await.during("reap while owners live")?;
    ensure!(report.removed.is_empty(), "expected nothing to be reaped, but found {:?}", report.removed);
    for id in ids {
        let removed = backend.remove_lab(id).await;
        refused(removed, ErrorKind::Conflict, "remove the lab of a living owner")?;
    }
    let kept = backend.kept_labs().await.during("list kept labs")?;
    ensure!(kept.is_empty(), "expected no kept lab, but found {kept:?}");
    Ok(())
}
