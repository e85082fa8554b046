//! The file system of a guest: a tree of directories and files on its boot disk.

use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{collections::BTreeMap, sync::Arc};

/// Where a user other than root may write.
const SHARED: [&str; 2] = ["/tmp", "/var/tmp"];

/// Why a file operation was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The path, or its parent, does not exist.
    NotFound,
    /// The user lacks permission.
    Denied,
    /// The path already exists, or is not of the kind that the operation needs.
    Unfit,
}

/// A file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    /// Permission bits.
    pub(super) mode: u32,
    /// The content of a file; `None` for a directory.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "base64_bytes")]
    pub(super) data: Option<Arc<Vec<u8>>>,
}

impl Node {
    pub(super) fn is_dir(&self) -> bool {
        self.data.is_none()
    }
}

/// The files of one disk. Paths are absolute and normalised: no `.`, no `..`, no trailing slash.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct FileTree(BTreeMap<String, Node>);

impl FileTree {
    /// Returns the files of a freshly installed system.
    pub(super) fn of_a_system() -> Self {
        let mut tree = Self::default();
        for (path, mode) in
            [("/home", 0o755), ("/root", 0o700), ("/srv", 0o755), ("/tmp", 0o1777), ("/var/tmp", 0o1777)]
        {
            tree.make_dirs(path, mode);
        }
        tree.put("/etc/os-release", b"ID=memory\nPRETTY_NAME=\"A guest in memory\"\n".to_vec(), 0o644);
        tree
    }

    /// Returns the node at a path.
    pub(super) fn get(&self, path: &str) -> Option<&Node> {
        self.0.get(path)
    }

    /// Returns the bytes of the file at a path.
    pub(super) fn read(&self, path: &str) -> Option<&[u8]> {
        self.get(path)?.data.as_ref().map(|data| data.as_slice())
    }

    /// Writes a file at a path and creates its parent directories.
    pub(super) fn put(&mut self, path: &str, data: Vec<u8>, mode: u32) {
        self.make_dirs(parent(path), 0o755);
        self.0.insert(path.to_owned(), Node { mode, data: Some(Arc::new(data)) });
    }

    /// Creates a directory and its parents, if they do not exist.
    pub(super) fn make_dirs(&mut self, path: &str, mode: u32) {
        if path != "/" {
            self.make_dirs(parent(path), 0o755);
        }
        self.0.entry(path.to_owned()).or_insert(Node { mode, data: None });
    }

    /// Creates one directory.
    pub(super) fn make_dir(&mut self, path: &str, mode: u32) -> Result<(), Refusal> {
        self.expect_dir(parent(path))?;
        if self.0.contains_key(path) {
            return Err(Refusal::Unfit);
        }
        self.make_dirs(path, mode);
        Ok(())
    }

    /// Writes a whole file into an existing directory; an existing file keeps its mode.
    pub(super) fn write(&mut self, path: &str, data: Vec<u8>) -> Result<(), Refusal> {
        self.expect_dir(parent(path))?;
        let mode = match self.get(path) {
            Some(node) if node.is_dir() => return Err(Refusal::Unfit),
            node => node.map_or(0o644, |node| node.mode),
        };
        self.put(path, data, mode);
        Ok(())
    }

    /// Writes bytes at an offset of a file, which grows as needed.
    pub(super) fn write_at(&mut self, path: &str, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        let data = self.0.get_mut(path).and_then(|node| node.data.as_mut()).ok_or(Refusal::NotFound)?;
        let data = Arc::make_mut(data);
        let end = offset + bytes.len();
        data.resize(data.len().max(end), 0);
        data[offset..end].copy_from_slice(bytes);
        Ok(())
    }

    /// Removes a file or an empty directory.
    pub(super) fn remove(&mut self, path: &str, user: &str) -> Result<(), Refusal> {
        if !may_write(path, user) {
            return Err(Refusal::Denied);
        }
        if self.0.keys().any(|other| other != path && parent(other) == path) {
            return Err(Refusal::Unfit);
        }
        self.0.remove(path).map(drop).ok_or(Refusal::NotFound)
    }

    fn expect_dir(&self, path: &str) -> Result<(), Refusal> {
        match self.get(path) {
            Some(node) if node.is_dir() => Ok(()),
            Some(_) => Err(Refusal::Unfit),
            None => Err(Refusal::NotFound),
        }
    }
}

/// Returns the parent directory of a path.
pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

/// Makes a path, which may be relative to the home of the user, absolute and normalised.
pub(super) fn normal(path: &str, user: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", home(user)) };
    let mut parts = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn home(user: &str) -> String {
    if user == "root" { "/root".to_owned() } else { format!("/home/{user}") }
}

/// Whether the user may change what exists at this path.
pub(super) fn may_write(path: &str, user: &str) -> bool {
    let under = |top: &str| path == top || path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'));
    user == "root" || under(&home(user)) || SHARED.iter().any(|top| under(top))
}

/// Serialises bytes as base64 in JSON.
mod base64_bytes {
    use super::{Arc, BASE64, Deserialize, Deserializer, Serialize, Serializer};
    use base64::Engine as _;

    pub(super) fn serialize<S: Serializer>(
        data: &Option<Arc<Vec<u8>>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        data.as_ref().map(|data| BASE64.encode(data.as_slice())).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Arc<Vec<u8>>>, D::Error> {
        Option::<String>::deserialize(deserializer)?
            .map(|text| BASE64.decode(text).map(Arc::new).map_err(serde::de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised() {
        assert_eq!(normal("a/../b//c/.", "web"), "/home/web/b/c");
        assert_eq!(normal("/../..", "root"), "/");
        assert_eq!(parent("/a"), "/");
        assert!(may_write("/tmp/x", "web") && may_write("/home/web/x", "web"));
        assert!(
            !may_write("/etc/x", "web") && !may_write("/home/webster", "web") && may_write("/etc/x", "root")
        );
    }

    #[test]
    fn a_tree_survives_serialisation() {
        let mut tree = FileTree::of_a_system();
        tree.put("/srv/a/b", vec![0, 255, 7], 0o600);
        let text = serde_json::to_string(&tree).expect("a tree is JSON");
        assert_eq!(serde_json::from_str::<FileTree>(&text).expect("and back"), tree);
    }

    #[test]
    fn only_empty_directories_are_removed_and_only_with_permission() {
        let mut tree = FileTree::of_a_system();
        tree.put("/srv/a/b", Vec::new(), 0o600);
        assert_eq!(tree.remove("/srv/a", "root"), Err(Refusal::Unfit));
        assert_eq!(tree.remove("/srv/a/b", "web"), Err(Refusal::Denied));
        assert_eq!(tree.remove("/srv/a/b", "root"), Ok(()));
        assert_eq!(tree.remove("/srv/a/b", "root"), Err(Refusal::NotFound));
        assert_eq!(tree.remove("/srv/a", "root"), Ok(()));
    }
}
