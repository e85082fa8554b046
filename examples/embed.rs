//! The twenty lines of the README: a manifest becomes a module on QEMU.

#![allow(clippy::print_stdout)] // A program prints.

use rudder::{
    backend::Backend,
    build::Build,
    plan::{PlanContext, prepare},
    qemu::QemuBackend,
    store::Store,
};
use std::{error::Error, path::Path, sync::Arc};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).unwrap_or("examples/manifests/base.yaml".into());
    let store = Store::open(Store::default_root())?;
    let backend = Arc::new(QemuBackend::builder(store).build());

    let context = PlanContext::new(backend.capabilities())
        .with_modules(backend.modules().await?)
        .with_damaged_modules(backend.damaged_modules().await?)
        .with_base_directory(Path::new(&file).parent().ok_or("that is no file")?);
    for plan in prepare(&file, &std::fs::read(&file)?, &context).into_plans()? {
        let build = Build::new(plan, backend.clone()).start();
        let mut events = build.events();
        while let Some(event) = events.next().await {
            println!("{event}");
        }
        let module = build.outcome().await?;
        println!("{} holds {} machine(s)", module.name, module.machines.len());
    }
    Ok(())
}
