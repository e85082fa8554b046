//! A lab: the lease that owns it, its volumes, and its machines.

use crate::{
    cluster::{Cluster, annotation, metadata},
    errors::{is_conflict, request_failed},
    import,
    lab_context::{LabContext, LabOptions},
    lease::{self, Listed, Ownership},
    machine::KubevirtMachine,
    modules,
    names::{Kind, MACHINE, NAME, VM, lab_labels, lab_selector, label_value, object_name},
    objects::{DataVolume, VirtualMachine, VirtualMachineInstance},
    specification::{MachineRecord, machine_name, seed_files, virtual_machine},
};
use async_trait::async_trait;
use k8s_openapi::api::core::v1::Secret;
use kube::{ResourceExt as _, api::PostParams};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{
        ImportRequest, Imported, Lab, LabId, LabSpec, Machine, MachineSpec, ModuleDraft, Progress, Retention,
        Served, Site, check_lab_file,
    },
    module::Module,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

/// A lab on a cluster.
#[derive(Debug)]
pub(crate) struct KubevirtLab {
    context: Arc<LabContext>,
    machines: Mutex<Vec<Arc<KubevirtMachine>>>,
    /// Whether this process opened the lab.
    opened: bool,
    versions: BTreeMap<String, String>,
}

impl KubevirtLab {
    /// Opens a new lab.
    pub(crate) async fn open(
        cluster: &Cluster,
        spec: &LabSpec,
        options: &LabOptions,
        versions: BTreeMap<String, String>,
    ) -> Result<Self> {
        let ownership = Ownership::take(cluster, spec, options.lease_duration).await?;
        let lab = Self::new(cluster, spec.id.clone(), spec.name.clone(), ownership, options, versions, true);
        if let Retention::UntilRemoved { expires } = spec.retention {
            // The last step: a lab that stays exists as a whole or not at all.
            lab.context.ownership.keep(expires).await?;
        }
        Ok(lab)
    }

    /// Attaches to a kept lab.
    pub(crate) async fn attach(
        cluster: &Cluster,
        listed: Listed,
        options: &LabOptions,
        versions: BTreeMap<String, String>,
    ) -> Result<Self> {
        let ownership = Ownership::of_kept(cluster, listed.lease)?;
        let id = listed.info.id;
        let lab = Self::new(cluster, id.clone(), listed.info.name, ownership, options, versions, false);
        let selector = lab_selector(&id);
        let found = cluster.list::<VirtualMachine>(&selector, "the machines of a lab").await?;
        let instances = cluster.list::<VirtualMachineInstance>(&selector, "the machines of a lab").await?;
        let mut machines = Vec::new();
        for machine in found {
            let record =
                annotation(&machine.metadata, MACHINE).and_then(|text| serde_json::from_str(text).ok());
            let Some(record): Option<MachineRecord> = record else {
                let message = format!(
                    "expected the record of a machine, but that of {} cannot be read",
                    machine.name_any()
                );
                return Err(Error::new(ErrorKind::InvalidInput, message).with_help("remove the lab"));
            };
            let instance = instances.iter().find(|instance| instance.name_any() == machine.name_any());
            machines.push((record.index, KubevirtMachine::attached(&lab.context, record, instance)));
        }
        machines.sort_by_key(|(index, _)| *index);
        *lab.all_machines() = machines.into_iter().map(|(_, machine)| machine).collect();
        Ok(lab)
    }

    fn new(
        cluster: &Cluster,
        id: LabId,
        name: String,
        ownership: Arc<Ownership>,
        options: &LabOptions,
        versions: BTreeMap<String, String>,
        opened: bool,
    ) -> Self {
        let context = LabContext::new(cluster, id, name, ownership, options);
        Self { context: Arc::new(context), machines: Mutex::default(), opened, versions }
    }

