//! The stream subresources of a `VirtualMachineInstance` (KubeVirt API reference, `subresources.kubevirt.io/v1`).

/// A stream subresource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subresource {
    /// The first serial port.
    Console,
    /// The display, which speaks RFB. A connection evicts an earlier one, so that one that broke without KubeVirt's notice does
    /// not lock the display.
    Vnc,
    /// A TCP port of the guest.
    PortForward(u16),
}

impl Subresource {
    /// Returns the path of the subresource of an instance.
    pub(crate) fn path(self, namespace: &str, instance: &str) -> String {
        let base = format!(
            "/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/virtualmachineinstances/{instance}"
        );
        match self {
            Self::Console => format!("{base}/console"),
            Self::Vnc => format!("{base}/vnc"),
            Self::PortForward(port) => format!("{base}/portforward/{port}"),
        }
    }

    /// Returns what a connection is for, for error messages that begin with "cannot".
    pub(crate) fn purpose(self) -> &'static str {
        match self {
            Self::Console => "connect to the serial console",
            Self::Vnc => "connect to the display",
            Self::PortForward(_) => "connect to a port of the guest",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_the_subresource() {
        let base = "/apis/subresources.kubevirt.io/v1/namespaces/lab/virtualmachineinstances/web";
        let cases = [
            (Subresource::Console, "/console"),
            (Subresource::Vnc, "/vnc"),
            (Subresource::PortForward(22), "/portforward/22"),
        ];
        for (subresource, end) in cases {
            assert_eq!(subresource.path("lab", "web"), format!("{base}{end}"));
        }
    }
}
