//! The backend as the engine uses it: what a guest answers, how machines live and die, and that nothing is left.

#![allow(clippy::unwrap_used)]

use super::{Execution, Fault, Guest, MemoryBackend, Operation, Response};
use crate::{
    ErrorKind,
    backend::{
        Backend, Exit, ImportRequest, Lab, LabSpec, Machine, MachineDisk, MachineSpec, ModuleDraft, Progress,
        Retention, Seed, Stop,
    },
    digest::Digest,
    event::CommandStatus,
    fetch::FetchRequest,
    guest::{self, BuildKey, Content, Endpoint, Login, Script},
    hardware::{Bus, Firmware},
    module::{Provenance, TemplateMachine},
    plan::{PlannedBuildRef, PlannedNetwork, PlannedSource, PlannedUrl},
    secret::Secret,
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use russh::{ChannelMsg, client, keys::PublicKeyOrCertificate};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

const SSH: u16 = 22;
const MINUTE: Duration = Duration::from_secs(60);

struct Rig {
    backend: MemoryBackend,
    lab: Arc<dyn Lab>,
    machine: Arc<dyn Machine>,
    key: BuildKey,
}

fn image() -> PlannedSource {
    PlannedSource::Url(PlannedUrl { url: "https://images.example/a.qcow2".parse().unwrap(), sha256: None })
}

/// Opens a lab with one machine `web`, defined and not started.
async fn rig(backend: MemoryBackend, source: PlannedSource) -> Rig {
    let mut spec = LabSpec::new("test", PlannedNetwork::default());
    spec.retention = Retention::MayBeKept;
    let lab = backend.open_lab(&spec).await.unwrap();
    let key = BuildKey::generate();
    let request = ImportRequest::new("web", "rootdisk", source, Some(4 << 30));
    let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
    let mut spec = MachineSpec::new("web", 1, 1 << 30);
    spec.disks = vec![MachineDisk { name: "rootdisk".into(), bus: Bus::Virtio, volume }];
    spec.ports = vec![SSH];
    let meta_data = format!("public-keys:\n- {:?}\n", key.authorized_key());
    spec.seed = Some(Seed::new(meta_data, Vec::new(), None, Arc::from([])));
    let machine = lab.create_machine(&spec).await.unwrap();
    Rig { backend, lab, machine, key }
}

async fn started(guest: impl FnOnce(Guest) -> Guest) -> Rig {
    let rig = rig(MemoryBackend::new().machine("web", guest), image()).await;
    rig.machine.start().await.unwrap();
    rig
}

/// Returns the exit code of a script, and what it wrote to standard output.
async fn run(guest: &guest::Guest, script: &str) -> (u32, String) {
    let output = guest.command(script).await.unwrap();
    let CommandStatus::Code(code) = output.status else { panic!("{script}: {:?}", output.status) };
    (code, output.stdout)
}

impl Rig {
    async fn connect(&self, login: Login) -> crate::Result<guest::Guest> {
        login.connect(&Endpoint::of(self.machine.clone(), SSH), MINUTE).await
    }

    async fn login_as(&self, user: &str) -> guest::Guest {
        self.connect(Login::new(user, self.key.clone())).await.unwrap()
    }

    async fn login(&self) -> guest::Guest {
        self.login_as("root").await
    }

    /// Returns the disk as JSON: an object of paths.
    fn files(&self) -> serde_json::Value {
        let core = self.backend.shared.registry().labs.values().next().unwrap().core().unwrap();
        core.machines()[0].with_files(|tree| serde_json::to_value(tree).unwrap()).unwrap()
    }

    async fn finish(self) {
        self.lab.destroy().await.unwrap();
        self.lab.destroy().await.unwrap();
        assert_eq!(self.backend.leftovers().await, Vec::<String>::new());
    }
}

#[tokio::test(start_paused = true)]
async fn only_known_keys_and_passwords_are_accepted() {
    let rig = started(|guest| guest.password("root", "right")).await;
    rig.login().await;
    let with = |password: Option<&str>| {
        rig.connect(Login::new("root", BuildKey::generate()).password(password.map(Secret::new)))
    };
    assert_eq!(with(None).await.unwrap_err().kind(), ErrorKind::Authentication);
    assert_eq!(with(Some("wrong")).await.unwrap_err().kind(), ErrorKind::Authentication);
    with(Some("right")).await.unwrap();
    rig.finish().await;

    let rig = started(|guest| guest.password("root", "right").rejects_credentials()).await;
    let login = Login::new("root", rig.key.clone()).password(Some(Secret::new("right")));
    assert_eq!(rig.connect(login).await.unwrap_err().kind(), ErrorKind::Authentication);
    rig.finish().await;
}

/// Trusts every host.
struct Anyone;

impl client::Handler for Anyone {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

#[tokio::test]
async fn other_ssh_clients_get_the_same_responses() {
    let rig = started(|guest| guest.password("me", "right").on("id", Response::ok("me\n").exit(3))).await;
    let stream = rig.machine.dial(SSH).await.unwrap();
    let mut client = client::connect_stream(Arc::default(), stream, Anyone).await.unwrap();
    assert!(client.authenticate_password("me", "right").await.unwrap().success());
    let mut channel = client.channel_open_session().await.unwrap();
    channel.exec(true, "id").await.unwrap();
    let mut said = Vec::new();
    while let Some(message) = channel.wait().await {
        match message {
            ChannelMsg::Data { data } => said.extend_from_slice(&data),
            ChannelMsg::ExitStatus { exit_status } => assert_eq!(exit_status, 3),
            _ => {}
        }
    }
    assert_eq!(said, b"me\n");
    drop((channel, client));
    rig.finish().await;
}

#[tokio::test]
async fn the_first_matching_rule_responds() {
    let rig = started(|guest| {
        guest
            .on("apt-get", Response::ok("one\n").stderr("two\n").exit(3).times(1))
            .on("apt-get", Response::ok("again\n"))
            .answers(|execution| Some(Response::ok(&*execution.user)).filter(|_| execution.script == "id"))
            .on("segfault", Response::ok("").signal("SEGV"))
    })
    .await;
    let guest = rig.login_as("web").await;
    let first = guest.command("apt-get install nginx").await.unwrap();
    assert_eq!((first.status, &*first.stdout, &*first.stderr), (CommandStatus::Code(3), "one\n", "two\n"));
    assert_eq!(run(&guest, "apt-get install nginx").await, (0, "again\n".into()));
    assert_eq!(run(&guest, "id").await.1, "web\n");
    assert_eq!(guest.command("segfault").await.unwrap().status, CommandStatus::Signal("SEGV".into()));
    assert_eq!(run(&guest, "exit 3").await, (0, String::new()));
    let asked = rig.backend.executions("web");
    let asked: Vec<&str> = asked.iter().map(|execution| &*execution.script).collect();
    assert_eq!(asked[1..], ["apt-get install nginx", "id", "segfault", "exit 3"]);
    drop(guest);
    rig.finish().await;
}

#[tokio::test]
async fn a_script_arrives_with_its_environment() {
    let rig = started(|guest| guest.on("sudo -E", Response::fails(7, "no\n"))).await;
    let guest = rig.login_as("web").await;
    let env = BTreeMap::from([("NAME".to_owned(), "it's\n\"odd\"".to_owned())]);
    let script = Script::new("#!/bin/sh\necho $NAME\n").env(env.clone());
    assert_eq!(guest.run(&script, |_, _| {}).await.unwrap(), CommandStatus::Code(0));
    let elevated = script.clone().execute_command(Some("sudo -E {{ .Command }}".into()));
    assert_eq!(guest.run(&elevated, |_, _| {}).await.unwrap(), CommandStatus::Code(7));
    let expected = [None, Some("sudo -E {{.Command}}")].map(|execute_command| Execution {
        user: "web".into(),
        script: script.text.to_string(),
        env: env.clone(),
        execute_command: execute_command.map(str::to_owned),
    });
    assert_eq!(rig.backend.executions("web"), expected);
    drop(guest);
    rig.finish().await;
}

#[tokio::test]
async fn files_are_uploaded_with_and_without_sftp() {
    let big: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    for way in [|guest: Guest| guest, Guest::without_sftp] {
        let rig = started(|guest| {
            way(guest).file("/srv/taken/x", "").on("show", Response::ok("").reads("/srv/a b/c"))
        })
        .await;
        // What the user may not write is copied by root.
        for user in ["root", "web"] {
            let guest = rig.login_as(user).await;
            guest.upload(Content::Bytes(user.as_bytes()), "/srv/a b/c").await.unwrap();
            assert_eq!(run(&guest, "show").await.1, format!("{user}\n"));
            guest.upload(Content::Bytes(&big), "/tmp/new/big").await.unwrap();
            let refused = guest.upload(Content::Bytes(b"x"), "/srv/taken").await.unwrap_err();
            assert!(refused.to_string().ends_with("but found a directory"), "{refused}");
            guest.settle(MINUTE).await;
        }
        let files = rig.files();
        assert_eq!(files["/tmp/new/big"]["data"], BASE64.encode(&big));
        assert!(!files.to_string().contains("rudder"), "nothing temporary is left");
        rig.finish().await;
    }
}

#[tokio::test]
async fn a_guest_reports_its_hardware() {
    let rig = started(|guest| {
        guest
            .on("write", Response::ok("").writes("/dev/ttyS0", "on the console\n"))
            .answers(|execution| Some(Response::ok("").reads(&*execution.script)))
    })
    .await;
    let guest = rig.login().await;
    assert_eq!(run(&guest, "write").await.0, 0);
    assert_eq!(rig.machine.serial_tail(15).await.unwrap(), b"on the console\n");
    assert_eq!(run(&guest, "/etc/hostname").await.1, "web\n");
    assert_eq!(run(&guest, "/proc/cpuinfo").await.1.matches("processor").count(), 1);
    assert_eq!(run(&guest, "/proc/meminfo").await.1, "MemTotal: 1048576 kB\n");
    assert_eq!(run(&guest, "/proc/partitions").await.1, "254 0 4194304 rootdisk\n");
    for missing in ["/dev/vdb", "/dev/sr0", "/dev/fd0", "/missing"] {
        assert_eq!(run(&guest, missing).await.0, 1, "{missing}");
    }
    drop(guest);
    rig.finish().await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_changes_the_boot_identity_and_keeps_the_files() {
    let rig = started(|guest| {
        guest
            .boot_delay(MINUTE)
            .reboot_linger(Duration::from_secs(5))
            .on("keep", Response::ok("").writes("/root/kept", "kept\n"))
            .on("look", Response::ok("").reads("/root/kept"))
    })
    .await;
    assert_eq!(rig.machine.dial(SSH).await.map(drop).unwrap_err().kind(), ErrorKind::GuestUnreachable);
    tokio::time::sleep(MINUTE).await;
    let guest = rig.login().await;
    let before = guest.boot_id().await.unwrap();
    assert_eq!(before.len(), 36);
    assert_eq!(run(&guest, "keep").await.0, 0);
    assert_eq!(run(&guest, "sudo reboot").await.0, 0);
    // The old server still answers, as it does on a real system.
    assert_eq!(rig.login().await.boot_id().await.unwrap(), before);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(guest.is_closed() && rig.machine.dial(SSH).await.is_err());
    tokio::time::sleep(MINUTE).await;
    let guest = rig.login().await;
    assert_ne!(guest.boot_id().await.unwrap(), before);
    assert_eq!(run(&guest, "look").await.1, "kept\n");
    drop(guest);
    rig.finish().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_can_be_powered_off_in_every_way() {
    let rig = started(|guest| guest).await;
    for command in ["sudo poweroff", "shutdown -h now"] {
        assert_eq!(run(&rig.login().await, command).await.0, 0);
        assert_eq!(rig.machine.wait().await.unwrap(), Exit::PoweredOff);
        rig.machine.start().await.unwrap();
    }
    rig.login_as("web").await.power_off().await.unwrap();
    assert_eq!(rig.machine.wait().await.unwrap(), Exit::PoweredOff);
    rig.machine.start().await.unwrap();
    assert_eq!(rig.machine.stop(Stop::Graceful { limit: MINUTE }).await.unwrap(), Exit::PoweredOff);
    rig.finish().await;
}

#[tokio::test]
async fn streams_break_and_commands_hang() {
    let rig = started(|guest| {
        guest.on("hang", Response::ok("begun\n").hangs()).on("cut", Response::ok("").cuts_the_stream())
    })
    .await;
    let guest = rig.login().await;
    let (begun, mut has_begun) = tokio::sync::mpsc::unbounded_channel();
    let mut heard = move |_, line: &str| drop(begun.send(line.to_owned()));
    tokio::select! {
        ended = guest.shell_line("hang", &mut heard) => panic!("{ended:?}"),
        line = has_begun.recv() => assert_eq!(line.unwrap(), "begun"),
    }
    assert_eq!(rig.backend.inventory().tasks, 1);
    assert_eq!(guest.command("cut").await.unwrap_err().kind(), ErrorKind::GuestUnreachable);
    rig.finish().await;

    let rig = started(|guest| guest.breaks_streams_after(10_000)).await;
    let guest = rig.login().await;
    guest.upload(Content::Bytes(&[0; 100_000]), "/tmp/big").await.unwrap_err();
    guest.closed(MINUTE).await;
    rig.finish().await;
}

/// Builds a module `base` from the rig's machine.
async fn publish(rig: &Rig) -> crate::module::Module {
    rig.machine.stop(Stop::Graceful { limit: Duration::from_secs(60) }).await.unwrap();
    let disk = rig.machine.capture("rootdisk", &Progress::none()).await.unwrap();
    let machine = TemplateMachine {
        name: "web".into(),
        cpus: 1,
        memory: 1 << 30,
        firmware: Firmware::Bios,
        tpm: false,
        nics: Vec::new(),
        disks: vec![disk],
        state: Vec::new(),
        invisible: false,
    };
    let provenance = Provenance::new("vms: []", Digest::of(b"plan"));
    let draft = ModuleDraft::new("base", vec![machine], PlannedNetwork::default(), provenance);
    rig.lab.publish(draft).await.unwrap()
}

#[tokio::test]
async fn a_child_has_the_files_of_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let backend = MemoryBackend::new()
        .store(directory.path())
        .unwrap()
        .machine("web", |guest| guest.on("write", Response::ok("").writes("/srv/file", "inherited\n")));
    let parent = rig(backend, image()).await;
    parent.machine.start().await.unwrap();
    run(&parent.login().await, "write").await;
    assert_eq!(
        parent.machine.capture("rootdisk", &Progress::none()).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );
    let module = publish(&parent).await;
    assert_eq!(module.path.as_deref(), Some(directory.path().join("memory/base/module.json").as_path()));
    parent.finish().await;

    // Another process would find it in the same directory.
    let backend = MemoryBackend::new()
        .store(directory.path())
        .unwrap()
        .machine("web", |guest| guest.on("read", Response::ok("").reads("/srv/file")));
    assert_eq!(backend.modules().await.unwrap(), std::slice::from_ref(&module));
    assert_eq!(backend.read_file("base", "web", "/srv/file").unwrap(), b"inherited\n");
    let source = PlannedBuildRef { module: "base".into(), digest: module.digest, vm: "web".into() };
    let child = rig(backend.clone(), PlannedSource::BuildRef(source)).await;
    child.machine.start().await.unwrap();
    assert_eq!(run(&child.login().await, "read").await.1, "inherited\n");
    assert_eq!(backend.remove_module("base").await.unwrap_err().kind(), ErrorKind::Conflict);
    child.finish().await;
    backend.remove_module("base").await.unwrap();
    assert_eq!(backend.remove_module("base").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!directory.path().join("memory/base").exists());
}

#[tokio::test(start_paused = true)]
async fn imports_fail_as_requested() {
    let url = "https://images.example/a.qcow2";
    let fault = Fault::new(ErrorKind::Download, "expected status 200, but found 404").times(1);
    let backend = MemoryBackend::new()
        .fails(Operation::Import, fault)
        .source(url, |source| source.virtual_size(8 << 30).takes(Duration::from_secs(100)).wrong_checksum());
    let lab = backend.open_lab(&LabSpec::new("test", PlannedNetwork::default())).await.unwrap();
    let import = |size, sha256| {
        let source = PlannedSource::Url(PlannedUrl { url: url.parse().unwrap(), sha256 });
        let lab = lab.clone();
        async move { lab.import(&ImportRequest::new("web", "rootdisk", source, size), &Progress::none()).await }
    };
    assert_eq!(import(None, None).await.unwrap_err().kind(), ErrorKind::Download);
    let begin = tokio::time::Instant::now();
    let imported = import(None, None).await.unwrap();
    assert_eq!((imported.volume.virtual_size, begin.elapsed().as_secs()), (8 << 30, 100));
    assert_eq!(import(Some(1 << 30), None).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(import(None, Some(Digest::of(b""))).await.unwrap_err().kind(), ErrorKind::ChecksumMismatch);
    lab.destroy().await.unwrap();
    assert_eq!(import(None, None).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test]
async fn fetched_files_are_removed_once_they_are_unused() {
    let url: url::Url = "https://files.example/app.tar".parse().unwrap();
    let backend = MemoryBackend::new().source(url.as_str(), |source| source.contents("bytes"));
    let wanted = PlannedUrl { url, sha256: Some(Digest::of(b"bytes")) };
    let fetched = backend.fetcher().fetch(&FetchRequest::new(wanted), &Progress::none()).await.unwrap();
    assert_eq!(
        (std::fs::read(&fetched.path).unwrap(), fetched.input.content.size),
        (b"bytes".to_vec(), Some(5))
    );
    let path = fetched.path.clone();
    drop(fetched);
    assert!(!path.exists());
}
