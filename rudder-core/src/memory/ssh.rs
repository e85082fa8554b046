//! The SSH server of a guest in memory: russh on one end of a pipe in this process.

use super::{
    Counted,
    answer::answer,
    machine::{Boot, MachineCore},
    rules::Act,
    script::Guest,
    sftp::Sftp,
};
use crate::shell_frame::{Sent, Served};
use russh::{
    Channel, ChannelId, ChannelMsg, MethodKind, MethodSet, Sig,
    keys::PublicKey,
    server::{self, Auth, ChannelOpenHandle, Handle, Msg, PublicKeyOffer, Session, VerifiedPublicKey},
};
use std::{
    collections::HashMap,
    future::Future as _,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

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
    let wire = Wire {
        stream,
        over: Box::pin(cut.clone().cancelled_owned()),
        cut: cut.clone(),
        left: boot.guest.faults.stream_limit,
    };
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
        // An error here is the client's to see: its stream ends.
        if let Ok(session) = server::run_stream(config, wire, session).await {
            let _ = session.await;
        }
    });
}

/// A pipe that can be cut, and that breaks after so many bytes.
struct Wire {
    stream: DuplexStream,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    cut: CancellationToken,
    left: Option<u64>,
}

impl Wire {
    /// Counts bytes that passed.
    fn passed(&mut self, bytes: usize) {
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(bytes as u64);
            if *left == 0 {
                self.cut.cancel();
            }
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.passed(buf.filled().len() - before);
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(bytes)) = polled {
            self.passed(bytes);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
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
        // Commands that still run end with their connection.
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
        let given = self.boot.guest.keys.join("\n");
        let seed = self.machine.spec.seed.as_ref();
        let seed =
            seed.map(|seed| format!("{}\n{}", seed.meta_data, String::from_utf8_lossy(&seed.user_data)));
        [given, seed.unwrap_or_default()].iter().any(|text| keys_in(text).any(|key| key == wanted))
    }
}

/// The base64 parts of all public keys in a text, whatever the text is: each follows its algorithm.
fn keys_in(text: &str) -> impl Iterator<Item = &str> {
    let words = || text.split(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | '[' | ']'));
    words().filter(|word| !word.is_empty()).zip(words().filter(|word| !word.is_empty()).skip(1)).filter_map(
        |(algorithm, key)| {
            let algorithm = ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| algorithm.starts_with(kind));
            (algorithm && key.starts_with("AAAA")).then_some(key)
        },
    )
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

/// A command that runs.
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
        // A client that signals or closes the channel ends the command; what else it sends is read and forgotten.
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
        let play = async {
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
                        self.signal(id, signal(&name)).await;
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
            played = play => played,
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
        // When the connection is gone, nobody is left to tell.
        let _ = self.handle.exit_signal_request(id, name, false, String::new(), String::new()).await;
    }
}

fn signal(name: &str) -> Sig {
    match name {
        "ABRT" => Sig::ABRT,
        "ALRM" => Sig::ALRM,
        "FPE" => Sig::FPE,
        "HUP" => Sig::HUP,
        "ILL" => Sig::ILL,
        "INT" => Sig::INT,
        "KILL" => Sig::KILL,
        "PIPE" => Sig::PIPE,
        "QUIT" => Sig::QUIT,
        "SEGV" => Sig::SEGV,
        "TERM" => Sig::TERM,
        "USR1" => Sig::USR1,
        other => Sig::Custom(other.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_wherever_they_stand() {
        let text = "public-keys:\n- \"ssh-ed25519 AAAAone me@here\"\nssh_authorized_keys: ['ecdsa-sha2-nistp256 AAAAtwo']";
        assert_eq!(keys_in(text).collect::<Vec<_>>(), ["AAAAone", "AAAAtwo"]);
        assert_eq!(keys_in("ssh-ed25519 BBBB; AAAA").count(), 0);
    }
}
