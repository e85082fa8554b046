//! The names of domains.

/// Returns the name of a machine's domain, as it appears in the list of all domains. Contains only plain characters of
/// the VM's name, because libvirt also uses a domain's name in file names.
pub(super) fn domain_name(lab: &str, number: usize, vm: &str) -> String {
    let plain: String =
        vm.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).take(40).collect();
    match plain == vm {
        true => format!("rudder.{lab}.{plain}"),
        // With the number, because two such names may be reduced to the same text.
        false => format!("rudder.{lab}.{plain}.{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_domains_are_plain_and_unique() {
        assert_eq!(domain_name("demo-0123456789ab", 0, "web"), "rudder.demo-0123456789ab.web");
        assert_eq!(domain_name("demo-0123456789ab", 1, "w e,\"b/"), "rudder.demo-0123456789ab.web.1");
        assert_eq!(domain_name("demo-0123456789ab", 2, "ä"), "rudder.demo-0123456789ab..2");
    }
}
