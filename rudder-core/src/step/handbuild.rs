//! `handbuild` steps: a person works on the guest, through its screen and keyboard or by other means, and reports when they are
//! done.

use super::Person;
use crate::{Error, ErrorKind, Result, guest::Session};

pub(super) async fn run(session: &mut Session, person: Option<Person<'_>>) -> Result<()> {
    let Some(Person { done, login_limit }) = person else {
        return Err(Error::new(ErrorKind::Internal, "a handbuild step was run without a person to wait for"));
    };
    done.await;
    // Hours may have passed, and the person may have restarted the guest or its network.
    let reconnected = session.reconnect(login_limit).await;
    reconnected.map_err(|error| match error.kind() {
        // The time limit of the login has passed, which needs no further explanation.
        ErrorKind::GuestUnreachable => {
            let message = "cannot log in to the guest again after the person has finished";
            Error::new(ErrorKind::TimedOut, message).with_source(error)
        }
        _ => error,
    })
}
