//! The backend against a plain SSH client: what a guest answers, how machines live and die, and that nothing is left.

#![allow(clippy::unwrap_used)]

use super::{Fault, Guest, MemoryBackend, Operation, Response, Silence};
use crate::{
    ErrorKind,
    backend::{
        Backend, BoxedStream, Death, Exit, ImportRequest, Lab, LabSpec, Machine, MachineDisk, MachineSpec,
        ModuleDraft, Progress, Retention, Seed, Stop,
    },
    digest::Digest,
    fetch::FetchRequest,
    hardware::{Bus, Firmware},
    module::{Provenance, TemplateMachine},
    plan::{PlannedBuildRef, PlannedNetwork, PlannedSource, PlannedUrl},
};
use russh::{
    ChannelMsg,
    client::{self, AuthResult},
    keys::{Algorithm, PrivateKey, PrivateKeyWithHashAlg},
};
use std::{sync::Arc, time::Duration};
use tokio::io::AsyncReadExt as _;

const SSH: u16 = 22;
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// Trusts every host.
struct Anyone;

impl client::Handler for Anyone {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        _: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

type Client = client::Handle<Anyone>;

struct Rig {
    backend: MemoryBackend,
    lab: Arc<dyn Lab>,
    machine: Arc<dyn Machine>,
    key: Arc<PrivateKey>,
}

fn image() -> PlannedSource {
    PlannedSource::Url(PlannedUrl { url: "https://images.example/a.qcow2".parse().unwrap(), sha256: None })
}

/// A lab with one machine `web`, defined and not started.
async fn rig(backend: MemoryBackend, source: PlannedSource) -> Rig {
    let mut spec = LabSpec::new("test", PlannedNetwork::default());
    spec.retention = Retention::MayBeKept;
    let lab = backend.open_lab(&spec).await.unwrap();
    let key = Arc::new(PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap());
    let request = ImportRequest::new("web", "rootdisk", source, Some(4 << 30));
    let volume = lab.import(&request, &Progress::none()).await.unwrap().volume;
    let mut spec = MachineSpec::new("web", 1, 1 << 30);
    spec.disks = vec![MachineDisk { name: "rootdisk".into(), bus: Bus::Virtio, volume }];
    spec.ports = vec![SSH];
    let meta_data = format!("public-keys:\n- {:?}\n", key.public_key().to_openssh().unwrap());
    spec.seed = Some(Seed::new(meta_data, Vec::new(), None, Arc::from([])));
    let machine = lab.create_machine(&spec).await.unwrap();
    Rig { backend, lab, machine, key }
}

async fn started(guest: impl FnOnce(Guest) -> Guest) -> Rig {
    let rig = rig(MemoryBackend::new().machine("web", guest), image()).await;
    rig.machine.start().await.unwrap();
    rig
}

async fn connect(stream: BoxedStream) -> Client {
    client::connect_stream(Arc::new(client::Config::default()), stream, Anyone).await.unwrap()
}

impl Rig {
    async fn login_as(&self, user: &str) -> Client {
        let mut client = connect(self.machine.dial(SSH).await.unwrap()).await;
        let key = PrivateKeyWithHashAlg::new(self.key.clone(), None);
        assert_eq!(client.authenticate_publickey(user, key).await.unwrap(), AuthResult::Success);
        client
    }

    async fn login(&self) -> Client {
        self.login_as("root").await
    }

    async fn finish(self) {
        self.lab.destroy().await.unwrap();
        self.lab.destroy().await.unwrap();
        assert_eq!(self.backend.leftovers().await, Vec::<String>::new());
    }
}

/// Output, error output and ending ("0", "SEGV", "cut") of a command.
async fn run(client: &Client, command: &str) -> (String, String, String) {
    let mut channel = client.channel_open_session().await.unwrap();
    channel.exec(true, command).await.unwrap();
    channel.eof().await.unwrap();
    let (mut out, mut err, mut end) = (Vec::new(), Vec::new(), "cut".to_owned());
    while let Some(message) = channel.wait().await {
        match message {
            ChannelMsg::Data { data } => out.extend_from_slice(&data),
            ChannelMsg::ExtendedData { data, .. } => err.extend_from_slice(&data),
            ChannelMsg::ExitStatus { exit_status } => end = exit_status.to_string(),
            ChannelMsg::ExitSignal { signal_name, .. } => end = format!("{signal_name:?}"),
            _ => {}
        }
    }
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), end)
}

