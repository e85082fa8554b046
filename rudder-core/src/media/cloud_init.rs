//! The NoCloud seed: what cloud-init reads on the first boot (cloud-init documentation, datasource NoCloud).
//!
//! # Files
//! The seed consists of these files, on a FAT file system labelled `CIDATA` and as texts:
//!
//! - `meta-data`, YAML, each value on one plain line of its own, so that a guest without cloud-init can read it with `sed`:
//!   ```text
//!   instance-id: web-3f9c…
//!   local-hostname: web
//!   public-keys:
//!     - ssh-ed25519 AAAA… rudder
//!   rudder:
//!     username: root
//!     authorized-key: ssh-ed25519 AAAA… rudder
//!   ```
//! - `user-data`: what the author wrote, byte for byte as one part of a MIME archive, followed by Rudder's parts; if
//!   the author wrote none, a single cloud-config of Rudder's.
//! - `network-config`: what the author wrote, if anything.
//!
//! # How the user gets the key
//! cloud-init authorises `public-keys` for the distribution's default user and for root, for root with a forced command
//! that prints "please login as" unless `disable_root` is false. So:
//!
//! - for root: a part that sets `disable_root: false`, whatever the author's text says.
//! - for another user, if the author's text defines no users, or a list of them in which this user has no keys: a part
//!   that appends the user to `users` (`merge_how`), which merges with an entry of the same name.
//! - otherwise (the author gave the user keys, with which cloud-init would not merge ours; or the text cannot be parsed
//!   here, because it is a template, an archive or an include): a script that adds the key when users exist. It runs
//!   before the author's scripts.

use crate::{Error, ErrorKind, Result, backend::Seed, plan::PlannedCloudInit};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_yaml::Value;
use std::{
    fmt::Write as _,
    io::{Cursor, Write as _},
    sync::Arc,
};

/// The user that a seed lets in.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SeedLogin {
    /// The name of the user: `sshUsername`.
    pub username: String,
    /// A line of `authorized_keys`: [`BuildKey::authorized_key`](crate::guest::BuildKey::authorized_key).
    pub authorized_key: String,
}

impl SeedLogin {
    /// Returns a login of this user with this key.
    pub fn new(username: impl Into<String>, authorized_key: impl Into<String>) -> Self {
        Self { username: username.into(), authorized_key: authorized_key.into() }
    }
}

/// Makes the seed of a machine.
///
/// `instance_id` must be new whenever the guest is to consider itself a new instance, even if its disk was used by
/// another instance before: once per attempt of a build, for instance [`LabId`](crate::backend::LabId) and the name of
/// the machine.
///
/// # Errors
/// `InvalidInput` when a name or the key does not fit on one line; `Internal` when the medium cannot be made.
pub fn seed(instance_id: &str, hostname: &str, login: &SeedLogin, config: &PlannedCloudInit) -> Result<Seed> {
    for (what, text) in [
        ("user name", &login.username),
        ("public key", &login.authorized_key),
        ("instance id", &instance_id.to_owned()),
    ] {
        if text.is_empty() || text.contains(|c: char| c.is_control() || "'\"\\".contains(c)) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "expected a {what} without quotes, backslashes and control characters, but found {text:?}"
                ),
            ));
        }
    }
    let meta_data = format!(
        "instance-id: {}\nlocal-hostname: {}\npublic-keys:\n  - {key}\nrudder:\n  username: {}\n  authorized-key: {key}\n",
        plain(instance_id),
        plain(hostname),
        plain(&login.username),
        key = login.authorized_key,
    );
    let user_data = user_data(login, config.user_data.as_deref());
    let network_config = config.network_data.clone();
    let mut files = vec![("meta-data", meta_data.as_bytes()), ("user-data", user_data.as_slice())];
    if let Some(network) = &network_config {
        files.push(("network-config", network.as_bytes()));
    }
    let image = medium(&files).map_err(|error| {
        Error::new(ErrorKind::Internal, "cannot create the medium of the seed").with_source(error)
    })?;
    Ok(Seed::new(meta_data, user_data, network_config, image))
}

/// Writes a YAML scalar that is read as a string; a name that consists of digits is quoted, for instance.
fn plain(text: &str) -> String {
    let harmless = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && matches!(serde_yaml::from_str::<Value>(text), Ok(Value::String(_)));
    if harmless { text.to_owned() } else { format!("'{text}'") }
}

/// How Rudder's own part adds the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeySetup {
    /// Sets `disable_root: false`.
    Root,
    /// Defines `users` with the distribution's default user and this one.
    NewList,
    /// Appends this user to the author's.
    Append,
    /// Appends this user to the author's, which have an entry without keys for it.
    AppendKeys,
    /// Runs a script at the end of the boot.
    Script,
}

