//! The SSH server of an in-memory guest: russh on one end of a pipe in this process.

use super::{
    Counted,
    answer::answer,
    machine::{Boot, MachineCore},
    rules::Act,
    script::Guest,
    sftp::Sftp,
    streams,
};
use crate::shell_frame::{Sent, Served};
use russh::{
    Channel, ChannelId, ChannelMsg, MethodKind, MethodSet, Sig,
    keys::PublicKey,
    server::{self, Auth, ChannelOpenHandle, Handle, Msg, PublicKeyOffer, Session, VerifiedPublicKey},
};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::io::DuplexStream;
use tokio_util::sync::CancellationToken;

/// Serves one connection, until either side hangs up or the boot ends.
pub(super) fn serve(machine: Arc<MachineCore>, boot: Boot, stream: DuplexStream) {
    let config = Arc::new(server::Config {
        keys: vec![(*boot.host_key).clone()],
        methods: MethodSet::from([MethodKind::PublicKey, MethodKind::Password].as_slice()),
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        inactivity_timeout: None,
        ..server::Config::default()
    });
    let cut = boot.token.child_token();
    let stream = streams::cuttable(stream, cut.clone(), boot.guest.faults.stream_limit);
    let connection = machine.shared.connection();
    let session = Connection {
        machine,
        boot,
        cut,
        user: String::new(),
        channels: HashMap::new(),
        _counted: connection,
    };
    tokio::spawn(async move {
        // The client notices an error when its stream ends.
        if let Ok(session) = server::run_stream(config, stream, session).await {
            let _ = session.await;
        }
    });
}

/// One connection of a client.
struct Connection {
    machine: Arc<MachineCore>,
    boot: Boot,
    cut: CancellationToken,
    user: String,
    channels: HashMap<ChannelId, Channel<Msg>>,
    _counted: Counted,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Commands that are still running end with their connection.
        self.cut.cancel();
    }
}

impl Connection {
    fn knows(&self, key: &PublicKey) -> bool {
        if self.boot.guest.faults.rejects_credentials {
            return false;
        }
        let Ok(line) = key.to_openssh() else { return false };
        let Some(wanted) = line.split_whitespace().nth(1) else { return false };
        let seed = self.machine.spec.seed.as_ref();
        let in_seed = |text: &str| text.contains(wanted);
        self.boot.guest.keys.iter().any(|line| line.contains(wanted))
            || seed.is_some_and(|seed| {
                in_seed(&seed.meta_data) || in_seed(&String::from_utf8_lossy(&seed.user_data))
            })
    }
}

impl server::Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        _: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(if self.knows(offer.public_key) { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        user.clone_into(&mut self.user);
        Ok(if self.knows(key.public_key) { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, Self::Error> {
        user.clone_into(&mut self.user);
        let Guest { faults, passwords, .. } = &*self.boot.guest;
        let right = !faults.rejects_credentials
            && passwords.iter().any(|(name, secret)| name == user && secret == password);
        Ok(if right { Auth::Accept } else { Auth::reject() })
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        self.channels.insert(channel.id(), channel);
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        command: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let Some(channel) = self.channels.remove(&id) else { return session.channel_failure(id) };
        session.channel_success(id)?;
        let exec = Exec {
            machine: self.machine.clone(),
            boot: self.boot.clone(),
            cut: self.cut.clone(),
            user: self.user.clone(),
            command: String::from_utf8_lossy(command).into_owned(),
            handle: session.handle(),
        };
        let (task, cut) = (self.machine.shared.task(), self.cut.clone());
        tokio::spawn(async move {
            let _task = task;
            tokio::select! {
                () = cut.cancelled() => {}
                _ = exec.run(channel) => {}
            }
        });
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let is_there = name == "sftp" && !self.boot.guest.lacks_sftp;
        let channel = if is_there { self.channels.remove(&id) } else { None };
        let Some(channel) = channel else { return session.channel_failure(id) };
        session.channel_success(id)?;
        let sftp = Sftp::new(self.machine.clone(), self.user.clone());
        russh_sftp::server::run(channel.into_stream(), sftp).await;
        Ok(())
    }
}

/// A running command.
struct Exec {
    machine: Arc<MachineCore>,
    boot: Boot,
    cut: CancellationToken,
    user: String,
    command: String,
    handle: Handle,
}

impl Exec {
    async fn run(self, channel: Channel<Msg>) -> Result<(), russh::Error> {
        let id = channel.id();
        let (mut reader, writer) = channel.split();
        let served = Served::read(&self.command);
        if let Some(served) = &served {
            let (out, err) = served.begin();
            writer.extended_data_bytes(1, err).await?;
            writer.data_bytes(out).await?;
        }
        let mut sent = None;
        if served.is_some() {
            let mut stdin = Vec::new();
            while let Some(message) = reader.wait().await {
                match message {
                    ChannelMsg::Data { data } => stdin.extend_from_slice(&data),
                    ChannelMsg::Eof | ChannelMsg::Close => break,
                    _ => {}
                }
            }
            let Some(script) = Sent::read(&stdin) else { return writer.close().await };
            sent = Some(script);
        }
        let (script, input) = match &mut sent {
            Some(sent) => (&sent.script, std::mem::take(&mut sent.input)),
            None => (&self.command, Vec::new()),
        };
        let acts = answer(&self.machine, &self.boot, &self.user, script, input);
        // A client that signals or closes the channel ends the command; anything else it sends is read and discarded.
        let ended = async {
            while let Some(message) = reader.wait().await {
                match message {
                    ChannelMsg::Close => return None,
                    ChannelMsg::Signal { signal } => return Some(signal),
                    _ => {}
                }
            }
            std::future::pending().await
        };
        let perform = async {
            let mut code = 0;
            for act in acts {
                match act {
                    Act::Stdout(bytes) => writer.data_bytes(bytes).await?,
                    Act::Stderr(bytes) => writer.extended_data_bytes(1, bytes).await?,
                    Act::ReadFile(path) => match self.machine.read_file(&path) {
                        Some(bytes) => writer.data_bytes(bytes).await?,
                        None => {
                            writer.extended_data_bytes(1, format!("{path}: not found\n")).await?;
                            code = 1;
                            break;
                        }
                    },
                    Act::WriteFile(path, content) => self.machine.write_file(&path, content),
                    Act::Wait(time) => tokio::time::sleep(time).await,
                    Act::Exit(exit) => {
                        code = exit;
                        break;
                    }
                    Act::Signal(name) => {
                        self.signal(id, Sig::Custom(name)).await;
                        return Ok(());
                    }
                    Act::Hang => std::future::pending().await,
                    Act::CutStream => self.cut.cancel(),
                    Act::PowerOff => self.machine.begin_power_off(),
                    Act::Reboot => self.machine.begin_reboot(),
                    Act::Die(cause) => self.machine.die(cause),
                }
            }
            if let Some(sent) = &sent {
                let (out, err) = sent.end(code);
                writer.data_bytes(out).await?;
                writer.extended_data_bytes(1, err).await?;
            }
            writer.exit_status(code).await
        };
        let played: Result<(), russh::Error> = tokio::select! {
            played = perform => played,
            ended = ended => {
                if let Some(name) = ended {
                    self.signal(id, name).await;
                }
                Ok(())
            }
        };
        played?;
        writer.eof().await?;
        writer.close().await
    }

    async fn signal(&self, id: ChannelId, name: Sig) {
        // When the connection is gone, no client is left to notify.
        let _ = self.handle.exit_signal_request(id, name, false, String::new(), String::new()).await;
    }
}
