//! The list of all tests, and the runner: one test after another, each within a time limit, with a check for what it
//! leaves.

use super::{
    Adapter, NotPassed, Outcome, Report, Rig, TestReport, TestResult, builds, consoles, dropped, firmware,
    hardware, imports, kept, labs, machines, modules, owners, pairs, served, streams, test_result::ensure,
    texts,
};
use crate::{backend::END_REPORTED_WITHIN, capability::Capability};
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    collections::BTreeSet,
    fmt,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

/// A test of the suite.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Test {
    /// The group of the test: the part of the contract that it covers.
    pub group: &'static str,
    /// The name of the test's function.
    pub function: &'static str,
    /// The capabilities that the backend must claim for the test, and that it proves when it passes.
    pub needs: &'static [Capability],
    run: for<'a> fn(&'a Rig) -> BoxFuture<'a, TestResult>,
}

impl Test {
    /// Returns what the test proves, as a sentence: the name of its function with spaces.
    #[must_use]
    pub fn name(&self) -> String {
        self.function.replace('_', " ")
    }
}

impl fmt::Debug for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.group, self.function)
    }
}

macro_rules! tests {
    ($($group:ident { $($test:ident $([$($need:ident),+])?),+ $(,)? })+) => {
        &[$($(Test {
            group: stringify!($group),
            function: stringify!($test),
            needs: &[$($(Capability::$need),+)?],
            run: |rig| Box::pin($group::$test(rig)),
        }),+),+]
    };
}