async fn sftp(client: &Client) -> russh_sftp::client::SftpSession {
    let channel = client.channel_open_session().await.unwrap();
    channel.request_subsystem(true, "sftp").await.unwrap();
    russh_sftp::client::SftpSession::new(channel.into_stream()).await.unwrap()
}

/// As `sftp put`.
async fn upload(client: &Client, path: &str, content: &[u8]) {
    use tokio::io::AsyncWriteExt as _;
    let mut file = sftp(client).await.create(path).await.unwrap();
    file.write_all(content).await.unwrap();
    file.shutdown().await.unwrap();
}

#[tokio::test]
async fn only_known_keys_and_passwords_get_in() {
    let rig = started(|guest| guest.password("root", "right")).await;
    rig.login().await;
    let mut client = connect(rig.machine.dial(SSH).await.unwrap()).await;
    let stranger = Arc::new(PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519).unwrap());
    let answer =
        client.authenticate_publickey("root", PrivateKeyWithHashAlg::new(stranger, None)).await.unwrap();
    assert!(!answer.success());
    assert!(!client.authenticate_password("root", "wrong").await.unwrap().success());
    assert!(client.authenticate_password("root", "right").await.unwrap().success());
    rig.finish().await;
}

#[tokio::test]
async fn a_guest_may_refuse_everyone() {
    let rig = started(|guest| guest.password("root", "right").rejects_credentials()).await;
    let mut client = connect(rig.machine.dial(SSH).await.unwrap()).await;
    let key = PrivateKeyWithHashAlg::new(rig.key.clone(), None);
    assert!(!client.authenticate_publickey("root", key).await.unwrap().success());
    assert!(!client.authenticate_password("root", "right").await.unwrap().success());
    rig.finish().await;
}

#[tokio::test]
async fn rules_answer_for_lines_and_for_the_files_they_run() {
    let rig = started(|guest| {
        guest
            .on("apt-get", Response::ok("one\n").stderr("two\n").exit(3).times(1))
            .on("apt-get", Response::ok("again\n"))
            .on("segfault", Response::ok("").signal("SEGV"))
    })
    .await;
    let client = rig.login().await;
    upload(&client, "/tmp/inner.sh", b"#!/bin/bash\napt-get install nginx\n").await;
    upload(&client, "/tmp/outer.sh", b"if true; then exec bash /tmp/inner.sh; fi\n").await;
    // Files are not run by being moved or removed.
    assert_eq!(run(&client, "chmod 700 /tmp/inner.sh && test -f /tmp/inner.sh").await.2, "0");
    assert_eq!(run(&client, "sudo -n sh /tmp/outer.sh").await, ("one\n".into(), "two\n".into(), "3".into()));
    assert_eq!(run(&client, "/tmp/inner.sh").await, ("again\n".into(), String::new(), "0".into()));
    assert_eq!(run(&client, "segfault now").await.2, "SEGV");
    assert_eq!(run(&client, "rm -rf /tmp/outer.sh /tmp/inner.sh; test -e /tmp/inner.sh").await.2, "1");
    rig.finish().await;
}

