//! The life cycle of a machine: what start, wait, stop and capture decide, the same for every hypervisor of this host.
//!
//! ```text
//! Defined ──start──▶ Starting ──▶ Running ──▶ Ended(exit) ──start──▶ Starting …
//!                        │ failed, or dropped
//!                        ▼
//!                   as it was before
//! ```
//!
//! [`Lifecycle`] is the phase of a machine and the rules for changing it. [`Kernel`] decides what to do with a running
//! machine and how it ended. Neither performs I/O or reads a clock. [`Watcher`] drives a kernel with what a [`Run`]
//! observes, and carries out its decisions; a hypervisor implements `Run` and [`Control`].

mod kernel;
mod phase;
mod watcher;

pub use self::{
    kernel::{
        Action, DAEMON_GRACE, DAEMON_PATIENCE, GIVE_UP_LIMIT, HANG_UP_LIMIT, Input, KILL_AGAIN, Kernel,
        LOST_LIMIT, Observation, Outcome, PRESS_AGAIN, ProcessEnd, QUIT_LIMIT, Reporter, SCREENSHOT_LIMIT,
        Shutdown, TPM_LIMIT,
    },
    phase::{AtRest, Lifecycle, Phase, Running, Starting},
    watcher::{Control, Run, Watcher},
};