    fn all_machines(&self) -> MutexGuard<'_, Vec<Arc<KubevirtMachine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses further work, and reports the end of the machines to all callers that wait for one.
    fn end_machines(&self, why: &str) {
        self.context.close();
        for machine in self.all_machines().iter() {
            machine.lab_ended(why);
        }
    }

    fn check_opened(&self, what: &str) -> Result<()> {
        self.context.check_open()?;
        if self.opened {
            return Ok(());
        }
        let message = format!("cannot {what} in lab {}: this process only attached to it", self.context.id);
        Err(Error::new(ErrorKind::Unsupported, message))
    }
}

#[async_trait]
impl Lab for KubevirtLab {
    fn id(&self) -> &LabId {
        &self.context.id
    }

    fn versions(&self) -> BTreeMap<String, String> {
        self.versions.clone()
    }

    async fn import(&self, request: &ImportRequest, progress: &Progress) -> Result<Imported> {
        self.check_opened("import a source")?;
        import::import(&self.context, request, progress).await
    }

    async fn serve(&self, _: Site) -> Result<Served> {
        self.context.check_open()?;
        Err(Error::new(ErrorKind::Unsupported, "the KubeVirt backend does not serve files to machines"))
    }

    async fn create_machine(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        self.check_opened("create a machine")?;
        let context = &self.context;
        let name = machine_name(&context.id, &spec.name);
        let record = MachineRecord::of(spec, context.next());
        let specification = virtual_machine(spec, &name, &context.id, &context.name)
            .map_err(|error| error.with_context("vm", &spec.name))?;
        let mut labels = lab_labels(Kind::Machine, &context.id, &context.name);
        labels.insert(VM.to_owned(), label_value(&spec.name));
        let text = serde_json::to_string(&record).map_err(|error| {
            Error::new(ErrorKind::Internal, "cannot encode the record of a machine").with_source(error)
        })?;
        let annotations = [(NAME, spec.name.clone()), (MACHINE, text)];
        let owner = Some(context.ownership.owner());
        let metadata = metadata(&name, labels, annotations, owner);
        let machine = VirtualMachine::new(metadata.clone(), specification);
        // The machine comes first, because its name decides whether this call creates anything.
        match context.cluster.api::<VirtualMachine>().create(&PostParams::default(), &machine).await {
            Ok(_) => {}
            Err(error) if is_conflict(&error) => {
                let message = format!("expected no machine {} in the lab, but there is one", spec.name);
                return Err(Error::new(ErrorKind::Conflict, message).with_context("vm", &spec.name));
            }
            Err(error) => return Err(request_failed(error, &format!("create VM {}", spec.name))),
        }
        if let Some(files) = seed_files(spec) {
            let mut metadata = metadata;
            if let Some(annotations) = &mut metadata.annotations {
                annotations.remove(MACHINE);
            }
            let secret = Secret { metadata, data: Some(files), ..Secret::default() };
            context.cluster.create(&secret, &format!("the seed of VM {}", spec.name)).await?;
        }
        let machine = KubevirtMachine::new(context, record);
        self.all_machines().push(Arc::clone(&machine));
        Ok(machine)
    }

