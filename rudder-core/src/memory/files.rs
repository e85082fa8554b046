//! The file system of a guest in memory: a tree of directories and files that lives on its boot disk.

use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{collections::BTreeMap, sync::Arc};

/// Where a user other than root may write.
const SHARED: [&str; 4] = ["/tmp", "/var/tmp", "/dev/shm", "/run/user"];

/// Why a file operation was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The path, or its parent, is not there.
    NotFound,
    /// The user may not.
    Denied,
    /// It is there already, or is not what the operation needs.
    Unfit,
}

impl Refusal {
    /// What a shell command says of it.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::NotFound => "No such file or directory",
            Self::Denied => "Permission denied",
            Self::Unfit => "File exists, or is not of the right kind",
        }
    }
}

/// A file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Node {
    /// Permission bits.
    pub(super) mode: u32,
    /// `None`: a directory.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "base64_bytes")]
    pub(super) data: Option<Arc<Vec<u8>>>,
}

impl Node {
    /// Whether it is a directory.
    pub(super) fn is_dir(&self) -> bool {
        self.data.is_none()
    }
}

/// The files of one disk. Paths are absolute and normal: no `.`, no `..`, no trailing slash.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct FileTree(BTreeMap<String, Node>);

impl FileTree {
    /// What a freshly installed system has.
    pub(super) fn of_a_system() -> Self {
        let mut tree = Self::default();
        for (path, mode) in [
            ("/", 0o755),
            ("/etc", 0o755),
            ("/home", 0o755),
            ("/opt", 0o755),
            ("/root", 0o700),
            ("/srv", 0o755),
            ("/usr/local/bin", 0o755),
            ("/var/lib", 0o755),
            ("/var/tmp", 0o1777),
            ("/tmp", 0o1777),
        ] {
            tree.make_dirs(path, mode);
        }
        tree.put("/etc/os-release", b"ID=memory\nPRETTY_NAME=\"A guest in memory\"\n".to_vec(), 0o644);
        tree
    }

    /// The node at a path.
    pub(super) fn get(&self, path: &str) -> Option<&Node> {
        self.0.get(path)
    }

    /// The bytes of the file at a path.
    pub(super) fn read(&self, path: &str) -> Option<&[u8]> {
        self.get(path)?.data.as_ref().map(|data| data.as_slice())
    }

    /// Puts a file where it is told, parents made.
    pub(super) fn put(&mut self, path: &str, data: Vec<u8>, mode: u32) {
        self.make_dirs(parent(path), 0o755);
        self.0.insert(path.to_owned(), Node { mode, data: Some(Arc::new(data)) });
    }

    /// Makes a directory and its parents.
    pub(super) fn make_dirs(&mut self, path: &str, mode: u32) {
        if path != "/" {
            self.make_dirs(parent(path), 0o755);
        }
        self.0.entry(path.to_owned()).or_insert(Node { mode, data: None });
    }

    /// Makes one directory.
    pub(super) fn make_dir(&mut self, path: &str, mode: u32) -> Result<(), Refusal> {
        self.need_dir(parent(path))?;
        if self.0.contains_key(path) {
            return Err(Refusal::Unfit);
        }
        self.0.insert(path.to_owned(), Node { mode, data: None });
        Ok(())
    }

    /// Writes a whole file into a directory that is there; a file that was there keeps its mode.
    pub(super) fn write(&mut self, path: &str, data: Vec<u8>) -> Result<(), Refusal> {
        self.need_dir(parent(path))?;
        match self.0.get_mut(path) {
            Some(Node { data: None, .. }) => return Err(Refusal::Unfit),
            Some(node) => node.data = Some(Arc::new(data)),
            None => drop(self.0.insert(path.to_owned(), Node { mode: 0o644, data: Some(Arc::new(data)) })),
        }
        Ok(())
    }

    /// Writes bytes at a place of a file, growing it.
    pub(super) fn write_at(&mut self, path: &str, offset: usize, bytes: &[u8]) -> Result<(), Refusal> {
        let data = self.0.get_mut(path).and_then(|node| node.data.as_mut()).ok_or(Refusal::NotFound)?;
        let data = Arc::make_mut(data);
        let end = offset + bytes.len();
        if data.len() < end {
            data.resize(end, 0);
        }
        data[offset..end].copy_from_slice(bytes);
        Ok(())
    }

