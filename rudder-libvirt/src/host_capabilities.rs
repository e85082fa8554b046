//! The capabilities of this libvirt: its emulator, machine type, CPU modes and virtualisation, as its domain
//! capabilities report them.

use crate::{
    connection::{Connection, Failure},
    network,
    xml::{Element, elements},
};
use rudder_core::{Error, ErrorKind, Result};
use rudder_local::{
    accelerator::{Accelerator, Chosen},
    host::{Host, Programs},
};
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

/// The architecture of the machines.
const ARCH: &str = "x86_64";
/// The requested machine type: the same as with the QEMU backend, so that a module runs on both.
const MACHINE: &str = "pc";

/// The properties of domains on this host.
#[derive(Debug)]
pub(crate) struct HostCapabilities {
    pub(crate) emulator: String,
    /// The type of domains: `kvm` or `qemu`.
    pub(crate) kind: &'static str,
    /// The machine type, including its version.
    pub(crate) machine: String,
    /// The CPU mode; `None` means the default of the machine type.
    pub(crate) cpu: Option<&'static str>,
    /// The QEMU that libvirt uses, and its accelerator.
    pub(crate) host: Arc<Host>,
    pub(crate) versions: BTreeMap<String, String>,
    /// Whether networks are bridges created by libvirt, which requires the system's libvirt.
    pub(crate) bridges: bool,
}

impl HostCapabilities {
    /// Queries libvirt.
    ///
    /// # Errors
    /// `HostMissing` if there is no libvirt or no QEMU, or if libvirt runs on another host: labs are in a store on this
    /// one.
    pub(crate) async fn query(
        connection: &Arc<Connection>,
        programs: &Programs,
        requested: Accelerator,
    ) -> Result<Self> {
        let (hostname, version) = connection
            .query(|connect| Ok((connect.get_hostname()?, connect.get_lib_version()?)))
            .await
            .map_err(|failure| failure.into_error(ErrorKind::HostMissing, "query the host of libvirt"))?;
        let here = rustix::system::uname();
        let here = here.nodename().to_string_lossy();
        if short(&hostname) != short(&here) {
            let message = format!("expected libvirt on this host, {here}, but found one on {hostname}");
            return Err(Error::new(ErrorKind::HostMissing, message)
                .with_context("uri", connection.uri())
                .with_help(
                    "run the build on the host of libvirt: disks are in a store on the host of the build",
                ));
        }
        let plain = capabilities(connection, "qemu").await.map_err(|failure| {
            failure.into_error(ErrorKind::HostMissing, "query the capabilities of libvirt's QEMU").with_help(
                "apt-get install --no-install-recommends libvirt-daemon-driver-qemu qemu-system-x86 qemu-utils",
            )
        })?;
        let emulator = text(&plain, &["domainCapabilities", "path"]).ok_or_else(|| {
            Error::new(
                ErrorKind::Protocol,
                "expected the path of QEMU in libvirt's capabilities, but found none",
            )
        })?;
        let programs = Programs { qemu: Some(PathBuf::from(&emulator)), ..programs.clone() };
        let host = Host::examine(&programs, requested).await?;
        let (kind, reported) = match host.accelerator() {
            Chosen::Tcg => ("qemu", plain),
            Chosen::Kvm => {
                let reported = capabilities(connection, "kvm").await.map_err(|failure| {
                    failure
                        .into_error(ErrorKind::HostMissing, "use KVM through libvirt")
                        .with_help("use the accelerator tcg")
                })?;
                ("kvm", reported)
            }
        };
        let machine =
            text(&reported, &["domainCapabilities", "machine"]).unwrap_or_else(|| MACHINE.to_owned());
        let mut versions = host.versions().clone();
        versions.insert("libvirt".to_owned(), dotted(version));
        Ok(Self {
            emulator,
            kind,
            machine,
            cpu: cpu(&reported, kind),
            host: Arc::new(host),
            versions,
            bridges: network::is_system(connection),
        })
    }
}

impl HostCapabilities {
    /// Returns the user and group that QEMU runs as under the system's libvirt: those of this process, in whose store
    /// it works. The libvirt of a user has no choice, so this is `None`.
    pub(crate) fn owner(&self) -> Option<(u32, u32)> {
        let own = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        self.bridges.then(own)
    }
}

async fn capabilities(connection: &Arc<Connection>, kind: &'static str) -> Result<Vec<Element>, Failure> {
    let query = move |connect: &virt::connect::Connect| {
        connect.get_domain_capabilities(None, Some(ARCH), Some(MACHINE), Some(kind), 0)
    };
    connection.query(query).await.map(|text| elements(&text))
}

/// Returns the best CPU mode offered: the host's CPU under KVM, otherwise everything that QEMU can emulate.
fn cpu(reported: &[Element], kind: &str) -> Option<&'static str> {
    let requested: &[&str] = if kind == "kvm" { &["host-passthrough", "host-model"] } else { &["maximum"] };
    requested.iter().copied().find(|mode| {
        reported.iter().any(|element| {
            element.is(&["domainCapabilities", "cpu", "mode"])
                && element.attribute("name") == Some(mode)
                && element.attribute("supported") == Some("yes")
        })
    })
}

fn text(reported: &[Element], path: &[&str]) -> Option<String> {
    let element = reported.iter().find(|element| element.is(path))?;
    (!element.text.is_empty()).then(|| element.text.clone())
}

fn short(hostname: &str) -> &str {
    hostname.split('.').next().unwrap_or(hostname)
}

/// Formats a version number of libvirt, which is 1000000 × major + 1000 × minor + release (virConnectGetLibVersion).
fn dotted(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORTED: &str = "<domainCapabilities><path>/usr/bin/qemu</path><machine>pc-i440fx-7.2</machine><cpu>\
        <mode name='host-passthrough' supported='no'/><mode name='maximum' supported='yes'><enum name='x'/></mode>\
        <mode name='host-model' supported='yes'/></cpu></domainCapabilities>";

    #[test]
    fn offered_features_are_used() {
        let reported = elements(REPORTED);
        assert_eq!(text(&reported, &["domainCapabilities", "path"]).as_deref(), Some("/usr/bin/qemu"));
        assert_eq!(text(&reported, &["domainCapabilities", "machine"]).as_deref(), Some("pc-i440fx-7.2"));
        assert_eq!((cpu(&reported, "qemu"), cpu(&reported, "kvm")), (Some("maximum"), Some("host-model")));
        assert_eq!(cpu(&[], "qemu"), None);
        assert_eq!((dotted(9_000_000), dotted(10_002_003)), ("9.0.0".to_owned(), "10.2.3".to_owned()));
        assert_eq!((short("web.example.org"), short("web")), ("web", "web"));
    }
}
