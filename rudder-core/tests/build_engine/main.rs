//! The engine in complete builds on the memory backend: real SSH, no real waiting, and nothing left behind.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod boot;
mod cancel;
mod death;
mod display;
mod failure;
mod hooks;
mod keep;
mod limits;
mod media;
mod observe;
mod pause;
mod plans;
mod promptness;
mod retry;
mod runtimes;
mod secrets;
mod success;

use hooks::{Hook, Hooked};
use rudder_core::{
    Error, Result,
    backend::{Backend, MachineSpec},
    build::{Build, BuildFailure},
    event::{BuildPhase, Event, EventKind, VmPhase},
    memory::{MemoryBackend, Operation},
    module::Module,
};
use serde_json::Value;
use std::sync::Arc;

/// A finished build, and everything it reported.
#[derive(Debug)]
pub struct Ended {
    /// All events, in order.
    pub events: Vec<Event>,
    /// The outcome.
    pub outcome: Result<Module>,
    /// The specs of the machines that were defined.
    pub specs: Vec<MachineSpec>,
}

/// Runs a build to its end. Whatever the outcome, nothing may be left behind.
pub async fn build(backend: &MemoryBackend, plan: Value) -> Ended {
    build_with(backend, plan, |build| build, &[]).await
}

/// Runs a build to its end, with options and hooks.
pub async fn build_with(
    backend: &MemoryBackend,
    plan: Value,
    options: impl FnOnce(Build) -> Build,
    hooks: &[(Operation, Hook)],
) -> Ended {
    let ended = run(backend, plan, options, hooks, |_, _| {}).await;
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
    ended
}

/// Runs a build to its end; `react` receives every event and may cancel.
pub async fn run(
    backend: &MemoryBackend,
    plan: Value,
    options: impl FnOnce(Build) -> Build,
    hooks: &[(Operation, Hook)],
    mut react: impl FnMut(&Event, &rudder_core::build::BuildHandle),
) -> Ended {
    let hooked = Hooked::new(backend, hooks);
    let specs = hooked.specs();
    let backend: Arc<dyn Backend> = Arc::new(hooked);
    let handle = options(Build::new(plans::read(plan), backend)).start();
    let mut reader = handle.events();
    let mut events = Vec::new();
    while let Some(event) = reader.next().await {
        react(&event, &handle);
        events.push(event);
    }
    for (place, event) in events.iter().enumerate() {
        assert_eq!(event.seq, place as u64, "a fast reader sees every event");
        assert_eq!(&event.build_id, handle.id(), "every event names its build");
    }
    assert!(matches!(events.last().unwrap().kind, EventKind::Finished { .. }));
    let outcome = handle.outcome().await;
    let specs = std::mem::take(&mut *specs.lock().unwrap());
    Ended { events, outcome, specs }
}

impl Ended {
    /// Returns the module; panics with the failure if there is none.
    pub fn module(&self) -> &Module {
        match &self.outcome {
            Ok(module) => module,
            Err(error) => panic!("expected a module, but: {}", error.report()),
        }
    }

    /// Returns the error.
    pub fn error(&self) -> &Error {
        self.outcome.as_ref().expect_err("expected a failure")
    }

    /// Returns the failure.
    pub fn failure(&self) -> &BuildFailure {
        self.error().build_failure().expect("the error of a build")
    }

    /// Whether the caller cancelled the build.
    pub fn is_cancelled(&self) -> bool {
        self.error().kind() == rudder_core::ErrorKind::Cancelled
    }

    /// Returns the phases of a VM, in order.
    pub fn vm_phases(&self, vm: &str) -> Vec<VmPhase> {
        let of = |event: &Event| match event.kind {
            EventKind::VmPhase { phase } if event.vm.as_deref() == Some(vm) => Some(phase),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }

    /// Returns the phases of the build, in order.
    pub fn build_phases(&self) -> Vec<BuildPhase> {
        let of = |event: &Event| match event.kind {
            EventKind::BuildPhase { phase } => Some(phase),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }

    /// Returns the warnings.
    pub fn warnings(&self) -> Vec<&str> {
        let of = |event| match event {
            &Event { kind: EventKind::Warning { ref message }, .. } => Some(message.as_str()),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }

    /// Returns the index of the first event that matches.
    pub fn place(&self, like: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().position(like).expect("expected such an event")
    }
}
