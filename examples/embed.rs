//! The program of the README: a manifest becomes a module on QEMU.

use rudder::{
    backend::Backend,
    build::Build,
    plan::{PlanContext, prepare},
    qemu::QemuBackend,
    store::Store,
};
use std::{error::Error, io::Write, path::Path, sync::Arc};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).unwrap_or("examples/manifests/base.yaml".into());
    let store = Store::open(Store::default_root())?;
    let backend = Arc::new(QemuBackend::builder(store).build());

    let context = PlanContext::new(backend.capabilities())
        .modules(backend.modules().await?)
        .damaged_modules(backend.damaged_modules().await?)
        .base_directory(Path::new(&file).parent().ok_or("expected a manifest file")?);
    let prepared = prepare(&file, &std::fs::read(&file)?, &context);
    let _ = write!(std::io::stderr(), "{}", prepared.render_warnings());
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    for plan in prepared.into_plans()? {
        let build = Build::new(plan, backend.clone()).start();
        let mut events = build.events();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    // Nobody reads any more, or the disk is full.
                    Some(event) if writeln!(std::io::stdout(), "{event}").is_err() => build.cancel(),
                    Some(_) => {}
                    None => break,
                },
                _ = interrupt.recv() => build.cancel(),
                _ = terminate.recv() => build.cancel(),
                _ = hang_up.recv() => build.cancel(),
            }
        }
        build.outcome().await?;
    }
    Ok(())
}
