//! The test of the guide ("Testing without a hypervisor"), which shows it whole.
#![allow(clippy::unwrap_used)]

use rudder::{
    backend::Backend,
    build::Build,
    memory::{MemoryBackend, Response},
    plan::{PlanContext, prepare},
};
use std::{sync::Arc, time::Duration};

const MANIFEST: &[u8] = b"
name: site
vms:
  - name: web
    source: {url: 'https://images.example/debian.qcow2'}
    resources: {cpu: 1, memory: 512Mi}
    cloudInit: {}
    provisioners:
      - {type: shell, shell: {inline: 'apt-get install nginx'}}
      - {type: shell, shell: {inline: './migrate.sh'}}
";

#[tokio::test(start_paused = true)]
async fn a_failed_migration_leaves_nothing_behind() {
    let backend = MemoryBackend::new()
        .source("https://images.example/debian.qcow2", |image| image.file("/etc/issue", "Debian\n"))
        .machine("web", |guest| {
            guest
                .boot_delay(Duration::from_secs(20))
                .on("apt-get", Response::ok("Reading package lists...\n").wait(Duration::from_secs(5)))
                .on("migrate.sh", Response::fails(3, "database is locked\n"))
        });
    let context = PlanContext::new(backend.capabilities());
    let plan = prepare("site.yaml", MANIFEST, &context).into_plans().unwrap().remove(0);
    let error = Build::new(plan, Arc::new(backend.clone())).start().outcome().await.unwrap_err();
    let failure = error.build_failure().unwrap();
    assert_eq!(failure.report.step.as_deref(), Some("2 (shell)"));
    assert_eq!(failure.report.output_tail, ["database is locked"]);
    assert_eq!(backend.leftovers().await, Vec::<String>::new());
}
