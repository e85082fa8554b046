//! The SFTP server of a guest in memory (version 3, draft-ietf-secsh-filexfer-02), on the files of its boot disk.

use super::{
    files::{FileTree, Node, Refusal, may_write, normal},
    machine::MachineCore,
};
use russh_sftp::{
    protocol::{Attrs, Data, File, FileAttributes, Handle, Name, OpenFlags, Status, StatusCode},
    server::Handler,
};
use std::{collections::HashMap, sync::Arc};

/// Type bits of a mode (POSIX `st_mode`).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// One SFTP session.
pub(super) struct Sftp {
    machine: Arc<MachineCore>,
    user: String,
    handles: HashMap<String, Open>,
    next: u64,
}

struct Open {
    path: String,
    append: bool,
    listed: bool,
}

impl From<Refusal> for StatusCode {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotFound => Self::NoSuchFile,
            Refusal::Denied => Self::PermissionDenied,
            Refusal::Unfit => Self::Failure,
        }
    }
}

fn attributes(node: &Node) -> FileAttributes {
    let kind = if node.is_dir() { DIRECTORY } else { REGULAR };
    FileAttributes {
        size: Some(node.data.as_ref().map_or(4096, |data| data.len() as u64)),
        permissions: Some(kind | node.mode),
        ..FileAttributes::empty()
    }
}

fn ok(id: u32) -> Status {
    Status { id, status_code: StatusCode::Ok, error_message: "Ok".into(), language_tag: "en-US".into() }
}

impl Sftp {
    pub(super) fn new(machine: Arc<MachineCore>, user: String) -> Self {
        Self { machine, user, handles: HashMap::new(), next: 0 }
    }

    fn path(&self, path: &str) -> String {
        normal(if path.is_empty() { "." } else { path }, &self.user)
    }

    fn files<T>(&self, what: impl FnOnce(&mut FileTree) -> Result<T, Refusal>) -> Result<T, StatusCode> {
        Ok(self.machine.with_files(what).ok_or(StatusCode::Failure)??)
    }

    /// Changes what is at a path that the user may write to.
    fn change(
        &self,
        path: &str,
        what: impl FnOnce(&mut FileTree, &str) -> Result<(), Refusal>,
    ) -> Result<(), StatusCode> {
        let path = self.path(path);
        if !may_write(&path, &self.user) {
            // What is not there is said to be not there, whoever asks.
            let parent_is_there = self.files(|tree| Ok(tree.get(super::files::parent(&path)).is_some()))?;
            return Err(if parent_is_there { StatusCode::PermissionDenied } else { StatusCode::NoSuchFile });
        }
        self.files(|tree| what(tree, &path))
    }

    fn open_handle(&mut self, path: String, append: bool) -> String {
        self.next += 1;
        let handle = self.next.to_string();
        self.handles.insert(handle.clone(), Open { path, append, listed: false });
        handle
    }

    fn handle(&self, handle: &str) -> Result<&Open, StatusCode> {
        self.handles.get(handle).ok_or(StatusCode::Failure)
    }

    fn attributes_of(&self, id: u32, path: &str) -> Result<Attrs, StatusCode> {
        let attrs = self.files(|tree| tree.get(path).map(attributes).ok_or(Refusal::NotFound))?;
        Ok(Attrs { id, attrs })
    }

    fn set(&self, path: &str, attrs: &FileAttributes) -> Result<(), StatusCode> {
        self.change(path, |tree, path| {
            tree.get(path).ok_or(Refusal::NotFound)?;
            if let Some(size) = attrs.size {
                tree.set_size(path, usize::try_from(size).map_err(|_| Refusal::Unfit)?)?;
            }
            attrs.permissions.map_or(Ok(()), |mode| tree.set_mode(path, mode))
        })
    }
}

impl Handler for Sftp {
    type Error = StatusCode;

    fn unimplemented(&self) -> StatusCode {
        StatusCode::OpUnsupported
    }

    async fn open(
        &mut self,
        id: u32,
        filename: String,
        flags: OpenFlags,
        attrs: FileAttributes,
    ) -> Result<Handle, StatusCode> {
        let path = self.path(&filename);
        if flags.contains(OpenFlags::WRITE) || flags.contains(OpenFlags::CREATE) {
            self.change(&path, |tree, path| {
                match tree.get(path) {
                    Some(_) if flags.contains(OpenFlags::EXCLUDE) => return Err(Refusal::Unfit),
                    Some(node) if node.is_dir() => return Err(Refusal::Unfit),
                    Some(_) if flags.contains(OpenFlags::TRUNCATE) => tree.set_size(path, 0)?,
                    Some(_) => {}
                    None if flags.contains(OpenFlags::CREATE) => {
                        tree.write(path, Vec::new())?;
                        tree.set_mode(path, attrs.permissions.unwrap_or(0o644))?;
                    }
                    None => return Err(Refusal::NotFound),
                }
                Ok(())
            })?;
        } else {
            self.files(|tree| tree.read(&path).map(drop).ok_or(Refusal::NotFound))?;
        }
        let handle = self.open_handle(path, flags.contains(OpenFlags::APPEND));
        Ok(Handle { id, handle })
    }

