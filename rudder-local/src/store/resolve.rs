//! Host name resolution on separate threads: a name server that does not answer may block a lookup for minutes,
//! and a lookup in the runtime's pool would also delay the exit of the program.

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    thread,
};
use tokio::sync::oneshot;

/// A resolver that runs this function.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resolver(fn(&str) -> io::Result<Vec<SocketAddr>>);

impl Resolver {
    /// Returns the resolver of the operating system (getaddrinfo(3)).
    pub(super) fn system() -> Self {
        Self(|name| Ok((name, 0).to_socket_addrs()?.collect()))
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (sender, receiver) = oneshot::channel();
        let Self(ask) = *self;
        let thread = thread::Builder::new().name("rudder-dns".to_owned()).spawn(move || {
            // The caller may no longer be waiting.
            let _ = sender.send(ask(name.as_str()));
        });
        Box::pin(async move {
            thread?;
            let addresses = receiver.await??;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::sync::{Condvar, Mutex};
    use tokio::runtime::Builder;

    static ANSWERS: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

    fn silent(_: &str) -> io::Result<Vec<SocketAddr>> {
        let (answers, changed) = &ANSWERS;
        drop(changed.wait_while(answers.lock().unwrap(), |answers| !*answers).unwrap());
        Ok(Vec::new())
    }

    #[test]
    fn an_abandoned_lookup_does_not_delay_the_shutdown_of_the_runtime() {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let resolving = Resolver(silent).resolve("name.invalid".parse().unwrap());
        let abandoned = runtime.block_on(async { futures::poll!(resolving).is_pending() });
        assert!(abandoned);
        // Would block forever if the lookup were one of the runtime's tasks.
        drop(runtime);
        *ANSWERS.0.lock().unwrap() = true;
        ANSWERS.1.notify_all();
    }

    #[tokio::test]
    async fn localhost_is_resolved() {
        let found = Resolver::system().resolve("localhost".parse().unwrap()).await.unwrap();
        assert!(found.into_iter().all(|address| address.ip().is_loopback()));
    }
}