fn key_setup(username: &str, authors: Option<&str>) -> KeySetup {
    if username == "root" {
        return KeySetup::Root;
    }
    let Some(text) = authors else { return KeySetup::NewList };
    if text.starts_with("#!") || text.starts_with("#cloud-boothook") {
        return KeySetup::NewList;
    }
    let is_config = text
        .strip_prefix("#cloud-config")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
    if !is_config || is_mime(text) {
        return KeySetup::Script;
    }
    let users = match serde_yaml::from_str::<Value>(text) {
        Ok(Value::Mapping(config)) => config.get("users").cloned(),
        Ok(Value::Null) => None,
        _ => return KeySetup::Script,
    };
    let users = match users {
        None => return KeySetup::NewList,
        Some(Value::Sequence(users)) => users,
        Some(_) => return KeySetup::Script,
    };
    let mut named = false;
    for user in &users {
        match user {
            Value::Mapping(user) if user.get("name").and_then(Value::as_str) == Some(username) => {
                if user.contains_key("ssh_authorized_keys") || user.contains_key("ssh-authorized-keys") {
                    return KeySetup::Script;
                }
                named = true;
            }
            Value::String(names) if names.split(',').any(|name| name.trim() == username) => named = true,
            _ => {}
        }
    }
    if named { KeySetup::AppendKeys } else { KeySetup::Append }
}

fn user_data(login: &SeedLogin, authors: Option<&str>) -> Vec<u8> {
    let (username, key) = (&login.username, &login.authorized_key);
    // A JSON string is a YAML string.
    let name = Value::String(username.clone());
    let name = serde_json::to_string(&name).unwrap_or_default();
    let append = "merge_how:\n  - name: list\n    settings: [append]\n  - name: dict\n    settings: [no_replace, recurse_list]\n";
    let entry = format!("  - name: {name}\n    ssh_authorized_keys:\n      - {key}\n");
    // The password of a user that exists in the image must not be locked by Rudder; a new user has no password to log
    // in with.
    let keep = "    lock_passwd: false\n";
    let key_setup = key_setup(username, authors);
    let (kind, ours) = match key_setup {
        KeySetup::Root => (
            "text/cloud-config",
            "#cloud-config\nmerge_how:\n  - name: dict\n    settings: [replace]\ndisable_root: false\n"
                .to_owned(),
        ),
        KeySetup::NewList => (
            "text/cloud-config",
            format!(
                "#cloud-config\n{append}users:\n  - default\n{entry}{keep}    shell: /bin/bash\n    sudo: ALL=(ALL) NOPASSWD:ALL\n"
            ),
        ),
        KeySetup::Append => ("text/cloud-config", format!("#cloud-config\n{append}users:\n{entry}{keep}")),
        KeySetup::AppendKeys => ("text/cloud-config", format!("#cloud-config\n{append}users:\n{entry}")),
        KeySetup::Script => ("text/x-shellscript", authorise(username, key)),
    };
    let Some(authors) = authors else { return ours.into_bytes() };
    let digest = crate::digest::Digest::of(authors.as_bytes()).short();
    let boundary = format!("=rudder={digest}=");
    let mut archive = format!(
        "Content-Type: multipart/mixed; boundary=\"{boundary}\"\nMIME-Version: 1.0\n\n--{boundary}\n"
    );
    if is_mime(authors) {
        // An archive with its own headers can be used as a part unchanged.
        archive.push_str(authors);
    } else {
        // cloud-init detects the type of plain text by its first line; base64 keeps every byte of it.
        archive
            .push_str("Content-Type: text/plain; charset=\"utf-8\"\nContent-Transfer-Encoding: base64\n\n");
        let encoded = BASE64_STANDARD.encode(authors);
        for line in encoded.as_bytes().chunks(76) {
            archive.push_str(std::str::from_utf8(line).unwrap_or_default());
            archive.push('\n');
        }
    }
    // Scripts run in the order of their names, and the author's are called part-NNN.
    let _ = write!(
        archive,
        "\n--{boundary}\nContent-Type: {kind}; charset=\"utf-8\"\nContent-Disposition: attachment; filename=\"00-rudder\"\n\n{ours}\n--{boundary}--\n"
    );
    archive.into_bytes()
}

/// Whether a text is a MIME archive. Detected as by cloud-init, except that a text in which the header merely occurs is
/// not one.
fn is_mime(text: &str) -> bool {
    let mut end = text.len().min(4096);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let head = text[..end].to_ascii_lowercase();
    let header = |line: &str| {
        line.starts_with("from ")
            || line.split_once(':').is_some_and(|(name, _)| {
                !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            })
    };
    head.contains("mime-version:") && head.lines().next().is_some_and(header)
}