    async fn close(&mut self, id: u32, handle: String) -> Result<Status, StatusCode> {
        self.handles.remove(&handle).map(|_| ok(id)).ok_or(StatusCode::Failure)
    }

    async fn read(&mut self, id: u32, handle: String, offset: u64, len: u32) -> Result<Data, StatusCode> {
        let path = &self.handle(&handle)?.path;
        let data = self.files(|tree| {
            let data = tree.read(path).ok_or(Refusal::NotFound)?;
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
            let end = start.saturating_add(len as usize).min(data.len());
            Ok(data[start..end].to_vec())
        })?;
        if data.is_empty() { Err(StatusCode::Eof) } else { Ok(Data { id, data }) }
    }

    async fn write(
        &mut self,
        id: u32,
        handle: String,
        offset: u64,
        data: Vec<u8>,
    ) -> Result<Status, StatusCode> {
        let Open { path, append, .. } = self.handle(&handle)?;
        self.files(|tree| {
            let end = tree.read(path).ok_or(Refusal::NotFound)?.len();
            let at = if *append { end } else { usize::try_from(offset).map_err(|_| Refusal::Unfit)? };
            tree.write_at(path, at, &data)
        })?;
        Ok(ok(id))
    }

    async fn stat(&mut self, id: u32, path: String) -> Result<Attrs, StatusCode> {
        self.attributes_of(id, &self.path(&path))
    }

    async fn lstat(&mut self, id: u32, path: String) -> Result<Attrs, StatusCode> {
        self.attributes_of(id, &self.path(&path))
    }

    async fn fstat(&mut self, id: u32, handle: String) -> Result<Attrs, StatusCode> {
        self.attributes_of(id, &self.handle(&handle)?.path)
    }

    async fn setstat(&mut self, id: u32, path: String, attrs: FileAttributes) -> Result<Status, StatusCode> {
        self.set(&path, &attrs).map(|()| ok(id))
    }

    async fn fsetstat(
        &mut self,
        id: u32,
        handle: String,
        attrs: FileAttributes,
    ) -> Result<Status, StatusCode> {
        self.set(&self.handle(&handle)?.path, &attrs).map(|()| ok(id))
    }

    async fn mkdir(&mut self, id: u32, path: String, attrs: FileAttributes) -> Result<Status, StatusCode> {
        let mode = attrs.permissions.unwrap_or(0o755) & 0o7777;
        self.change(&path, |tree, path| tree.make_dir(path, mode)).map(|()| ok(id))
    }

    async fn rmdir(&mut self, id: u32, path: String) -> Result<Status, StatusCode> {
        self.change(&path, FileTree::remove_dir).map(|()| ok(id))
    }

    async fn remove(&mut self, id: u32, path: String) -> Result<Status, StatusCode> {
        self.change(&path, FileTree::remove_file).map(|()| ok(id))
    }

    async fn rename(&mut self, id: u32, from: String, to: String) -> Result<Status, StatusCode> {
        let to = self.path(&to);
        if !may_write(&to, &self.user) {
            return Err(StatusCode::PermissionDenied);
        }
        self.change(&from, |tree, from| {
            // The draft leaves a target that is there to the server; OpenSSH refuses.
            if tree.get(&to).is_some() {
                return Err(Refusal::Unfit);
            }
            tree.rename(from, &to)
        })
        .map(|()| ok(id))
    }

    async fn realpath(&mut self, id: u32, path: String) -> Result<Name, StatusCode> {
        Ok(Name { id, files: vec![File::dummy(self.path(&path))] })
    }

    async fn opendir(&mut self, id: u32, path: String) -> Result<Handle, StatusCode> {
        let path = self.path(&path);
        let is_dir = self.files(|tree| tree.get(&path).map(Node::is_dir).ok_or(Refusal::NotFound))?;
        if !is_dir {
            return Err(StatusCode::Failure);
        }
        Ok(Handle { id, handle: self.open_handle(path, false) })
    }

    async fn readdir(&mut self, id: u32, handle: String) -> Result<Name, StatusCode> {
        let open = self.handles.get_mut(&handle).ok_or(StatusCode::Failure)?;
        if std::mem::replace(&mut open.listed, true) {
            return Err(StatusCode::Eof);
        }
        let path = open.path.clone();
        let files = self.files(|tree| {
            Ok(tree.children(&path).map(|(name, node)| File::new(name, attributes(node))).collect())
        })?;
        Ok(Name { id, files })
    }
}
