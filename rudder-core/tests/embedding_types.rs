//! A program can name the types in the signatures of this crate without a dependency of its own, and set values without
//! struct literals.
#![allow(clippy::unwrap_used)]

use rudder_core::{
    async_trait::async_trait,
    backend::{BoxedStream, ByteStream},
    build::Events,
    event::Event,
    futures::{StreamExt as _, future::BoxFuture},
    guest::Endpoint,
    memory::MemoryBackend,
    module::Module,
    plan::{Limits, PlanContext, PlannedUrl, prepare},
    serde_json::Value,
    step::StepContext,
    timestamp::Timestamp,
    tokio::io::DuplexStream,
    url::Url,
};

/// Compiles only as long as the signatures use these types.
#[test]
fn the_types_of_signatures_can_be_named() {
    let _: fn(&Event) -> Timestamp = |event| event.time;
    let _: fn(&Module) -> Timestamp = |module| module.created;
    let _: fn(PlannedUrl) -> Url = |planned| planned.url;
    let _: fn() -> Value = rudder_core::event::json_schema;
    let _: fn() -> Value = rudder_core::manifest::json_schema;
    let _: fn(StepContext<'_>) -> BoxFuture<'_, ()> = |context| context.cancelled;
    let _: fn(DuplexStream) -> BoxedStream = |stream| Box::new(stream);
    let dial = || -> BoxFuture<'static, rudder_core::Result<BoxedStream>> {
        Box::pin(async { Ok(Box::new(rudder_core::tokio::io::duplex(1).0) as BoxedStream) })
    };
    let _ = Endpoint::new(dial);
    let _ = |events: Events| -> BoxFuture<'static, Vec<Event>> { Box::pin(events.collect()) };
    fn is_stream<T: ByteStream>() {}
    is_stream::<DuplexStream>();
}

/// A trait of an embedding program, written like those of the contract.
#[async_trait]
trait Asked {
    async fn asked(&self) -> bool;
}

#[async_trait]
impl Asked for () {
    async fn asked(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn the_macro_of_the_contract_works_through_the_facade() {
    assert!(().asked().await);
}

#[test]
fn limits_are_set_without_struct_literals() {
    let manifest = b"name: big\nvms:\n- {name: a, source: {blank: true}, resources: {cpu: 4, memory: 4Gi}, disks: [{name: d, size: 60Gi}, \
                     {name: e, size: 1Gi}]}\n- {name: b, source: {blank: true}, resources: {cpu: 1, memory: 1Gi}}\n";
    let backend = MemoryBackend::new();
    let over = |limits: Limits| {
        let context = PlanContext::new(rudder_core::backend::Backend::capabilities(&backend)).limits(limits);
        let found = prepare("big.yaml", manifest, &context).diagnostics;
        found
            .into_iter()
            .filter(|finding| finding.code == "over-limit")
            .map(|finding| finding.message)
            .collect::<Vec<_>>()
    };
    let none = || Limits::new().max_disk_size(None);
    assert_eq!(over(Limits::new()), ["expected a disk of at most 50Gi, but found 60Gi"]);
    assert_eq!(over(none()), Vec::<String>::new());
    assert_eq!(over(none().max_cpu(2)), ["expected at most 2 cores, but found 4"]);
    assert_eq!(over(none().max_memory(2 << 30)), ["expected at most 2Gi of memory, but found 4Gi"]);
    assert_eq!(over(none().max_disks(1)), ["expected at most 1 disks of a VM, but found 2"]);
    assert_eq!(over(none().max_vms(1)), ["expected at most 1 VMs, but found 2"]);
}
