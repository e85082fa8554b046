//! `file` steps: put a file into the guest.

use crate::{
    Error, ErrorKind, Result,
    guest::{Content, Guest},
    plan::PlannedContent,
};
use std::path::Path;

pub(super) async fn run(
    guest: &Guest,
    content: &PlannedContent,
    fetched: Option<&Path>,
    label: &str,
    destination: &str,
) -> Result<()> {
    let content = match (content, fetched) {
        (PlannedContent::Inline(bytes), _) => Content::Bytes(bytes),
        (PlannedContent::Url(_), Some(path)) => Content::File(path),
        (PlannedContent::Url(url), None) => {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("{} was not fetched before the step that needs it", url.url),
            ));
        }
    };
    guest.upload(content, destination).await.map_err(|error| error.with_context("source", label))
}
