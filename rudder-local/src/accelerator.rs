//! The choice of a machine's accelerator, and the reasons for it.

use rudder_core::{Error, ErrorKind, Result};
use std::{fmt, fs::OpenOptions, io, path::Path};

/// The requested accelerator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Accelerator {
    /// KVM if an ordinary guest can run on it, else TCG.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// TCG: QEMU translates every instruction. Works everywhere, but is slow.
    Tcg,
}

/// The chosen accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// The kernel's KVM.
    Kvm,
    /// QEMU's own binary translator.
    Tcg,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What the host reports about KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvmSupport {
    /// Whether `/dev/kvm` opens for reading and writing.
    pub(crate) device: Device,
    /// Whether the processor has hardware virtualisation (`vmx` or `svm` among the flags of `/proc/cpuinfo`).
    pub(crate) hardware: bool,
    /// Whether QEMU was built with KVM (`query-kvm`).
    pub(crate) built_in: bool,
}

/// The result of opening `/dev/kvm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Opens,
    Missing,
    Denied,
}

impl KvmSupport {
    pub(crate) fn detect(built_in: bool) -> Self {
        let device = match OpenOptions::new().read(true).write(true).open(Path::new("/dev/kvm")) {
            Ok(_) => Device::Opens,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Device::Denied,
            Err(_) => Device::Missing,
        };
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self { device, hardware: has_virtualisation(&cpuinfo), built_in }
    }

    /// Returns why an ordinary guest cannot run on KVM here, and how to fix it; `None` if it can.
    fn obstacle(self) -> Option<(&'static str, &'static str)> {
        if !self.built_in {
            Some(("this QEMU was built without KVM", "install Debian's package qemu-system-x86"))
        } else if self.device == Device::Missing {
            Some((
                "/dev/kvm does not exist",
                "load the module kvm_intel or kvm_amd, or enable virtualisation in the firmware",
            ))
        } else if self.device == Device::Denied {
            Some(("/dev/kvm cannot be opened (permission denied)", "add the user to the group kvm"))
        } else if !self.hardware {
            Some((
                "/dev/kvm exists, but the processor reports neither vmx nor svm, and ordinary kernels do not boot on such a KVM",
                "enable nested virtualisation for this machine",
            ))
        } else {
            None
        }
    }
}

/// Returns whether these contents of `/proc/cpuinfo` show hardware virtualisation.
fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("flags"))
        .any(|flags| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Returns the accelerator, and a notice about it for the user.
pub(crate) fn decide(requested: Accelerator, support: KvmSupport) -> Result<(Chosen, Option<String>)> {
    match (requested, support.obstacle()) {
        (Accelerator::Tcg, _) => Ok((Chosen::Tcg, None)),
        (Accelerator::Auto | Accelerator::Kvm, None) => Ok((Chosen::Kvm, None)),
        (Accelerator::Auto, Some((why, help))) => Ok((
            Chosen::Tcg,
            Some(format!(
                "machines run without hardware acceleration (TCG), several times slower: {why}; to change that, {help}"
            )),
        )),
        // Requested explicitly, and QEMU can at least try.
        (Accelerator::Kvm, Some((why, _))) if support.built_in && support.device == Device::Opens => {
            Ok((Chosen::Kvm, Some(format!("KVM is used because it was requested, although {why}"))))
        }
        (Accelerator::Kvm, Some((why, help))) => Err(Error::new(
            ErrorKind::HostMissing,
            format!("expected KVM, which was requested, but found that {why}"),
        )
        .with_help(format!("{help}; or use the accelerator auto or tcg"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const COMPLETE: KvmSupport = KvmSupport { device: Device::Opens, hardware: true, built_in: true };

    #[test]
    fn auto_uses_kvm_only_if_all_requirements_are_met() {
        assert_eq!(decide(Accelerator::Auto, COMPLETE).unwrap(), (Chosen::Kvm, None));
        for (support, why) in [
            (KvmSupport { hardware: false, ..COMPLETE }, "neither vmx nor svm"),
            (KvmSupport { device: Device::Missing, ..COMPLETE }, "/dev/kvm does not exist"),
            (KvmSupport { device: Device::Denied, ..COMPLETE }, "group kvm"),
            (KvmSupport { built_in: false, ..COMPLETE }, "built without KVM"),
        ] {
            let (chosen, notice) = decide(Accelerator::Auto, support).unwrap();
            assert_eq!(chosen, Chosen::Tcg);
            assert!(notice.unwrap().contains(why));
        }
    }

    #[test]
    fn an_explicit_accelerator_is_used_or_refused_but_never_replaced() {
        assert_eq!(decide(Accelerator::Tcg, COMPLETE).unwrap(), (Chosen::Tcg, None));
        let (chosen, notice) = decide(Accelerator::Kvm, KvmSupport { hardware: false, ..COMPLETE }).unwrap();
        assert_eq!((chosen, notice.is_some()), (Chosen::Kvm, true));
        let error = decide(Accelerator::Kvm, KvmSupport { device: Device::Missing, ..COMPLETE }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostMissing);
        assert_eq!(
            error.report(),
            "expected KVM, which was requested, but found that /dev/kvm does not exist\n  help: load the module \
             kvm_intel or kvm_amd, or enable virtualisation in the firmware; or use the accelerator auto or tcg"
        );
    }

    #[test]
    fn virtualisation_flags_are_matched_as_whole_words() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags\t\t: svm\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svme\nvmx flags\t: vnmi\nmodel name\t: svm\n"));
        assert!(!has_virtualisation(""));
    }
}