    async fn publish(&self, draft: ModuleDraft) -> Result<Module> {
        self.check_opened("publish a module")?;
        let captured = self.context.captured().clone();
        for (machine, disk) in
            draft.machines.iter().flat_map(|machine| machine.disks.iter().map(move |disk| (machine, disk)))
        {
            if captured.get(&disk.file).is_none_or(|known| known.content != disk.content) {
                let message = format!(
                    "expected disk {} of VM {} to have been captured, but it was not",
                    disk.name, machine.name
                );
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
        }
        let module = modules::publish(&self.context, draft).await?;
        let used: BTreeSet<&str> = module.files().map(|(file, _)| file).collect();
        self.context.captured().retain(|file, _| !used.contains(file.as_str()));
        Ok(module)
    }

    async fn machines(&self) -> Result<Vec<Arc<dyn Machine>>> {
        Ok(self.all_machines().iter().map(|machine| Arc::clone(machine) as Arc<dyn Machine>).collect())
    }

    async fn keep(&self, expires: Option<SystemTime>) -> Result<Vec<String>> {
        self.context.check_open()?;
        if !self.context.ownership.lifetime().keepable {
            let message =
                format!("lab {} ends with its owner, since it was not opened to be kept", self.context.id);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        self.context.ownership.keep(expires).await?;
        Ok(Vec::new())
    }

    async fn store_file(&self, name: &str, content: &[u8]) -> Result<Option<PathBuf>> {
        check_lab_file(name, content)?;
        self.context.check_open()?;
        let context = &self.context;
        let secret = files_name(&context.id);
        let data = json!({name: k8s_openapi::ByteString(content.to_owned())});
        let what = "a file of the lab";
        let labels = lab_labels(Kind::File, &context.id, &context.name);
        let metadata = metadata(&secret, labels, [], Some(context.ownership.owner()));
        let new = Secret {
            metadata,
            data: serde_json::from_value(data.clone()).unwrap_or_default(),
            ..Secret::default()
        };
        match context.cluster.api::<Secret>().create(&PostParams::default(), &new).await {
            Ok(_) => {}
            Err(error) if is_conflict(&error) => {
                context.cluster.patch::<Secret>(&secret, &json!({"data": data}), what).await?;
            }
            Err(error) => return Err(request_failed(error, "store a file of the lab")),
        }
        Ok(None)
    }

    async fn ownership_lost(&self) -> Error {
        let reason = self.context.ownership.lost().await;
        let message = format!("this process has lost lab {}: {reason}", self.context.id);
        Error::new(ErrorKind::Conflict, message)
            .with_help("check that the cluster can be reached from here, and build again")
    }

    async fn destroy(&self) -> Result<()> {
        self.end_machines("the lab was destroyed");
        remove(&self.context.cluster, &self.context.id).await?;
        self.context.ownership.give_up().await
    }
}

/// A lab whose owner drops it without destroying it ends as if the owner had died. Its objects are removed at once if a runtime is
/// available, otherwise by the first `reap` after its lease has expired.
impl Drop for KubevirtLab {
    fn drop(&mut self) {
        let context = Arc::clone(&self.context);
        if !self.opened || context.ownership.lifetime().kept || context.is_closed() {
            return;
        }
        self.end_machines("its lab was dropped");
        context.ownership.stop_renewing();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = remove_with_lease(&context.cluster, &context.id).await {
                    tracing::debug!(error = %error.report(), lab = %context.id, "cannot remove a lab that was dropped");
                }
            });
        }
    }
}

/// Returns the name of the Secret with the files of a lab.
pub(crate) fn files_name(lab: &LabId) -> String {
    object_name(&["files", lab.as_str()])
}

/// Removes the objects of a lab, except its lease, and waits until they are gone.
pub(crate) async fn remove(cluster: &Cluster, lab: &LabId) -> Result<()> {
    let selector = lab_selector(lab);
    // Machines first: a volume stays as long as a machine uses it.
    cluster.delete_all::<VirtualMachine>(&selector, "the machines of the lab").await?;
    cluster.gone::<VirtualMachineInstance>(&selector, "the machines of the lab").await?;
    // The claims go with their DataVolumes. They are not selected by label: CDI gave those of a published module the lab's.
    cluster.delete_all::<DataVolume>(&selector, "the volumes of the lab").await?;
    cluster.delete_all::<Secret>(&selector, "the secrets of the lab").await
}

/// Removes a lab and its lease, no matter which process opened it.
pub(crate) async fn remove_with_lease(cluster: &Cluster, lab: &LabId) -> Result<()> {
    remove(cluster, lab).await?;
    cluster
        .delete::<k8s_openapi::api::coordination::v1::Lease>(&lease::lease_name(lab), "the lease of the lab")
        .await
        .map(drop)
}
