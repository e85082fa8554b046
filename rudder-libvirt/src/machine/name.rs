//! The names of domains.

/// The name of a machine's domain: what people see in the list of all domains. Of the VM's name what is plain, because a
/// domain's name also becomes the name of files.
pub(super) fn domain_name(lab: &str, number: usize, vm: &str) -> String {
    let plain: String =
        vm.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).take(40).collect();
    match plain == vm {
        true => format!("rudder.{lab}.{plain}"),
        // The number, because two such names may leave the same.
        false => format!("rudder.{lab}.{plain}.{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_domains_are_plain_and_their_own() {
        assert_eq!(domain_name("demo-0123456789ab", 0, "web"), "rudder.demo-0123456789ab.web");
        assert_eq!(domain_name("demo-0123456789ab", 1, "w e,\"b/"), "rudder.demo-0123456789ab.web.1");
        assert_eq!(domain_name("demo-0123456789ab", 2, "ä"), "rudder.demo-0123456789ab..2");
    }
}
