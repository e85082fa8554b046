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
pub(crate) struct Facts {
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

impl Facts {
    pub(crate) fn gather(built_in: bool) -> Self {
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
                "/dev/kvm is not there",
                "load the module kvm_intel or kvm_amd, or switch on virtualisation in the firmware",
            ))
        } else if self.device == Device::Denied {
            Some(("/dev/kvm may not be opened", "add the user to the group kvm"))
        } else if !self.hardware {
            Some((
                "/dev/kvm is there, but the processor shows neither vmx nor svm, and ordinary kernels do not boot on such a KVM",
                "switch on nested virtualisation for this machine",
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
pub(crate) fn decide(wanted: Accelerator, facts: Facts) -> Result<(Chosen, Option<String>)> {
    match (wanted, facts.obstacle()) {
        (Accelerator::Tcg, _) => Ok((Chosen::Tcg, None)),
        (Accelerator::Auto | Accelerator::Kvm, None) => Ok((Chosen::Kvm, None)),
        (Accelerator::Auto, Some((why, help))) => Ok((
            Chosen::Tcg,
            Some(format!(
                "machines run without hardware acceleration (TCG), several times slower: {why}; to change that, {help}"
            )),
        )),
        // Requested explicitly, and QEMU can at least try.
        (Accelerator::Kvm, Some((why, _))) if facts.built_in && facts.device == Device::Opens => {
            Ok((Chosen::Kvm, Some(format!("KVM is used because it was asked for, although {why}"))))
        }
        (Accelerator::Kvm, Some((why, help))) => Err(Error::new(
            ErrorKind::HostMissing,
            format!("expected KVM, which was asked for, but found that {why}"),
        )
        .with_help(format!("{help}; or use the accelerator auto or tcg"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GOOD: Facts = Facts { device: Device::Opens, hardware: true, built_in: true };

    #[test]
    fn auto_takes_kvm_only_where_everything_is_there() {
        assert_eq!(decide(Accelerator::Auto, GOOD).unwrap(), (Chosen::Kvm, None));
        for (facts, why) in [
            (Facts { hardware: false, ..GOOD }, "neither vmx nor svm"),
            (Facts { device: Device::Missing, ..GOOD }, "/dev/kvm is not there"),
            (Facts { device: Device::Denied, ..GOOD }, "group kvm"),
            (Facts { built_in: false, ..GOOD }, "built without KVM"),
        ] {
            let (chosen, notice) = decide(Accelerator::Auto, facts).unwrap();
            assert_eq!(chosen, Chosen::Tcg);
            assert!(notice.unwrap().contains(why));
        }
    }

    #[test]
    fn what_is_forced_is_done_or_refused_but_never_replaced() {
        assert_eq!(decide(Accelerator::Tcg, GOOD).unwrap(), (Chosen::Tcg, None));
        let (chosen, notice) = decide(Accelerator::Kvm, Facts { hardware: false, ..GOOD }).unwrap();
        assert_eq!((chosen, notice.is_some()), (Chosen::Kvm, true));
        let error = decide(Accelerator::Kvm, Facts { device: Device::Missing, ..GOOD }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostMissing);
        assert_eq!(
            error.report(),
            "expected KVM, which was asked for, but found that /dev/kvm is not there\n  help: load the module \
             kvm_intel or kvm_amd, or switch on virtualisation in the firmware; or use the accelerator auto or tcg"
        );
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags\t\t: svm\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svme\nvmx flags\t: vnmi\nmodel name\t: svm\n"));
        assert!(!has_virtualisation(""));
    }
}
