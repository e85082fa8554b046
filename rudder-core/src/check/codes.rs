//! The codes of all diagnostics that checking and planning report, with their severity and meaning.

use crate::diagnostic::Severity;

/// The code of a rule, which its diagnostics carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Code {
    /// Stable name, in kebab-case.
    pub name: &'static str,
    /// Severity of a violation: an error refuses the manifest, a warning does not.
    pub severity: Severity,
    /// Meaning, as one sentence.
    pub meaning: &'static str,
}

macro_rules! codes {
    ($($constant:ident $severity:ident $name:literal $meaning:literal)*) => {
        $(
            #[doc = $meaning]
            pub const $constant: Code = Code { name: $name, severity: Severity::$severity, meaning: $meaning };
        )*

        /// All codes.
        pub const ALL: &[Code] = &[$($constant),*];
    };
}

codes! {
    MISSING_FIELD Error "missing-field" "A required field is missing."
    NO_SOURCE Error "no-source" "A VM has no source for its boot disk."
    SEVERAL_SOURCES Error "several-sources" "A VM has more than one source."
    EXCLUSIVE_FIELDS Error "exclusive-fields" "Two mutually exclusive fields are both present."
    DUPLICATE_NAME Error "duplicate-name" "Two entries of one list have the same name."
    INVALID_NAME Error "invalid-name" "A name is not a valid Name."
    INVALID_FILE_NAME Error "invalid-file-name" "A file name is empty, or contains a slash, `..`, or a character that file names cannot contain."
    INVALID_QUANTITY Error "invalid-quantity" "A quantity does not follow the grammar of Kubernetes, or is out of range."
    INVALID_DURATION Error "invalid-duration" "A duration does not follow the grammar of Go, or is zero where it must not be."
    INVALID_CIDR Error "invalid-cidr" "A network is not an IPv4 network in CIDR notation."
    INVALID_MAC Error "invalid-mac" "A hardware address is not a unicast EUI-48 address."
    INVALID_IP Error "invalid-ip" "An address is not an IPv4 address."
    INVALID_URL Error "invalid-url" "A URL cannot be parsed, or its scheme is not http, https or file."
    INVALID_CHECKSUM Error "invalid-checksum" "A checksum is not a sha256 of 64 hexadecimal digits, or has no URL beside it."
    INVALID_VALUE Error "invalid-value" "A value is not one of the possible values."
    UNKNOWN_FILE Error "unknown-file" "A reference names a file that `files` does not declare."
    UNKNOWN_SUBNET Error "unknown-subnet" "A reference names a subnet that `network.subnets` does not declare."
    UNKNOWN_VPC Error "unknown-vpc" "A reference names a VPC that `network.vpcs` does not declare."
    UNKNOWN_VM Error "unknown-vm" "A reference names a VM that does not exist."
    UNKNOWN_MODULE Error "unknown-module" "A reference names a module that has not been built, or is damaged."
    UNKNOWN_INPUT Error "unknown-input" "A reference names a key of a ConfigMap or Secret that was not provided."
    IP_OUTSIDE_SUBNET Error "ip-outside-subnet" "The fixed address of a NIC is outside its subnet."
    IP_TAKEN Error "ip-taken" "Two NICs of one subnet have the same fixed address."
    IP_RESERVED Error "ip-reserved" "The fixed address of a NIC is the gateway, network or broadcast address."
    MAC_TAKEN Error "mac-taken" "Two NICs of a build have the same hardware address."
    SUBNETS_OVERLAP Error "subnets-overlap" "Two subnets of one VPC overlap."
    SUBNET_TOO_NARROW Error "subnet-too-narrow" "A subnet has too few addresses."
    INVALID_SLOT Error "invalid-slot" "The slot of a NIC is not in the range 1 to 9."
    SLOT_TAKEN Error "slot-taken" "Two NICs of a VM have the same slot."
    TOO_MANY_NICS Error "too-many-nics" "A VM has more than 9 NICs."
    STEP_MISMATCH Error "step-mismatch" "A provisioner has a block that does not match its type."
    DESTINATION_NOT_ABSOLUTE Error "destination-not-absolute" "The destination of a file is not an absolute path."
    BOOT_DISK_ON_USB Error "boot-disk-on-usb" "The boot disk is on usb."
    BOOT_COMMAND_TOKEN Error "boot-command-token" "A boot command contains an unknown token."
    BOOT_COMMAND_VARIABLE Error "boot-command-variable" "A boot command contains a template variable that is unknown, or has no value because no files are served."
    BOOT_COMMAND_HOLD Error "boot-command-hold" "A boot command holds a key that it never releases, or releases one that it does not hold."
    BOOT_COMMAND_CHARACTER Error "boot-command-character" "A boot command contains a character that a US keyboard does not have."
    BOOT_COMMAND_WAIT Error "boot-command-wait" "A wait for text in a boot command has no text in quotes, or a limit that is not a duration."
    FLOPPY_TOO_LARGE Error "floppy-too-large" "The files of a floppy do not fit into 1.44 MB."
    UNSUPPORTED Error "unsupported" "The backend, or this version of Rudder, does not support what is requested."
    OVER_LIMIT Error "over-limit" "A size or a count exceeds a limit of the embedding program."
    INTERNAL Error "internal" "A manifest without errors could not be planned: a bug in Rudder."
    UNPINNED_URL Warning "unpinned-url" "A URL refers to something that changes over time, such as `latest`."
    MISSING_CHECKSUM Warning "missing-checksum" "A download has no checksum."
    NOT_REPEATABLE Warning "not-repeatable" "A step needs a person, so the build cannot be repeated from its manifest alone."
    UNUSED_FILE Warning "unused-file" "A declared file is not used."
    DEPRECATED_FIELD Warning "deprecated-field" "A field no longer has an effect."
    INEFFECTIVE_FIELD Warning "ineffective-field" "A field has no effect in its context."
    USER_DATA_IGNORED Warning "user-data-ignored" "cloud-init ignores the user data."
    LINE_ENDS Warning "line-ends" "A script contains carriage returns, which its shell takes as parts of commands."
    NO_LOGIN Warning "no-login" "Nothing lets Rudder log in to the guest: the login over SSH will probably fail."
}

/// Returns the code with this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Code> {
    ALL.iter().find(|code| code.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_kebab_case() {
        for (index, code) in ALL.iter().enumerate() {
            assert!(code.name.bytes().all(|c| c.is_ascii_lowercase() || c == b'-'), "{}", code.name);
            assert!(ALL[..index].iter().all(|other| other.name != code.name), "{}", code.name);
            assert!(code.meaning.ends_with('.'), "{}", code.name);
            assert_eq!(find(code.name), Some(code));
        }
    }
}