/// Returns all tests, in the order in which they run.
#[must_use]
pub fn tests() -> &'static [Test] {
    const TESTS: &[Test] = tests! {
        labs {
            diagnosis_may_be_repeated,
            a_lab_is_opened_and_destroyed_twice,
            an_id_is_in_use_while_its_lab_is_open,
            a_destroyed_lab_refuses_work,
            a_lab_can_be_destroyed_in_every_state,
            a_lab_can_be_destroyed_concurrently,
            a_forgotten_lab_is_reaped,
            labs_with_the_same_names_are_separate,
        }
        machines {
            start_wait_and_stop_work_in_every_order,
            any_number_of_callers_can_wait,
            several_callers_can_stop_a_machine,
            a_graceful_stop_ends_after_its_limit,
            a_death_is_reported_in_time,
            a_name_can_be_used_once_in_a_lab,
            operations_in_the_wrong_state_are_refused,
            machines_run_independently,
        }
        pairs {
            machines_created_concurrently_are_separate [SourceUrl, CloudInit],
            processors_and_memory_are_as_requested [SourceUrl, CloudInit],
            each_machine_has_its_own_consoles [SourceUrl, CloudInit],
            a_power_off_is_reported_in_time [SourceUrl, CloudInit],
        }
        streams {
            dialling_succeeds_once_the_guest_listens [SourceUrl, CloudInit],
            a_closed_port_refuses_connections [SourceUrl, CloudInit],
            dialling_does_not_reach_ports_of_the_host [SourceUrl, CloudInit],
            many_concurrent_connections_work [SourceUrl, CloudInit],
            large_transfers_arrive_complete [SourceUrl, CloudInit],
            one_half_of_a_connection_can_be_closed [SourceUrl, CloudInit, HalfClose],
            a_broken_connection_does_not_affect_others [SourceUrl, CloudInit],
        }
        consoles {
            consoles_refuse_what_they_cannot_do,
            the_end_of_the_serial_output_is_kept [SourceUrl, CloudInit, Serial],
            a_stalled_reader_blocks_no_one [SourceUrl, CloudInit, Serial],
            several_readers_share_the_serial_console [SourceUrl, CloudInit, Serial],
            input_to_the_serial_console_arrives [SourceUrl, CloudInit, Serial],
            several_viewers_share_the_display [SourceUrl, CloudInit, Display],
            a_compressed_screen_is_the_same [SourceUrl, CloudInit, Display],
            screenshots_are_taken [SourceUrl, CloudInit, Screenshot],
        }
        hardware {
            a_disk_on_virtio_is_detected [SourceUrl, CloudInit, SourceBlank, DiskVirtio],
            a_disk_on_scsi_is_detected [SourceUrl, CloudInit, SourceBlank, DiskScsi],
            a_disk_on_sata_is_detected [SourceUrl, CloudInit, SourceBlank, DiskSata],
            a_disk_on_usb_is_detected [SourceUrl, CloudInit, SourceBlank, DiskUsb],
            a_disk_on_ide_is_detected [SourceUrl, CloudInit, SourceBlank, DiskIde],
            nics_of_every_model_are_detected [SourceUrl, CloudInit, NicModels],
            nics_are_in_the_order_of_their_slots [SourceUrl, CloudInit, NicModels, NicSlots],
            a_cd_rom_is_readable [SourceUrl, CloudInit, Isos],
            a_floppy_is_readable [SourceUrl, CloudInit, Floppy],
        }
        served {
            files_are_served_to_the_guest [SourceUrl, CloudInit, HttpDirectory],
            files_are_served_only_to_machines_of_the_lab_while_it_exists [HttpDirectory],
        }
        imports {
            blank_disks_have_their_size [SourceBlank],
            an_image_can_be_imported_concurrently [SourceUrl],
            a_disk_has_the_requested_size [SourceUrl],
            an_expected_digest_is_verified [SourceUrl],
            an_invalid_image_is_refused [SourceUrl],
            files_are_fetched_and_verified,
            a_fetched_file_is_not_changed,
        }
        modules {
            a_captured_disk_is_described,
            a_module_is_published_listed_and_removed,
            a_module_replaces_another,
            a_disk_that_was_not_captured_is_not_published,
            a_module_is_kept_if_its_successor_cannot_be_published,
            a_module_in_use_is_not_removed [SourceBlank, SourceBuildRef],
            what_a_guest_wrote_is_captured_and_inherited [SourceUrl, CloudInit, SourceBuildRef],
        }
        firmware {
            a_machine_with_bios_keeps_nothing_outside_its_disks,
            a_machine_with_uefi_keeps_its_variables [SourceBlank, SourceBuildRef, Uefi],
            a_machine_with_secure_boot_keeps_its_variables [SourceBlank, SourceBuildRef, SecureBoot],
            a_machine_with_a_tpm_keeps_its_state [SourceBlank, SourceBuildRef, Tpm],
        }
        owners {
            resources_of_a_dead_owner_are_reaped,
            a_living_owner_is_never_reaped,
            a_module_is_complete_if_its_publisher_is_killed,
        }
        kept {
            a_lab_that_stays_is_attached_by_another_process [SourceBlank],
            a_guest_is_reached_in_an_attached_lab [SourceUrl, CloudInit],
            a_kept_lab_stays_until_it_is_removed [SourceBlank],
            an_expired_lab_is_reaped_and_no_other [SourceBlank],
            files_are_stored_with_a_lab,
        }
        dropped {
            opening_a_lab_may_be_dropped,
            opening_a_lab_that_stays_may_be_dropped,
            importing_and_serving_may_be_dropped,
            starting_a_machine_may_be_dropped,
            waiting_and_stopping_may_be_dropped,
            connecting_may_be_dropped,
            capturing_may_be_dropped,
            publishing_may_be_dropped,
            destroying_may_be_dropped,
            keeping_may_be_dropped,
            maintaining_a_backend_may_be_dropped,
        }
        texts {
            unusual_names_work_or_are_refused,
            long_names_remain_distinct,
            an_image_with_an_unusual_name_is_imported [SourceUrl],
        }
        builds {
            a_build_runs_every_kind_of_step [SourceUrl, CloudInit],
            a_failed_build_leaves_nothing_behind [SourceUrl, CloudInit],
            a_cancelled_build_leaves_nothing_behind [SourceUrl, CloudInit],
        }
    };
    TESTS
}

/// How the suite is run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Maximum duration of a test before it counts as failed. 4 min.
    pub limit: Duration,
    /// Maximum time until the end of a machine must be reported. [`END_REPORTED_WITHIN`], as in the contract.
    pub reaction: Duration,
    /// Maximum wait for what should happen soon, before it counts as never. 30 s.
    pub patience: Duration,
    /// Maximum time until what ends by itself must be gone. 10 s.
    pub settle: Duration,
    /// Selects tests whose `group: name` contains this text, or one of several texts separated by `|`.
    pub only: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            limit: Duration::from_secs(240),
            reaction: END_REPORTED_WITHIN,
            patience: Duration::from_secs(30),
            settle: Duration::from_secs(10),
            only: None,
        }
    }
}

