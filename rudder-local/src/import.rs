//! Imports sources into a lab: images by URL, blank disks, and the disks of modules, each as an overlay that a machine may
//! write to.

use crate::{
    image::{self, Backing, Base},
    lab_storage::{LabStorage, blocking},
    parent::Parent,
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{ImportRequest, Imported, Progress, Volume, VolumeKind},
    module::{InputRecord, InputRole},
    plan::{PlannedBuildRef, PlannedSource, PlannedUrl},
};

impl LabStorage {
    /// Imports a source into the lab, as [`Lab::import`](rudder_core::backend::Lab::import) promises. The id of a disk is the
    /// name of its qcow2 file in the lab's directory; that of a CD-ROM is the path of the file in the store.
    ///
    /// # Errors
    /// As `Lab::import`; `Unsupported` in a lab that was attached to.
    pub async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.network()?;
        self.report_notice(progress);
        let imported = match &request.source {
            PlannedSource::Url(url) if request.kind == VolumeKind::Cdrom => {
                self.import_cdrom(url, request, progress).await
            }
            _ if request.kind != VolumeKind::Disk => Err(Error::new(
                ErrorKind::Unsupported,
                format!("expected the URL of a CD-ROM, but found {:?}", request.source),
            )),
            PlannedSource::Url(url) => self.import_url(url, request, progress).await,
            PlannedSource::Blank => {
                self.volume(None, request.size).await.map(|volume| Imported::new(volume, None))
            }
            PlannedSource::BuildRef(parent) => self.import_module(parent, request, progress).await,
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("expected a URL, a blank disk or a module, but found {other:?}"),
            )),
        };
        imported.map_err(|error| {
            error.with_context(request.kind.name(), &request.disk).with_context("vm", &request.machine)
        })
    }

    async fn import_url(
        &self,
        url: &PlannedUrl,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let image = self.store().image_for(url, request.size, progress).await?;
        self.hold(image.lease.clone()).await?;
        let copy = format!("v{}.base", self.number_of_volume());
        let base = Base::of(self, &image, &copy, progress).await?;
        let backing = Backing { path: &base.path, format: base.format };
        let volume = self.volume(Some((backing, base.size)), request.size).await?;
        let input = image.input.role(InputRole::source(&request.machine));
        Ok(Imported::new(volume, input))
    }

    /// Imports a CD-ROM, which is attached as it was served, from where it is cached.
    async fn import_cdrom(
        &self,
        url: &PlannedUrl,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let file = self.store().file_kept_for(url, request.keep_for, progress).await?;
        let id = file.path.to_str().map(str::to_owned).ok_or_else(|| {
            let message = format!("expected a store whose path is UTF-8, but found {}", file.path.display());
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        let volume = Volume::new(id, file.size);
        self.hold(file.lease).await?;
        self.add_volume(&volume.id, volume.virtual_size);
        let input = file.input.role(InputRole::Iso);
        Ok(Imported::new(volume, input))
    }

    async fn import_module(
        &self,
        parent: &PlannedBuildRef,
        request: &ImportRequest,
        progress: &Progress,
    ) -> Result<Imported> {
        let missing =
            |what: String| Error::new(ErrorKind::NotFound, what).with_context("module", &parent.module);
        let Parent { machine, module, store } = self.parent(parent).await?;
        let disk = match &request.parent_disk {
            None => machine.disks.first(),
            Some(name) => machine.disks.iter().find(|disk| disk.name == *name),
        };
        let disk = disk.ok_or_else(|| {
            let wanted = request.parent_disk.as_deref().unwrap_or("its boot disk");
            missing(format!("expected disk {wanted} of VM {} in the module, but found none", parent.vm))
        })?;
        let (wanted, progress) = (disk.clone(), progress.clone());
        let path =
            blocking(move || store.captured_file(&module, &wanted.file, &wanted.content, &progress)).await?;
        let backing = Backing { path: &path, format: &disk.format };
        let volume = self.volume(Some((backing, disk.virtual_size)), request.size).await?;
        let url = format!("module {}/{}", parent.module, parent.vm);
        let input = InputRecord::new(InputRole::source(&request.machine), url, disk.content.clone());
        Ok(Imported::new(volume, input))
    }

    /// Creates the volume of a request on this image.
    async fn volume(&self, backing: Option<(Backing<'_>, u64)>, wanted: Option<u64>) -> Result<Volume> {
        let (backing, size) = match backing {
            Some((backing, image_size)) => (Some(backing), image::size_over(image_size, wanted)?),
            None => {
                let size = wanted.ok_or_else(|| {
                    Error::new(ErrorKind::InvalidInput, "expected the size of a blank disk, but found none")
                })?;
                (None, image::size_over(0, Some(size))?)
            }
        };
        let id = format!("v{}.qcow2", self.number_of_volume());
        image::create(self, &id, backing, size).await?;
        self.add_volume(&id, size);
        Ok(Volume::new(id, size))
    }
}
