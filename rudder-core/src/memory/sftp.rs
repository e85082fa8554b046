//! The SFTP server of a guest (version 3, draft-ietf-secsh-filexfer-02), limited to what uploads need, on the files of
//! its boot disk.

use super::{
    files::{FileTree, Node, Refusal, may_write, normal, parent},
    machine::MachineCore,
};
use russh_sftp::{
    protocol::{Attrs, FileAttributes, Handle, OpenFlags, Status, StatusCode},
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
    /// The paths of open files, by handle.
    handles: HashMap<String, String>,
    next: u64,
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

    fn files<T>(&self, what: impl FnOnce(&mut FileTree) -> Result<T, Refusal>) -> Result<T, StatusCode> {
        Ok(self.machine.with_files(what).ok_or(StatusCode::Failure)??)
    }

    /// Changes what exists at a path, if the user may. A missing path is reported as such, regardless of the user.
    fn change(
        &self,
        path: &str,
        what: impl FnOnce(&mut FileTree) -> Result<(), Refusal>,
    ) -> Result<(), StatusCode> {
        let is_allowed = may_write(path, &self.user);
        self.files(|tree| match tree.get(parent(path)) {
            None => Err(Refusal::NotFound),
            Some(_) if !is_allowed => Err(Refusal::Denied),
            Some(_) => what(tree),
        })
    }

    fn path_of(&self, handle: &str) -> Result<&str, StatusCode> {
        self.handles.get(handle).map(String::as_str).ok_or(StatusCode::Failure)
    }

    fn attributes_of(&self, id: u32, path: &str) -> Result<Attrs, StatusCode> {
        let attrs = self.files(|tree| tree.get(path).map(attributes).ok_or(Refusal::NotFound))?;
        Ok(Attrs { id, attrs })
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
        _: FileAttributes,
    ) -> Result<Handle, StatusCode> {
        let path = normal(&filename, &self.user);
        if !flags.contains(OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::TRUNCATE) {
            return Err(StatusCode::OpUnsupported);
        }
        self.change(&path, |tree| tree.write(&path, Vec::new()))?;
        self.next += 1;
        let handle = self.next.to_string();
        self.handles.insert(handle.clone(), path);
        Ok(Handle { id, handle })
    }

    async fn close(&mut self, id: u32, handle: String) -> Result<Status, StatusCode> {
        self.handles.remove(&handle).map(|_| ok(id)).ok_or(StatusCode::Failure)
    }

    async fn write(
        &mut self,
        id: u32,
        handle: String,
        offset: u64,
        data: Vec<u8>,
    ) -> Result<Status, StatusCode> {
        let path = self.path_of(&handle)?;
        let offset = usize::try_from(offset).map_err(|_| StatusCode::Failure)?;
        self.files(|tree| tree.write_at(path, offset, &data))?;
        Ok(ok(id))
    }

    async fn stat(&mut self, id: u32, path: String) -> Result<Attrs, StatusCode> {
        self.attributes_of(id, &normal(&path, &self.user))
    }

    async fn lstat(&mut self, id: u32, path: String) -> Result<Attrs, StatusCode> {
        self.stat(id, path).await
    }

    async fn fstat(&mut self, id: u32, handle: String) -> Result<Attrs, StatusCode> {
        self.attributes_of(id, self.path_of(&handle)?)
    }

    async fn mkdir(&mut self, id: u32, path: String, _: FileAttributes) -> Result<Status, StatusCode> {
        let path = normal(&path, &self.user);
        self.change(&path, |tree| tree.make_dir(&path, 0o755)).map(|()| ok(id))
    }
}