    /// Changes the mode.
    pub(super) fn set_mode(&mut self, path: &str, mode: u32) -> Result<(), Refusal> {
        self.0.get_mut(path).ok_or(Refusal::NotFound)?.mode = mode & 0o7777;
        Ok(())
    }

    /// Cuts or grows a file.
    pub(super) fn set_size(&mut self, path: &str, size: usize) -> Result<(), Refusal> {
        let data = self.0.get_mut(path).and_then(|node| node.data.as_mut()).ok_or(Refusal::NotFound)?;
        Arc::make_mut(data).resize(size, 0);
        Ok(())
    }

    /// Removes a file.
    pub(super) fn remove_file(&mut self, path: &str) -> Result<(), Refusal> {
        if self.get(path).ok_or(Refusal::NotFound)?.is_dir() {
            return Err(Refusal::Unfit);
        }
        self.0.remove(path);
        Ok(())
    }

    /// Removes an empty directory.
    pub(super) fn remove_dir(&mut self, path: &str) -> Result<(), Refusal> {
        self.need_dir(path)?;
        if self.children(path).next().is_some() {
            return Err(Refusal::Unfit);
        }
        self.0.remove(path);
        Ok(())
    }

    /// Removes whatever is at the path and below it.
    pub(super) fn remove_all(&mut self, path: &str) {
        let below = format!("{}/", path.trim_end_matches('/'));
        self.0.retain(|name, _| name != path && !name.starts_with(&below));
    }

    /// Renames a file or a directory; a file at the target is replaced.
    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<(), Refusal> {
        self.get(from).ok_or(Refusal::NotFound)?;
        self.need_dir(parent(to))?;
        if self.get(to).is_some_and(Node::is_dir) {
            return Err(Refusal::Unfit);
        }
        let below = format!("{from}/");
        let moved: Vec<String> =
            self.0.keys().filter(|name| *name == from || name.starts_with(&below)).cloned().collect();
        for name in moved {
            if let Some(node) = self.0.remove(&name) {
                self.0.insert(format!("{to}{}", &name[from.len()..]), node);
            }
        }
        Ok(())
    }

    /// What is directly in a directory: name and node.
    pub(super) fn children<'a>(&'a self, path: &str) -> impl Iterator<Item = (&'a str, &'a Node)> {
        let below = format!("{}/", path.trim_end_matches('/'));
        self.0.iter().filter_map(move |(name, node)| {
            let rest = name.strip_prefix(&below)?;
            (!rest.is_empty() && !rest.contains('/')).then_some((rest, node))
        })
    }

    fn need_dir(&self, path: &str) -> Result<(), Refusal> {
        match self.get(path) {
            Some(node) if node.is_dir() => Ok(()),
            Some(_) => Err(Refusal::Unfit),
            None => Err(Refusal::NotFound),
        }
    }
}

/// The directory that a path is in.
pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

/// The home directory of a user.
pub(super) fn home(user: &str) -> String {
    if user == "root" { "/root".to_owned() } else { format!("/home/{user}") }
}

/// A path as written, relative to the home of the user, made absolute and normal.
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

/// Whether the user may change what is at this path.
pub(super) fn may_write(path: &str, user: &str) -> bool {
    let under = |top: &str| path == top || path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'));
    user == "root" || under(&home(user)) || SHARED.iter().any(|top| under(top))
}

/// Bytes as base64 in JSON.
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
    fn paths_are_made_normal() {
        assert_eq!(normal("a/../b//c/.", "web"), "/home/web/b/c");
        assert_eq!(normal("/../..", "root"), "/");
        assert_eq!(parent("/a"), "/");
        assert!(may_write("/tmp/x", "web") && may_write("/home/web/x", "web"));
        assert!(
            !may_write("/etc/x", "web") && !may_write("/home/webster", "web") && may_write("/etc/x", "root")
        );
    }

    #[test]
    fn a_tree_survives_being_written_down() {
        let mut tree = FileTree::of_a_system();
        tree.put("/srv/a/b", vec![0, 255, 7], 0o600);
        let text = serde_json::to_string(&tree).expect("a tree is JSON");
        assert_eq!(serde_json::from_str::<FileTree>(&text).expect("and back"), tree);
        tree.rename("/srv/a", "/srv/c").expect("renamed");
        assert_eq!(tree.read("/srv/c/b"), Some([0, 255, 7].as_slice()));
        assert_eq!(tree.remove_dir("/srv/c"), Err(Refusal::Unfit));
        tree.remove_all("/srv");
        assert!(tree.get("/srv/c/b").is_none());
    }
}