impl Options {
    /// Returns options for all tests, with the limits of the contract.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Selects tests whose `group: name` contains this text, or one of several texts separated by `|`. Capabilities
    /// without a test are then not reported.
    #[must_use]
    pub fn only(mut self, text: impl Into<String>) -> Self {
        self.only = Some(text.into());
        self
    }

    /// Sets how soon the death of a machine must be reported, for a host that is too busy for the contract's two
    /// seconds.
    #[must_use]
    pub fn reaction(mut self, limit: Duration) -> Self {
        self.reaction = limit;
        self
    }
}

/// Runs every test that the capabilities of the adapter's backend claim, one after another.
///
/// Modules that exist at the start, or that a test leaves, are removed: give it a state of its own.
pub async fn run(adapter: Arc<dyn Adapter>, options: &Options) -> Report {
    let rig = Rig::new(Arc::clone(&adapter), options.clone());
    let capabilities = rig.backend().capabilities().clone();
    let mut report = Report {
        backend: rig.backend().name().to_owned(),
        tests: Vec::new(),
        unproven: Vec::new(),
        unavailable: unavailable(&rig).await,
        required: adapter.is_required(),
        partial: options.only.is_some(),
    };
    if report.unavailable.is_some() {
        return report;
    }
    let mut proven: BTreeSet<Capability> = BTreeSet::new();
    for test in tests() {
        let label = format!("{}: {}", test.group, test.name());
        if options.only.as_ref().is_some_and(|only| !only.split('|').any(|text| label.contains(text))) {
            continue;
        }
        close(&rig, test.group, &mut report).await;
        let began = Instant::now();
        let missing = test.needs.iter().find(|need| !capabilities.has(**need));
        let outcome = match missing {
            Some(missing) => Outcome::Skipped(format!("{missing} is not claimed")),
            None => one(&rig, test).await,
        };
        if outcome == Outcome::Passed {
            proven.extend(test.needs);
        }
        tracing::info!(target: "rudder::testing", test = label, outcome = outcome.label(), "tested");
        report.tests.push(TestReport {
            group: test.group,
            name: test.name(),
            outcome,
            took: began.elapsed(),
        });
    }
    close(&rig, "", &mut report).await;
    if !report.partial {
        report.unproven = capabilities.iter().filter(|claimed| !proven.contains(claimed)).collect();
    }
    report
}

/// Returns why the backend cannot be tested here, if so.
async fn unavailable(rig: &Rig) -> Option<String> {
    let report = match rig.backend().diagnose().await {
        Ok(report) => report,
        Err(error) => return Some(error.report()),
    };
    let missing = report.findings.iter().filter(|finding| finding.required && !finding.present);
    let missing: Vec<String> =
        missing.map(|finding| format!("{}: {}", finding.what, finding.detail)).collect();
    if missing.is_empty() { None } else { Some(missing.join("; ")) }
}

/// Shuts down guests shared by tests of other groups. Problems with that are attributed to the last of those tests.
async fn close(rig: &Rig, group: &str, report: &mut Report) {
    let closed = async {
        if rig.close_shared(group).await? {
            rig.expect_nothing_left("after the tests with a shared guest").await?;
        }
        Ok(())
    };
    if let Err(NotPassed::Failed(why)) = closed.await
        && let Some(last) = report.tests.last_mut()
        && last.outcome == Outcome::Passed
    {
        last.outcome = Outcome::Failed(why);
    }
}

async fn one(rig: &Rig, test: &Test) -> Outcome {
    let work = async {
        rig.begin().await?;
        (test.run)(rig).await?;
        rig.expect_nothing_left("afterwards").await?;
        let modules = rig.backend().modules().await?;
        let names: Vec<_> = modules.iter().map(|module| &module.name).collect();
        ensure!(names.is_empty(), "afterwards: expected no module, but found {names:?}");
        Ok(())
    };
    let limit = rig.options().limit;
    let result = match tokio::time::timeout(limit, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(NotPassed::Failed(format!("it panicked: {text}")))
        }
        Err(_) => Err(NotPassed::Failed(format!("expected it to end within {limit:?}, but it did not"))),
    };
    match result {
        Ok(()) => Outcome::Passed,
        Err(problem) => {
            rig.sweep().await;
            match problem {
                NotPassed::Failed(why) => Outcome::Failed(why),
                NotPassed::Skipped(why) => Outcome::Skipped(why),
            }
        }
    }
}