fn authorise(username: &str, key: &str) -> String {
    format!(
        "#!/bin/sh\n\
         # Lets the build log in as the user that its manifest names.\n\
         user='{username}'\n\
         key='{key}'\n\
         entry=$(getent passwd \"$user\" || grep \"^$user:\" /etc/passwd) || {{ echo \"no user $user\" >&2; exit 1; }}\n\
         home=$(echo \"$entry\" | cut -d: -f6)\n\
         group=$(id -g \"$user\")\n\
         umask 077\n\
         [ -d \"$home/.ssh\" ] || {{ mkdir -p \"$home/.ssh\" && chown \"$user:$group\" \"$home/.ssh\"; }}\n\
         file=$home/.ssh/authorized_keys\n\
         if ! grep -qsF \"$key\" \"$file\"; then\n\
         \x20   [ -e \"$file\" ] || {{ : >\"$file\" && chown \"$user:$group\" \"$file\"; }}\n\
         \x20   [ -z \"$(tail -c 1 \"$file\")\" ] || echo >>\"$file\"\n\
         \x20   echo \"$key\" >>\"$file\"\n\
         fi\n"
    )
}

/// Makes a FAT file system with these files in its root.
fn medium(files: &[(&str, &[u8])]) -> std::io::Result<Arc<[u8]>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum();
    // Adds space for the tables and the root directory; rounded up to a multiple of any device's sector size.
    let size = (content + content / 64 + 256 * 1024).next_multiple_of(64 * 1024);
    let mut disk = Cursor::new(vec![0u8; size]);
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ").volume_id(0x5275_6464);
    fatfs::format_volume(&mut disk, options)?;
    {
        let system = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        {
            let root = system.root_dir();
            for (name, bytes) in files {
                let mut file = root.create_file(name)?;
                file.truncate()?;
                file.write_all(bytes)?;
                file.flush()?;
            }
        }
        system.unmount()?;
    }
    Ok(disk.into_inner().into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::io::Read as _;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIH0m rudder";

    fn made(username: &str, authors: Option<&str>) -> Seed {
        let config =
            PlannedCloudInit { user_data: authors.map(Arc::from), network_data: Some("version: 2\n".into()) };
        seed("web-1", "web", &SeedLogin::new(username, KEY), &config).unwrap()
    }

    #[test]
    fn the_medium_contains_the_texts_of_the_seed() {
        let seed = made("root", Some("#cloud-config\n{}\n"));
        let system =
            fatfs::FileSystem::new(Cursor::new(seed.image.to_vec()), fatfs::FsOptions::new()).unwrap();
        assert_eq!(system.volume_label(), "CIDATA");
        let read = |name: &str| {
            let mut bytes = Vec::new();
            system.root_dir().open_file(name).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(read("meta-data"), seed.meta_data.as_bytes());
        assert_eq!(read("user-data"), seed.user_data);
        assert_eq!(read("network-config"), b"version: 2\n");
        assert_eq!(
            seed.meta_data,
            format!(
                "instance-id: web-1\nlocal-hostname: web\npublic-keys:\n  - {KEY}\nrudder:\n  username: root\n  authorized-key: {KEY}\n"
            )
        );
    }

    #[test]
    fn the_added_part_depends_on_the_user_data_of_the_author() {
        let cases = [
            ("root", Some("#cloud-config\nusers: [default]\n"), KeySetup::Root),
            ("deb", None, KeySetup::NewList),
            ("deb", Some("#cloud-config\npackages: [vim]\n"), KeySetup::NewList),
            ("deb", Some("#!/bin/sh\necho\n"), KeySetup::NewList),
            ("deb", Some("#cloud-config\nusers: [default, {name: other}]\n"), KeySetup::Append),
            ("deb", Some("#cloud-config\nusers: [{name: deb, sudo: x}]\n"), KeySetup::AppendKeys),
            (
                "deb",
                Some("#cloud-config\nusers: [{name: deb, ssh_authorized_keys: [x]}]\n"),
                KeySetup::Script,
            ),
            ("deb", Some("#cloud-config\nusers: {deb: true}\n"), KeySetup::Script),
            ("deb", Some("#cloud-config\n: ["), KeySetup::Script),
            ("deb", Some("## template: jinja\n#cloud-config\nusers: []\n"), KeySetup::Script),
            ("deb", Some("#cloud-config-archive\n- x\n"), KeySetup::Script),
            (
                "deb",
                Some("MIME-Version: 1.0\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n"),
                KeySetup::Script,
            ),
        ];
        for (user, authors, expected) in cases {
            assert_eq!(key_setup(user, authors), expected, "{authors:?}");
        }
    }

    #[test]
    fn a_name_with_a_line_break_is_refused() {
        for bad in ["a\nb", "a'b", ""] {
            let config = PlannedCloudInit::default();
            let error = seed("i", "h", &SeedLogin::new(bad, KEY), &config).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(plain("007"), "'007'");
        assert_eq!(plain("no"), "no");
    }
}