#[tokio::test]
async fn simple_scripts_do_what_they_say() {
    let rig = started(|guest| guest.without("bash")).await;
    let client = rig.login_as("web").await;
    let script = "set -e\nexport NAME='a b'\necho \"hello $NAME\" > /tmp/x\ncat /tmp/x\nfalse\necho never\n";
    upload(&client, "/tmp/s", script.as_bytes()).await;
    assert_eq!(run(&client, "sh /tmp/s").await, ("hello a b\n".into(), String::new(), "1".into()));
    assert_eq!(run(&client, "command -v bash || command -v sh").await.0, "/usr/bin/sh\n");
    assert_eq!(run(&client, "bash -c true").await.2, "127");
    let (_, err, end) = run(&client, "mv /tmp/x /etc/x").await;
    assert_eq!((err.as_str(), end.as_str()), ("mv: /tmp/x /etc/x: Permission denied\n", "1"));
    assert_eq!(run(&client, "sudo -n mv /tmp/x /etc/x && stat -c %s /etc/x").await.0, "10\n");
    assert_eq!(
        run(&client, "echo a | tee /tmp/y 2>/dev/null | cat; exit 7").await,
        ("a\n".into(), String::new(), "7".into())
    );
    assert_eq!(run(&client, "sh /tmp/missing").await.2, "127");
    rig.finish().await;
}

#[tokio::test]
async fn files_come_and_go_over_sftp() {
    let rig = started(|guest| guest.file("/etc/motd", "hi")).await;
    let root = rig.login().await;
    let big: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    upload(&root, "/srv/big", &big).await;
    let session = sftp(&root).await;
    assert_eq!(session.read("/srv/big").await.unwrap(), big);
    assert_eq!(session.metadata("/srv/big").await.unwrap().len(), 3_000_000);
    session.create_dir("/srv/d").await.unwrap();
    session.rename("/srv/big", "/srv/d/big").await.unwrap();
    let names: Vec<_> = session.read_dir("/srv/d").await.unwrap().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["big"]);
    assert!(session.remove_dir("/srv/d").await.is_err());
    let user = sftp(&rig.login_as("web").await).await;
    assert_eq!(user.read("/etc/motd").await.unwrap(), b"hi");
    assert!(user.create("/etc/motd").await.err().unwrap().to_string().contains("Permission denied"));
    assert!(user.create("/tmp/no/such").await.is_err());
    rig.finish().await;
}

#[tokio::test(start_paused = true)]
async fn a_reboot_changes_the_boot_identity_and_keeps_the_files() {
    let minute = Duration::from_secs(60);
    let rig = started(|guest| guest.boot_delay(minute).reboot_linger(Duration::from_secs(5))).await;
    assert_eq!(rig.machine.dial(SSH).await.map(drop).unwrap_err().kind(), ErrorKind::GuestUnreachable);
    tokio::time::sleep(minute).await;
    let client = rig.login().await;
    let before = run(&client, BOOT_ID).await.0;
    assert_eq!(before.trim().len(), 36);
    assert_eq!(run(&client, "echo kept > /root/kept; sudo reboot").await.2, "0");
    // The old server still answers, as it does on a real system.
    assert_eq!(run(&rig.login().await, BOOT_ID).await.0, before);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(client.is_closed() && rig.machine.dial(SSH).await.is_err());
    tokio::time::sleep(minute).await;
    let client = rig.login().await;
    assert_ne!(run(&client, BOOT_ID).await.0, before);
    assert_eq!(run(&client, "cat /root/kept").await.0, "kept\n");
    rig.finish().await;
}

