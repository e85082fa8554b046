//! `handbuild` steps: a person works on the guest, through its screen and keyboard or by other means, and reports when they are
//! done.

use super::Person;
use crate::{Error, ErrorKind, Result, guest::Session};

pub(super) async fn run(session: &mut Session, person: Option<Person<'_>>) -> Result<()> {
    let Some(Person { done, login_limit }) = person else {
        return Err(Error::new(ErrorKind::Internal, "a handbuild step was run without anybody to wait for"));
    };
    done.await;
    // Hours may have passed, and the person may have restarted the guest or its network.
    let reconnected = session.reconnect(login_limit).await;
    reconnected.map_err(|error| match error.kind() {
        // The time limit of the login has passed, which needs no further explanation.
        ErrorKind::GuestUnreachable => {
            let message = "the guest could not be logged in to again after the person was done";
            Error::new(ErrorKind::TimedOut, message).with_source(error)
        }
        _ => error,
    })
}
