//! Relative paths are resolved against the working directory at the time they are passed, wherever the process moves later. A
//! separate test binary, because it changes the working directory of its process.

#![allow(clippy::unwrap_used)]

use rudder_core::{
    backend::Backend as _,
    build::{Build, FailurePolicy},
    memory::{MemoryBackend, Response},
    plan::{PlanContext, prepare},
};
use rudder_local::store::Store;
use std::{env, sync::Arc};

const MANIFEST: &[u8] = b"
name: moved
files: [{name: tool, url: 'file:tool'}]
vms:
  - name: web
    source: {url: 'https://images.example/base.qcow2'}
    resources: {cpu: 1, memory: 512Mi}
    cloudInit: {}
    provisioners:
      - {type: file, file: {fileRef: tool, destination: /tool}}
      - {type: shell, shell: {inline: work}}
";

#[tokio::test]
async fn relative_paths_are_resolved_when_given() {
    let [start, elsewhere] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    env::set_current_dir(start.path()).unwrap();
    // As the kernel reports it: a temporary directory may be behind a symbolic link.
    let home = env::current_dir().unwrap();
    std::fs::create_dir("manifests").unwrap();
    std::fs::write("manifests/tool", "a tool").unwrap();

    let store = Store::open("store").unwrap();
    let backend = MemoryBackend::new().store("modules").unwrap();
    let backend = Arc::new(backend.every_machine(|guest| guest.on("work", Response::ok("").times(1))));
    let context = PlanContext::new(backend.capabilities()).base_directory("manifests");
    let plan = prepare("moved.yaml", MANIFEST, &context).into_plans().unwrap().remove(0);
    let tool = format!("{:?}", plan.files);
    assert!(tool.contains(&format!("{}/manifests/tool", home.display())), "{tool}");
    let build = |policy| Build::new(plan.clone(), backend.clone()).report_dir("reports").on_failure(policy);
    let (first, second) = (build(FailurePolicy::Destroy), build(FailurePolicy::Keep));

    env::set_current_dir(elsewhere.path()).unwrap();
    assert_eq!(store.root(), home.join("store"));
    let module = first.start().outcome().await.unwrap();
    assert_eq!(module.path.unwrap(), home.join("modules/memory/moved/module.json"));
    let failing = backend.as_ref().clone().every_machine(|guest| guest.on("work", Response::fails(1, "")));
    let error = second.start().outcome().await.unwrap_err();
    let failure = error.build_failure().unwrap();
    for login in &failure.kept.as_ref().unwrap().logins {
        assert!(login.key.as_ref().unwrap().is_file(), "{login:?}");
    }
    let lab = failure.kept.clone().unwrap();
    drop(error);
    failing.remove_lab(&lab.id).await.unwrap();

    let left: Vec<_> = elsewhere.path().read_dir().unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    env::set_current_dir("/").unwrap();
}
