//! A running guest, and the ways to access it.

use super::{
    TestResult,
    rig::{Rig, SSH, nic},
    streams::greeted,
    test_result::{During as _, ensure},
};
use crate::{
    backend::{ImportRequest, Lab, Machine, MachineDisk, MachineSpec, Progress},
    event::CommandStatus,
    guest::{BuildKey, Endpoint, Guest, Login, Session},
    media::cloud_init::{SeedLogin, seed},
    plan::{PlannedCloudInit, PlannedSource},
};
use std::{sync::Arc, time::Duration};

/// A port that machines are created with, and on which no guest listens: discard (RFC 863).
pub(super) const CLOSED: u16 = 9;
/// A running machine with the adapter's guest, and a login.
#[derive(Debug)]
pub(super) struct Booted {
    pub(super) lab: Arc<dyn Lab>,
    pub(super) machine: Arc<dyn Machine>,
    login: Login,
    session: Session,
    /// Whether the echo service was started.
    pub(super) echoes: tokio::sync::Mutex<bool>,
}

/// A key, and the specification of a machine that accepts it.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) spec: MachineSpec,
    pub(super) key: BuildKey,
    pub(super) login: Login,
    /// Maximum time from power-on to a login.
    pub(super) boots_within: Duration,
}

impl Prepared {
    /// The user that logs in.
    pub(super) const USER: &str = "root";

    /// Prepares a machine with the adapter's guest, from this source or from the guest's own image.
    pub(super) async fn new(
        rig: &Rig,
        lab: &dyn Lab,
        name: &str,
        source: Option<PlannedSource>,
    ) -> TestResult<Self> {
        let image = rig.image()?;
        let source = source.unwrap_or(PlannedSource::Url(image.image));
        let request = ImportRequest::new(name, "root", source, None);
        let imported = lab.import(&request, &Progress::none()).await.during("import the guest's image")?;
        let mut spec = MachineSpec::new(name, image.cpus, image.memory);
        spec.disks.push(MachineDisk { name: "root".to_owned(), bus: image.bus, volume: imported.volume });
        spec.nics.push(nic(lab, name, image.nic));
        spec.ports = vec![SSH, CLOSED];
        spec.ports.extend(image.echo.iter().map(|echo| echo.port));
        let key = BuildKey::generate();
        let seed_login = SeedLogin::new(Self::USER, key.authorized_key());
        let instance = format!("{}-{name}", lab.id());
        let seeded = seed(&instance, name, &seed_login, &PlannedCloudInit::default());
        spec.seed = Some(seeded.during("create a seed")?);
        let login = Login::new(Self::USER, key.clone());
        Ok(Self { spec, key, login, boots_within: image.boots_within })
    }

    /// Creates the machine, starts it, and logs in.
    pub(super) async fn boot(self, rig: &Rig, lab: Arc<dyn Lab>) -> TestResult<Booted> {
        let machine = lab.create_machine(&self.spec).await.during("create a machine")?;
        machine.start().await.during("start a machine")?;
        greeted(&*machine, SSH, self.boots_within).await?;
        Booted::log_in(rig, lab, machine, self.login).await
    }
}

impl Booted {
    /// Logs in to a machine that was started.
    pub(super) async fn log_in(
        rig: &Rig,
        lab: Arc<dyn Lab>,
        machine: Arc<dyn Machine>,
        login: Login,
    ) -> TestResult<Self> {
        let endpoint = Endpoint::of(Arc::clone(&machine), SSH);
        let limit = rig.image()?.boots_within;
        let session = Session::open(endpoint, login.clone(), limit).await.during("log in to the guest")?;
        Ok(Self { lab, machine, login, session, echoes: tokio::sync::Mutex::default() })
    }

    /// Starts a machine that has ended, and logs in.
    pub(super) async fn boot_again(self, rig: &Rig) -> TestResult<Self> {
        let Self { lab, machine, login, .. } = self;
        machine.start().await.during("start a machine again")?;
        greeted(&*machine, SSH, rig.image()?.boots_within).await?;
        Self::log_in(rig, lab, machine, login).await
    }

    /// Returns the connection.
    pub(super) fn guest(&self) -> &Guest {
        self.session.guest()
    }

    /// Runs a command, which must succeed, and returns its output.
    pub(super) async fn run(&self, command: &str) -> TestResult<String> {
        let output = self.guest().command(command).await.during(&format!("run {command:?} in the guest"))?;
        ensure!(
            output.status == CommandStatus::Code(0),
            "{command:?} in the guest: expected success, but found {:?}: {}{}",
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }
}