#[tokio::test(start_paused = true)]
async fn machines_end_and_say_why() {
    let rig = started(|guest| guest.on("die", Response::ok("").dies(Death::GuestPanic))).await;
    let client = rig.login().await;
    assert_eq!(run(&client, "die").await.2, "cut");
    let Exit::Died { cause, .. } = rig.machine.wait().await.unwrap() else { panic!("it did not die") };
    assert_eq!(cause, Death::GuestPanic);
    let tail = String::from_utf8(rig.machine.serial_tail(100).await.unwrap()).unwrap();
    assert!(tail.ends_with("Kernel panic - not syncing\n"), "{tail}");

    rig.machine.start().await.unwrap();
    assert_eq!(rig.machine.start().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(run(&rig.login().await, "sudo poweroff").await.2, "0");
    assert_eq!(rig.machine.wait().await.unwrap(), Exit::PoweredOff);

    rig.machine.start().await.unwrap();
    let limit = Duration::from_secs(60);
    assert_eq!(rig.machine.stop(Stop::Graceful { limit }).await.unwrap(), Exit::PoweredOff);
    assert_eq!(rig.machine.stop(Stop::Kill).await.unwrap(), Exit::PoweredOff);
    rig.finish().await;
}

#[tokio::test(start_paused = true)]
async fn faults_happen_where_they_were_asked_for() {
    let hour = Duration::from_secs(3600);
    let rig = started(|guest| {
        guest.boot_delay(hour).dies_after_power_on(Death::Hypervisor, hour / 2).recovers_after(1)
    })
    .await;
    assert!(matches!(rig.machine.wait().await.unwrap(), Exit::Died { cause: Death::Hypervisor, .. }));
    rig.machine.start().await.unwrap();
    tokio::time::sleep(hour).await;
    rig.login().await;
    rig.finish().await;

    let rig = started(Guest::ignores_shutdown).await;
    run(&rig.login().await, "poweroff").await;
    let exit = rig.machine.stop(Stop::Graceful { limit: hour }).await.unwrap();
    assert_eq!(exit, Exit::Killed { why: "did not power off within 3600 s".into() });
    rig.finish().await;

    let rig = started(|guest| guest.dies_in_shutdown(Death::IoError)).await;
    let exit = rig.machine.stop(Stop::Graceful { limit: hour }).await.unwrap();
    assert!(matches!(exit, Exit::Died { cause: Death::IoError, .. }));
    rig.finish().await;

    let rig = started(|guest| guest.never_answers(Silence::Refuses)).await;
    assert!(rig.machine.dial(SSH).await.is_err());
    rig.finish().await;

    let rig = started(|guest| guest.never_answers(Silence::Accepts)).await;
    let mut stream = rig.machine.dial(SSH).await.unwrap();
    let silent = tokio::time::timeout(hour, stream.read_u8()).await;
    assert!(silent.is_err());
    rig.finish().await;
}

#[tokio::test]
async fn streams_break_and_commands_hang() {
    let rig = started(|guest| {
        guest.on("hang", Response::ok("begun\n").hangs()).on("cut", Response::ok("").cuts_the_stream())
    })
    .await;
    let client = rig.login().await;
    let mut channel = client.channel_open_session().await.unwrap();
    channel.exec(false, "hang").await.unwrap();
    while !matches!(channel.wait().await.unwrap(), ChannelMsg::Data { .. }) {}
    assert_eq!(rig.backend.inventory().tasks, 1);
    assert_eq!(run(&client, "cut").await.2, "cut");
    rig.finish().await;

    let rig = started(|guest| guest.breaks_streams_after(10_000)).await;
    let client = rig.login().await;
    upload(&client, "/tmp/small", b"small").await;
    let session = sftp(&client).await;
    assert!(
        session.write("/tmp/big", &vec![0; 100_000]).await.is_err()
            || session.read("/tmp/big").await.is_err()
    );
    rig.finish().await;
}

#[tokio::test]
async fn two_labs_with_the_same_names_do_not_meet() {
    let backend = MemoryBackend::new();
    let one = rig(backend.clone(), image()).await;
    let two = rig(backend, image()).await;
    one.machine.start().await.unwrap();
    two.machine.start().await.unwrap();
    run(&one.login().await, "echo one > /root/name").await;
    assert_eq!(run(&two.login().await, "cat /root/name").await.2, "1");
    one.lab.destroy().await.unwrap();
    assert_eq!(run(&two.login().await, "true").await.2, "0");
    two.finish().await;
}

/// Builds a module `base` of the rig's machine.
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
async fn a_child_sees_the_files_of_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let backend = MemoryBackend::new().store(directory.path()).unwrap();
    let parent = rig(backend, image()).await;
    parent.machine.start().await.unwrap();
    run(&parent.login().await, "echo inherited > /srv/file").await;
    assert_eq!(
        parent.machine.capture("rootdisk", &Progress::none()).await.unwrap_err().kind(),
        ErrorKind::Conflict
    );
    let module = publish(&parent).await;
    assert_eq!(module.path.as_deref(), Some(directory.path().join("memory/base/module.json").as_path()));
    parent.finish().await;

    // Another process would find it in the same directory.
    let backend = MemoryBackend::new().store(directory.path()).unwrap();
    assert_eq!(backend.modules().await.unwrap(), std::slice::from_ref(&module));
    assert_eq!(backend.read_file("base", "web", "/srv/file").unwrap(), b"inherited\n");
    let source = PlannedBuildRef { module: "base".into(), digest: module.digest, vm: "web".into() };
    let child = rig(backend.clone(), PlannedSource::BuildRef(source)).await;
    child.machine.start().await.unwrap();
    assert_eq!(run(&child.login().await, "cat /srv/file").await.0, "inherited\n");
    assert_eq!(backend.remove_module("base").await.unwrap_err().kind(), ErrorKind::Conflict);
    child.finish().await;
    backend.remove_module("base").await.unwrap();
    assert_eq!(backend.remove_module("base").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!directory.path().join("memory/base").exists());
}

