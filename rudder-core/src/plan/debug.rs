//! `Debug` of plans, which shows neither secrets nor texts that may hold some. Free text (scripts, environments, user
//! data, typed text) is shown by its length, and known secrets are masked everywhere.

use super::*;
use crate::secret::{Masker, public_url};
use std::fmt;

/// A text that is shown by its length only.
struct Bytes(usize);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0)
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes(text.len())
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = Shown(self);
        let text = if f.alternate() { format!("{shown:#?}") } else { format!("{shown:?}") };
        f.write_str(&Masker::new(&self.secrets).mask(&text))
    }
}

/// A plan whose secrets are not masked yet.
struct Shown<'p>(&'p Plan);

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan {
            name,
            digest,
            manifest,
            machines,
            network,
            template_network,
            http_files,
            files,
            timeout,
            retries,
            iso_cache_ttl,
            secrets,
            not_repeatable,
        } = self.0;
        f.debug_struct("Plan")
            .field("name", name)
            .field("digest", digest)
            .field("manifest", &bytes(manifest))
            .field("machines", machines)
            .field("network", network)
            .field("template_network", template_network)
            .field("http_files", http_files)
            .field("files", files)
            .field("timeout", timeout)
            .field("retries", retries)
            .field("iso_cache_ttl", iso_cache_ttl)
            .field("secrets", &secrets.len())
            .field("not_repeatable", not_repeatable)
            .finish()
    }
}

impl fmt::Debug for PlannedUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, sha256 } = self;
        f.debug_struct("PlannedUrl").field("url", &public_url(url)).field("sha256", sha256).finish()
    }
}

impl fmt::Debug for PlannedContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(content) => f.debug_tuple("Inline").field(&Bytes(content.len())).finish(),
            Self::Url(url) => f.debug_tuple("Url").field(url).finish(),
        }
    }
}

impl fmt::Debug for PlannedCloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user_data, network_data } = self;
        f.debug_struct("PlannedCloudInit")
            .field("user_data", &user_data.as_deref().map(bytes))
            .field("network_data", &network_data.as_deref().map(bytes))
            .finish()
    }
}

impl fmt::Debug for StepAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shell { script, env, execute_command } => f
                .debug_struct("Shell")
                .field("script", &bytes(script))
                .field("env", &env.keys())
                .field("execute_command", &execute_command.as_deref().map(bytes))
                .finish(),
            Self::File { content, label, destination } => f
                .debug_struct("File")
                .field("content", content)
                .field("label", label)
                .field("destination", destination)
                .finish(),
            Self::Reboot { command } => f.debug_struct("Reboot").field("command", &bytes(command)).finish(),
            Self::WindowsUpdate { search_criteria, filters, update_limit } => f
                .debug_struct("WindowsUpdate")
                .field("search_criteria", search_criteria)
                .field("filters", filters)
                .field("update_limit", update_limit)
                .finish(),
            Self::Handbuild { instructions } => {
                f.debug_struct("Handbuild").field("instructions", &bytes(instructions)).finish()
            }
        }
    }
}

impl fmt::Debug for BootAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut waits = |name, text: &str, limit: &Duration| {
            f.debug_struct(name).field("text", &bytes(text)).field("limit", limit).finish()
        };
        match self {
            Self::WaitText { text, limit } => waits("WaitText", text, limit),
            Self::WaitSerial { text, limit } => waits("WaitSerial", text, limit),
            Self::Type(text) => f.debug_tuple("Type").field(&bytes(text)).finish(),
            Self::Press(key) => f.debug_tuple("Press").field(key).finish(),
            Self::Hold(key) => f.debug_tuple("Hold").field(key).finish(),
            Self::Release(key) => f.debug_tuple("Release").field(key).finish(),
            Self::Wait(time) => f.debug_tuple("Wait").field(time).finish(),
        }
    }
}
