//! Small servers that misbehave, and servers that accept other credentials than a key.

use crate::{
    ErrorKind,
    backend::BoxedStream,
    event::CommandStatus,
    guest::{BuildKey, Content, Endpoint, Guest, Login, Script},
    secret::Secret,
    shell_frame::{Sent, Served},
};
use russh::{
    Channel, ChannelId, MethodKind, MethodSet,
    server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, Response, Session, VerifiedPublicKey},
};
use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::io::DuplexStream;

/// How a server misbehaves.
#[derive(Clone, Default)]
pub(super) struct UnusualServer {
    /// Number of sessions that are closed without an answer when a request is made in them. dropbear does that when a
    /// process of another session ends at that moment.
    closes: Arc<AtomicUsize>,
    /// Number of requests that were granted.
    granted: Arc<AtomicUsize>,
    /// Whether a command's session is closed without its exit status.
    mute: bool,
    /// Whether the connection breaks instead.
    breaks: bool,
    /// The only authentication method; the key if none is given.
    way: Option<MethodKind>,
    /// Whether commands never begin.
    waits: bool,
    /// The input received for the running command.
    received: Vec<u8>,
    /// Whether all credentials are refused.
    pub(super) shut: Arc<AtomicBool>,
}

impl UnusualServer {
    fn endpoint(&self) -> Endpoint {
        let server = self.clone();
        let key = BuildKey::generate();
        Endpoint::new(move || {
            let (server, key) = (server.clone(), key.clone());
            Box::pin(async move {
                let (ours, theirs) = tokio::io::duplex(64 * 1024);
                server.serve(&key, theirs);
                Ok(Box::new(ours) as BoxedStream)
            })
        })
    }

    /// Serves one connection, with this host key.
    pub(super) fn serve(self, key: &BuildKey, stream: DuplexStream) {
        let way = self.way.unwrap_or(MethodKind::PublicKey);
        let config = Arc::new(server::Config {
            keys: vec![(*key.private()).clone()],
            methods: MethodSet::from([way].as_slice()),
            auth_rejection_time: Duration::ZERO,
            auth_rejection_time_initial: Some(Duration::ZERO),
            ..server::Config::default()
        });
        tokio::spawn(async move {
            if let Ok(session) = server::run_stream(config, stream, self).await {
                let _ = session.await;
            }
        });
    }

    pub(super) fn login(&self) -> Login {
        Login::new("user", BuildKey::generate()).password(Some(Secret::new("pass word")))
    }

    async fn guest(&self) -> Guest {
        self.login().connect(&self.endpoint(), Duration::from_secs(60)).await.unwrap()
    }

    /// Whether a request was answered by closing its session.
    fn closed(&self, id: ChannelId, session: &mut Session) -> Result<bool, russh::Error> {
        if self.closes.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_err() {
            self.granted.fetch_add(1, SeqCst);
            return Ok(false);
        }
        session.eof(id)?;
        session.close(id)?;
        Ok(true)
    }

    fn allows(&self, way: MethodKind, right: bool) -> Auth {
        let right = right && !self.shut.load(SeqCst);
        if right && self.way.unwrap_or(MethodKind::PublicKey) == way { Auth::Accept } else { Auth::reject() }
    }
}