#[tokio::test]
async fn a_forgotten_lab_ends_and_is_reaped_but_a_kept_one_stays() {
    let Rig { backend, lab, machine, .. } = started(|guest| guest).await;
    drop(lab);
    assert!(matches!(machine.wait().await.unwrap(), Exit::Killed { .. }));
    assert_eq!(backend.inventory().leftovers().len(), 1);
    assert_eq!(backend.reap().await.unwrap().removed.len(), 1);
    assert_eq!(backend.leftovers().await, Vec::<String>::new());

    let Rig { backend, lab, machine, .. } = started(|guest| guest).await;
    assert_eq!(lab.keep().await.unwrap().access.len(), 1);
    let id = lab.id().clone();
    drop((lab, machine));
    assert_eq!(backend.reap().await.unwrap().removed, Vec::<String>::new());
    assert_eq!(backend.inventory().running, [format!("{id}/web")]);
    assert_eq!(backend.kept_labs().await.unwrap().len(), 1);
    backend.remove_lab(&id).await.unwrap();
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn imports_fail_as_they_are_told() {
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
async fn the_serial_console_streams_until_the_machine_ends() {
    let rig = started(|guest| guest.serial("login: ")).await;
    let mut stream = rig.machine.serial().await.unwrap();
    let mut start = [0; 7];
    stream.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"login: ");
    rig.machine.stop(Stop::Kill).await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
    rig.finish().await;
}

#[tokio::test]
async fn fetched_files_are_gone_once_nobody_holds_them() {
    let url: url::Url = "https://files.example/app.tar".parse().unwrap();
    let backend = MemoryBackend::new().source(url.as_str(), |source| source.contents("bytes"));
    let wanted = PlannedUrl { url, sha256: Some(Digest::of(b"bytes")) };
    let fetched = backend.fetcher().fetch(&FetchRequest::new(wanted), &Progress::none()).await.unwrap();
    assert_eq!((std::fs::read(&fetched.path).unwrap(), fetched.input.size), (b"bytes".to_vec(), 5));
    let path = fetched.path.clone();
    drop(fetched);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_reader_of_the_serial_console_goes_on_beyond_what_is_kept() {
    let rig = started(|guest| guest).await;
    let machine = &rig.machine;
    let core =
        rig.backend.shared.registry().labs.values().next().unwrap().core().unwrap().machines().remove(0);
    let mut reader = machine.serial().await.unwrap();
    let piece = vec![b'x'; 64 << 10];
    let mut read = vec![0; piece.len()];
    // More than is kept, taken as it comes; then more at once than is kept.
    for _ in 0..20 {
        core.say(&piece);
        reader.read_exact(&mut read).await.unwrap();
    }
    for _ in 0..20 {
        core.say(&piece);
    }
    core.say(b"the end");
    assert_eq!(machine.serial_tail(7).await.unwrap(), b"the end");
    assert!(machine.serial_tail(usize::MAX).await.unwrap().len() <= 1 << 20);
    machine.stop(Stop::Kill).await.unwrap();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    assert!(rest.ends_with(b"the end"));
}
