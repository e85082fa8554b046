//! Building against an earlier record: an input whose bytes changed since is an error that names it.

use crate::{
    Error, ErrorKind, Result,
    module::{InputRecord, Module, Provenance},
    plan::{Plan, PlannedMachine, StepAction},
};

/// What a locked build cannot promise to repeat, and of which VM: inputs are compared, a person's work is not.
pub(super) fn beyond(plan: &Plan) -> Vec<(&str, String)> {
    let by_hand = |vm: &PlannedMachine| {
        let steps = vm.steps.iter().enumerate();
        let by_hand = steps.filter(|(_, step)| matches!(step.action, StepAction::Handbuild { .. }));
        let numbered = by_hand.map(|(place, step)| format!("{} ({})", place + 1, step.name));
        numbered.collect::<Vec<_>>()
    };
    let said = |step: String| {
        format!("the inputs of this build are locked, but what a person does in step {step} is not")
    };
    let machines = plan.machines.iter();
    machines.flat_map(|vm| by_hand(vm).into_iter().map(move |step| (vm.name.as_str(), said(step)))).collect()
}

/// The inputs of an earlier build, and what it is called in messages.
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

    /// Checks an input against what the record says of the same URL, or of the same role when its URL is new.
    ///
    /// # Errors
    /// `ChecksumMismatch` when the bytes differ, `InvalidInput` when the record knows nothing of it.
    pub(super) fn check(&self, input: &InputRecord) -> Result<()> {
        let known = |same: fn(&InputRecord, &InputRecord) -> bool| {
            self.inputs.iter().filter(move |known| same(known, input)).collect::<Vec<_>>()
        };
        let mut records = known(|known, input| known.url == input.url);
        if records.is_empty() {
            records = known(|known, input| known.role == input.role);
        }
        if records.iter().any(|known| known.sha256 == input.sha256) {
            return Ok(());
        }
        let error = match records.first() {
            Some(known) => Error::new(
                ErrorKind::ChecksumMismatch,
                format!(
                    "expected the {} as in {} (sha256 {}), but found other bytes (sha256 {})",
                    input.role, self.name, known.sha256, input.sha256
                ),
            ),
            None => Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "expected only inputs of {}, but found the {}, which it does not record",
                    self.name, input.role
                ),
            ),
        };
        Err(error
            .with_context("input", &input.url)
            .with_help("put the earlier bytes back, or build without `locked` to accept the new ones"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn input(role: &str, url: &str, bytes: &[u8]) -> InputRecord {
        InputRecord {
            role: role.into(),
            url: url.into(),
            size: bytes.len() as u64,
            sha256: Digest::of(bytes),
        }
    }

    #[test]
    fn changed_bytes_are_named_and_moved_ones_are_not_changed() {
        let lock =
            Lock { inputs: vec![input("source of VM web", "http://a/x", b"1")], name: "module m".into() };
        assert!(lock.check(&input("source of VM web", "http://a/x", b"1")).is_ok());
        assert!(lock.check(&input("source of VM web", "http://mirror/x", b"1")).is_ok());
        assert!(lock.check(&input("source of VM renamed", "http://a/x", b"1")).is_ok());
        let changed = lock.check(&input("source of VM web", "http://a/x", b"2")).expect_err("changed");
        assert_eq!(changed.kind(), ErrorKind::ChecksumMismatch);
        assert_eq!(
            changed.report(),
            "input http://a/x: expected the source of VM web as in module m (sha256 \
             6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b), but found other bytes (sha256 \
             d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35)\n  help: put the earlier bytes back, or \
             build without `locked` to accept the new ones"
        );
        let new = lock.check(&input("file tool", "http://a/tool", b"1")).expect_err("unknown");
        assert_eq!(new.kind(), ErrorKind::InvalidInput);
    }
}
