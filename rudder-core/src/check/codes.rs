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
    NO_SOURCE Error "no-source" "A VM does not say what its boot disk starts from."
    SEVERAL_SOURCES Error "several-sources" "A VM names more than one source."
    EXCLUSIVE_FIELDS Error "exclusive-fields" "Two fields stand side by side of which only one may be there."
    DUPLICATE_NAME Error "duplicate-name" "Two things of one list have the same name."
    INVALID_NAME Error "invalid-name" "A name does not have the form of a Name."
    INVALID_FILE_NAME Error "invalid-file-name" "The name of a file is empty, or has a slash, `..`, or a character that file names cannot have."
    INVALID_QUANTITY Error "invalid-quantity" "A quantity does not follow the grammar of Kubernetes, or makes no sense where it stands."
    INVALID_DURATION Error "invalid-duration" "A duration does not follow the grammar of Go, or is zero where it cannot be."
    INVALID_CIDR Error "invalid-cidr" "A network is not an IPv4 network in CIDR notation."
    INVALID_MAC Error "invalid-mac" "A hardware address is not a unicast EUI-48."
    INVALID_IP Error "invalid-ip" "An address is not an IPv4 address."
    INVALID_URL Error "invalid-url" "A URL cannot be read, or its scheme is not http, https or file."
    INVALID_CHECKSUM Error "invalid-checksum" "A checksum is not a sha256 of 64 hexadecimal digits, or there is nothing that it is of."
    INVALID_VALUE Error "invalid-value" "A value is not one of those that are possible."
    UNKNOWN_FILE Error "unknown-file" "A file is named that `files` does not have."
    UNKNOWN_SUBNET Error "unknown-subnet" "A subnet is named that `network.subnets` does not have."
    UNKNOWN_VPC Error "unknown-vpc" "A VPC is named that `network.vpcs` does not have."
    UNKNOWN_VM Error "unknown-vm" "A VM is named that does not exist."
    UNKNOWN_MODULE Error "unknown-module" "A module is named that has not been built, or is damaged."
    UNKNOWN_INPUT Error "unknown-input" "A key of a ConfigMap or Secret is named that was not given."
    IP_OUTSIDE_SUBNET Error "ip-outside-subnet" "The fixed address of a card is not inside its subnet."
    IP_TAKEN Error "ip-taken" "Two cards of one subnet have the same fixed address."
    IP_RESERVED Error "ip-reserved" "The fixed address of a card is the gateway's, the network's or the broadcast address."
    MAC_TAKEN Error "mac-taken" "Two cards of a build have the same hardware address."
    SUBNETS_OVERLAP Error "subnets-overlap" "Two subnets of one VPC share addresses."
    SUBNET_TOO_NARROW Error "subnet-too-narrow" "A subnet has too few addresses."
    INVALID_SLOT Error "invalid-slot" "The slot of a card is not 1 to 9."
    SLOT_TAKEN Error "slot-taken" "Two cards of a VM have the same slot."
    TOO_MANY_NICS Error "too-many-nics" "A VM has more than 9 cards."
    STEP_MISMATCH Error "step-mismatch" "A provisioner has a block that does not match its type."
    DESTINATION_NOT_ABSOLUTE Error "destination-not-absolute" "The destination of a file is not an absolute path."
    BOOT_DISK_ON_USB Error "boot-disk-on-usb" "The disk that boots is on usb."
    BOOT_COMMAND_TOKEN Error "boot-command-token" "A boot command has a token that does not exist."
    BOOT_COMMAND_VARIABLE Error "boot-command-variable" "A boot command has a template variable that does not exist, or has no value because no files are served."
    BOOT_COMMAND_HOLD Error "boot-command-hold" "A boot command holds a key that it never releases, or releases one that it does not hold."
    BOOT_COMMAND_CHARACTER Error "boot-command-character" "A boot command has a character that a US keyboard does not have."
    BOOT_COMMAND_WAIT Error "boot-command-wait" "A boot command waits for a text that it does not give in quotes, or with a limit that is no duration."
    FLOPPY_TOO_LARGE Error "floppy-too-large" "The files of a floppy do not fit on 1.44 MB."
    UNSUPPORTED Error "unsupported" "The backend, or this version of Rudder, cannot do what is asked."
    OVER_LIMIT Error "over-limit" "Something is larger, or there are more, than the embedding program allows."
    INTERNAL Error "internal" "A manifest without mistakes could not be planned: a bug of Rudder."
    UNPINNED_URL Warning "unpinned-url" "A URL names something that changes in time, such as `latest`."
    MISSING_CHECKSUM Warning "missing-checksum" "Something is downloaded without a checksum."
    NOT_REPEATABLE Warning "not-repeatable" "A step needs a person, so the build cannot be repeated from its manifest alone."
    UNUSED_FILE Warning "unused-file" "A file is declared, and nothing uses it."
    DEPRECATED_FIELD Warning "deprecated-field" "A field is read and has no effect any more."
    INEFFECTIVE_FIELD Warning "ineffective-field" "A field has no effect where it stands."
    USER_DATA_IGNORED Warning "user-data-ignored" "User data is such that cloud-init ignores it."
    LINE_ENDS Warning "line-ends" "A script has carriage returns that its shell takes for parts of commands."
    NO_LOGIN Warning "no-login" "Nothing lets Rudder log in to the guest: SSH is likely never to answer."
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