impl server::Handler for UnusualServer {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, _: &str, _: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(self.allows(MethodKind::PublicKey, true))
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.allows(MethodKind::PublicKey, true))
    }

    async fn auth_password(&mut self, _: &str, password: &str) -> Result<Auth, Self::Error> {
        Ok(self.allows(MethodKind::Password, password == "pass word"))
    }

    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        _: &str,
        _: &str,
        response: Option<Response<'a>>,
    ) -> Result<Auth, Self::Error> {
        Ok(match response {
            None => Auth::Partial {
                name: Cow::Borrowed(""),
                instructions: Cow::Borrowed(""),
                prompts: Cow::Borrowed(&[(Cow::Borrowed("Password: "), false)]),
            },
            Some(mut answers) => {
                let right = answers.next().is_some_and(|answer| &*answer == b"pass word");
                self.allows(MethodKind::KeyboardInteractive, right)
            }
        })
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        line: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        if self.closed(id, session)? {
            return Ok(());
        }
        session.channel_success(id)?;
        if self.breaks {
            return Err(russh::Error::Disconnect);
        }
        if self.waits {
            return session.data(id, &b"Press enter to go on: "[..]);
        }
        self.received.clear();
        let (out, err) = Served::read(std::str::from_utf8(line).unwrap()).unwrap().begin();
        session.extended_data(id, 1, err.into_bytes())?;
        session.data(id, out.into_bytes())
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        self.received.extend_from_slice(data);
        let Some(sent) = Sent::read(&self.received) else { return Ok(()) };
        session.data(id, &b"said\n"[..])?;
        if !self.mute {
            session.data(id, sent.end(3).0.into_bytes())?;
            session.extended_data(id, 1, sent.end(3).1.into_bytes())?;
            session.exit_status_request(id, 0)?;
        }
        self.received.clear();
        session.eof(id)?;
        session.close(id)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        _: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        if self.closed(id, session)? { Ok(()) } else { session.channel_failure(id) }
    }
}

#[tokio::test]
async fn a_session_that_is_closed_before_it_begins_is_opened_again() {
    let server = UnusualServer::default();
    let guest = server.guest().await;
    server.closes.store(3, SeqCst);
    let output = guest.command("anything").await.unwrap();
    assert_eq!((output.status, &*output.stdout), (CommandStatus::Code(3), "said\n"));
    assert_eq!(server.granted.load(SeqCst), 1, "what was asked for is done once");

    server.closes.store(3, SeqCst);
    let error = guest.upload(Content::Bytes(b"x"), "/file").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StepFailed, "{error}");
    assert_eq!(server.granted.load(SeqCst), 3, "no SFTP, then one command instead");

    server.closes.store(usize::MAX, SeqCst);
    let error = guest.command("anything").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().contains("closed 8 consecutive sessions"), "{error}");
    assert!(!guest.is_closed());
}

#[tokio::test]
async fn a_closed_session_is_distinguished_from_a_broken_connection() {
    let guest = UnusualServer { mute: true, ..UnusualServer::default() }.guest().await;
    let error = guest.run(&Script::new("anything"), |_, _| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(
        error.to_string().contains("closed the session while a script ran, and did not report"),
        "{error}"
    );
    assert!(!guest.is_closed());

    let guest = UnusualServer { breaks: true, ..UnusualServer::default() }.guest().await;
    let error = guest.run(&Script::new("anything"), |_, _| {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::GuestUnreachable);
    assert!(error.to_string().contains("the connection to the guest broke while a script ran"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_login_shell_that_waits_for_input_is_reported() {
    let guest = UnusualServer { waits: true, ..UnusualServer::default() }.guest().await;
    let error = guest.command("anything").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    let text = error.to_string();
    assert!(
        text.contains("the login shell of user \"user\"") && text.contains("Press enter to go on"),
        "{text}"
    );
}

#[tokio::test]
async fn the_password_is_tried_when_the_key_is_refused() {
    for way in [MethodKind::Password, MethodKind::KeyboardInteractive] {
        let server = UnusualServer { way: Some(way), ..UnusualServer::default() };
        assert_eq!(server.guest().await.command("anything").await.unwrap().status, CommandStatus::Code(3));

        let wrong = server.login().password(Some(Secret::new("wrong word")));
        let error = wrong.connect(&server.endpoint(), Duration::from_secs(2)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication);
        let text = error.report();
        assert!(
            text.contains("tried the build's key and the password") && !text.contains("wrong word"),
            "{text}"
        );
    }
}

#[test]
fn unusable_keys_are_distinguished() {
    let import = |text: &str| BuildKey::import(&Secret::new(text)).unwrap_err();
    let cases = [
        ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI", "found a public key"),
        (
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nTUlJ\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "protected by a passphrase",
        ),
        (
            "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n",
            "could not be parsed",
        ),
        ("not a key: c2VjcmV0", "could not be parsed"),
        ("", "could not be parsed"),
    ];
    for (text, expected) in cases {
        let error = import(text);
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!format!("{error:?}{}", error.report()).contains("c2VjcmV0"), "no part of the text is shown");
    }
}
