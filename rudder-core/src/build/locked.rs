//! Locked builds: compares inputs with an earlier record, and names an input whose bytes have changed.

use crate::{
    Error, ErrorKind, Result,
    module::{InputRecord, Module, Provenance},
    plan::{Plan, PlannedMachine, StepAction},
};

/// Returns what a locked build cannot promise to repeat, with the name of the VM: inputs are compared, a person's work is not.
pub(super) fn not_lockable(plan: &Plan) -> Vec<(&str, String)> {
    let by_hand = |vm: &PlannedMachine| {
        let steps = vm.steps.iter().enumerate();
        let by_hand = steps.filter(|(_, step)| matches!(step.action, StepAction::Handbuild { .. }));
        let numbered = by_hand.map(|(place, step)| format!("{} ({})", place + 1, step.name));
        numbered.collect::<Vec<_>>()
    };
    let said = |step: String| {
        format!("the inputs of this build are locked, but the manual work in step {step} is not")
    };
    let machines = plan.machines.iter();
    machines.flat_map(|vm| by_hand(vm).into_iter().map(move |step| (vm.name.as_str(), said(step)))).collect()
}

/// The inputs of an earlier build, and the name of that build in messages.
#[derive(Debug, Clone)]
pub(super) struct Lock {
    inputs: Vec<InputRecord>,
    name: String,
}

impl Lock {
    pub(super) fn new(module: &Module) -> Self {
        let name = format!("module {} of {}", module.name, module.created);
        Self { name, ..Self::of(&module.provenance) }
    }

    fn of(provenance: &Provenance) -> Self {
        Self { inputs: provenance.inputs.clone(), name: String::new() }
    }

    /// Checks an input against the record of the same URL, or of the same role if the URL is new.
    ///
    /// # Errors
    /// `ChecksumMismatch` when the content differs, `InvalidInput` when the record does not contain the input, `Unsupported` when
    /// the content then or now is unknown.
    pub(super) fn check(&self, input: &InputRecord) -> Result<()> {
        let known = |same: fn(&InputRecord, &InputRecord) -> bool| {
            self.inputs.iter().filter(move |known| same(known, input)).collect::<Vec<_>>()
        };
        let mut records = known(|known, input| known.url == input.url);
        if records.is_empty() {
            records = known(|known, input| known.role == input.role);
        }
        let content = &input.content.id;
        if content.is_some() && records.iter().any(|known| known.content.id == *content) {
            return Ok(());
        }
        let (role, name) = (&input.role, &self.name);
        let error = match (records.first().map(|known| &known.content.id), content) {
            (None, _) => Error::new(
                ErrorKind::InvalidInput,
                format!("expected only inputs of {name}, but found the {role}, which it does not record"),
            ),
            (Some(Some(then)), Some(now)) => Error::new(
                ErrorKind::ChecksumMismatch,
                format!("expected the {role} as in {name} ({then}), but found other bytes ({now})"),
            ),
            (Some(then), now) => {
                let when = if now.is_none() { "were imported now" } else { "were imported then" };
                let known = now.as_ref().or(then.as_ref());
                let known = known
                    .map_or("neither identity is known".to_owned(), |known| format!("only {known} is known"));
                let message = format!(
                    "expected the {role} as in {name}, but it is not known which bytes {when} ({known})"
                );
                let help = "add a `checksum`, or build without `locked`: this backend does not report which bytes it imports";
                let error = Error::new(ErrorKind::Unsupported, message).with_help(help);
                return Err(error.with_context("input", &input.url));
            }
        };
        Err(error
            .with_context("input", &input.url)
            .with_help("restore the earlier content, or build without `locked` to accept the new content"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        content::{Content, ContentId},
        module::InputRole,
    };

    fn input(role: &str, url: &str, bytes: &[u8]) -> InputRecord {
        let role = match role.strip_prefix("source of VM ") {
            Some(vm) => InputRole::source(vm),
            None => InputRole::File,
        };
        InputRecord::new(role, url, Content::of(bytes))
    }

    #[test]
    fn unknown_content_is_not_vouched_for() {
        let of = |content| InputRecord::new(InputRole::source("web"), "http://a/x", content);
        let lock = |content| Lock { inputs: vec![of(content)], name: "module m".into() };
        let snapshot = || Content::identified(ContentId::Cluster("snapshot-1".to_owned()));
        assert!(lock(snapshot()).check(&of(snapshot())).is_ok());
        for (then, now) in [
            (Content::unknown(), Content::unknown()),
            (Content::of(b"1"), Content::unknown()),
            (Content::unknown(), Content::of(b"1")),
        ] {
            let refused = lock(then).check(&of(now)).expect_err("unknown");
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            let report = refused.report();
            assert!(
                report.contains("input http://a/x: expected the source of VM web as in module m"),
                "{report}"
            );
            assert!(report.contains("not known"), "{report}");
        }
        let changed = lock(snapshot()).check(&of(Content::of(b"1"))).expect_err("another");
        assert_eq!(changed.kind(), ErrorKind::ChecksumMismatch);
    }

    #[test]
    fn changed_content_is_named_but_a_moved_url_is_accepted() {
        let lock =
            Lock { inputs: vec![input("source of VM web", "http://a/x", b"1")], name: "module m".into() };
        assert!(lock.check(&input("source of VM web", "http://a/x", b"1")).is_ok());
        assert!(lock.check(&input("source of VM web", "http://mirror/x", b"1")).is_ok());
        assert!(lock.check(&input("source of VM renamed", "http://a/x", b"1")).is_ok());
        let changed = lock.check(&input("source of VM web", "http://a/x", b"2")).expect_err("changed");
        assert_eq!(changed.kind(), ErrorKind::ChecksumMismatch);
        assert_eq!(
            changed.report(),
            "input http://a/x: expected the source of VM web as in module m (sha256:\
             6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b), but found other bytes (sha256:\
             d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35)\n  help: restore the earlier content, or build without `locked` to accept the new content"
        );
        let new = lock.check(&input("file tool", "http://a/tool", b"1")).expect_err("unknown");
        assert_eq!(new.kind(), ErrorKind::InvalidInput);
    }
}
