//! What the host provides: programs, their versions, the features of QEMU (as reported by QEMU), and the accelerator.

use crate::{
    accelerator::{self, Accelerator, Chosen, KvmSupport},
    firmware::{self, Catalog, Requirements, Uefi},
    helper::HelperProgram,
    pci_layout::Chipset,
    process::{Invocation, Lifetime, find},
};
use rudder_core::{
    Error, ErrorKind, Result,
    backend::{HostFinding, HostReport},
    capability::Capability,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// How to install what is missing, on Debian and its derivatives.
const INSTALL: &str = "apt-get install --no-install-recommends qemu-system-x86 qemu-utils";
/// The same for machines with a TPM.
const INSTALL_TPM: &str = "apt-get install --no-install-recommends swtpm swtpm-tools";

/// The programs to use; those not set are searched for in `PATH`.
#[derive(Debug, Clone, Default)]
pub struct Programs {
    /// `qemu-system-x86_64`.
    pub qemu: Option<PathBuf>,
    /// `qemu-img`, of the same version.
    pub qemu_img: Option<PathBuf>,
    /// `setpriv` of util-linux, which lets processes end with their owner.
    pub setpriv: Option<PathBuf>,
    /// `swtpm`, for machines with a TPM.
    pub swtpm: Option<PathBuf>,
    /// The directories of firmware descriptors; `None` for QEMU's.
    pub firmware: Option<Vec<PathBuf>>,
    /// The program that runs the network of a kept lab; `None` to find one when a lab is kept.
    pub helper: Option<HelperProgram>,
}

impl Programs {
    /// Makes the paths independent of later changes of the working directory. A name without a directory is left as it is.
    #[must_use]
    pub fn rooted(mut self) -> Self {
        let Self { qemu, qemu_img, setpriv, swtpm, firmware, helper } = &mut self;
        let helper = helper.as_mut().map(|helper| &mut helper.path);
        let given = [qemu, qemu_img, setpriv, swtpm].into_iter().flatten().chain(helper);
        for path in given.filter(|path| path.components().count() > 1).chain(firmware.iter_mut().flatten()) {
            if let Ok(rooted) = std::path::absolute(&*path) {
                *path = rooted;
            }
        }
        self
    }

    fn catalog(&self, qemu: &Path) -> Catalog {
        Catalog::read(self.firmware.clone().unwrap_or_else(|| firmware::directories(qemu)))
    }
}

/// A host on which machines can run.
#[derive(Debug)]
pub struct Host {
    pub(crate) qemu: PathBuf,
    pub(crate) qemu_img: PathBuf,
    pub(crate) qemu_nbd: PathBuf,
    pub(crate) setpriv: Option<PathBuf>,
    /// The swtpm to use, if it was set.
    pub swtpm: Option<PathBuf>,
    pub(crate) accelerator: Chosen,
    /// A notice about the accelerator for the user.
    pub notice: Option<String>,
    versions: BTreeMap<String, String>,
    devices: BTreeSet<String>,
    machines: BTreeMap<String, String>,
    firmware: Catalog,
    pub(crate) helper: Option<HelperProgram>,
}

impl Host {
    /// Checks everything that a machine needs.
    ///
    /// # Errors
    /// `HostMissing`, with how to fix it.
    pub async fn examine(programs: &Programs, requested: Accelerator) -> Result<Self> {
        let qemu = require(programs.qemu.as_deref(), "qemu-system-x86_64")?;
        let qemu_img = require(programs.qemu_img.as_deref(), "qemu-img")?;
        let qemu_nbd = require_nbd(&qemu_img)?;
        let setpriv = find(programs.setpriv.as_deref(), "setpriv");
        let lifetime = Lifetime::WithOwner(setpriv.clone());
        let (features, img_version) =
            tokio::try_join!(query_qemu(&qemu, lifetime.clone()), program_version(&qemu_img, lifetime))?;
        let (accelerator, notice) = accelerator::decide(requested, KvmSupport::detect(features.kvm))?;
        let versions = BTreeMap::from([
            ("qemu".to_owned(), features.version),
            ("qemu-img".to_owned(), img_version),
            ("accelerator".to_owned(), accelerator.to_string()),
        ]);
        Ok(Self {
            firmware: programs.catalog(&qemu),
            qemu,
            qemu_img,
            qemu_nbd,
            setpriv,
            swtpm: programs.swtpm.clone(),
            helper: programs.helper.clone(),
            accelerator,
            notice,
            versions,
            devices: features.devices,
            machines: features.machines,
        })
    }

    /// Checks that this host can provide these capabilities.
    ///
    /// # Errors
    /// `HostMissing`, with the package to install.
    pub fn require(&self, needs: &BTreeSet<Capability>) -> Result<()> {
        let has = |need| needs.contains(&need);
        if has(Capability::Uefi) {
            self.uefi(Chipset::Q35, false, None)?;
        }
        if has(Capability::SecureBoot) {
            self.uefi(Chipset::Q35, true, None)?;
        }
        if has(Capability::Tpm) {
            self.tpm()?;
            self.require_device("tpm-crb")?;
        }
        Ok(())
    }

    /// Returns the firmware of a machine, which enforces Secure Boot or not, and can use variables of this format and size.
    ///
    /// # Errors
    /// `HostMissing`, with the package to install.
    pub fn uefi(&self, chipset: Chipset, secure: bool, variables: Option<(&str, u64)>) -> Result<Uefi> {
        let alias = chipset.machine();
        let machine = self.machines.get(alias).map_or(alias, String::as_str);
        self.firmware.choose(Requirements { machine, secure, variables })
    }

    /// Returns the accelerator that machines run on.
    #[must_use]
    pub fn accelerator(&self) -> Chosen {
        self.accelerator
    }

    /// Returns the versions for the provenance.
    #[must_use]
    pub fn versions(&self) -> &BTreeMap<String, String> {
        &self.versions
    }

    /// Checks that this QEMU has a device.
    ///
    /// # Errors
    /// `HostMissing`.
    pub fn require_device(&self, device: &str) -> Result<()> {
        if self.devices.contains(device) {
            return Ok(());
        }
        let version = self.versions.get("qemu").map_or("", String::as_str);
        Err(Error::new(
            ErrorKind::HostMissing,
            format!("expected the device {device} in QEMU {version}, but found none"),
        )
        .with_help(format!("install a complete QEMU: {INSTALL}")))
    }

    /// Returns the programs that a TPM needs.
    ///
    /// # Errors
    /// `HostMissing`, with the packages to install.
    pub fn tpm(&self) -> Result<TpmPrograms> {
        TpmPrograms::find(self.swtpm.as_deref())
    }

    /// Returns the lifetime of a process that ends with its owner.
    #[must_use]
    pub fn with_owner(&self) -> Lifetime {
        Lifetime::WithOwner(self.setpriv.clone())
    }

    /// Returns the version of a program according to its option `--version`.
    ///
    /// # Errors
    /// `HostMissing` when it cannot be run.
    pub async fn program_version(&self, program: &Path) -> Result<String> {
        program_version(program, self.with_owner()).await
    }

    /// Returns the path of the emulator.
    #[must_use]
    pub fn qemu(&self) -> &Path {
        &self.qemu
    }

    /// Returns whether this QEMU has a device.
    #[must_use]
    pub fn has_device(&self, device: &str) -> bool {
        self.devices.contains(device)
    }
}

/// The programs that a TPM needs.
#[derive(Debug)]
pub struct TpmPrograms {
    /// The TPM itself.
    pub swtpm: PathBuf,
    /// The program that creates a new one.
    pub setup: PathBuf,
}

impl TpmPrograms {
    /// Finds the programs.
    ///
    /// # Errors
    /// `HostMissing`, with the packages to install.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        let missing = |name: &str, location: &str| {
            Error::new(
                ErrorKind::HostMissing,
                format!("expected the program {name} {location}, but found none"),
            )
            .with_help(format!("install it: {INSTALL_TPM}; or write `tpm: false`"))
        };
        let location = given.map_or_else(|| "in PATH".to_owned(), |path| format!("at {}", path.display()));
        let swtpm = find(given, "swtpm").ok_or_else(|| missing("swtpm", &location))?;
        // Beside swtpm, in case it is not in PATH.
        let beside = swtpm.parent().map(|directory| directory.join("swtpm_setup"));
        let setup = find(beside.as_deref(), "swtpm_setup").or_else(|| find(None, "swtpm_setup"));
        let setup = setup.ok_or_else(|| missing("swtpm_setup", "in PATH"))?;
        Ok(Self { swtpm, setup })
    }
}

fn require(given: Option<&Path>, name: &str) -> Result<PathBuf> {
    find(given, name).ok_or_else(|| {
        let location = given.map_or_else(|| "in PATH".to_owned(), |path| format!("at {}", path.display()));
        Error::new(ErrorKind::HostMissing, format!("expected the program {name} {location}, but found none"))
            .with_help(format!("install it: {INSTALL}"))
    })
}

/// Returns the qemu-nbd that came with a qemu-img: the one beside it, else the first in `PATH`.
fn require_nbd(qemu_img: &Path) -> Result<PathBuf> {
    match find(Some(&qemu_img.with_file_name("qemu-nbd")), "qemu-nbd") {
        Some(beside) => Ok(beside),
        None => require(None, "qemu-nbd"),
    }
}

#[derive(Debug)]
struct QemuFeatures {
    version: String,
    kvm: bool,
    devices: BTreeSet<String>,
    /// Full names of machine types by their short names: `q35` is `pc-q35-7.2`.
    machines: BTreeMap<String, String>,
}

/// Asks QEMU for its version and features (QEMU QMP Reference Manual), on a machine without any devices.
async fn query_qemu(qemu: &Path, lifetime: Lifetime) -> Result<QemuFeatures> {
    let commands = [
        json!({"execute": "qmp_capabilities"}),
        json!({"execute": "query-version", "id": "version"}),
        json!({"execute": "query-kvm", "id": "kvm"}),
        json!({"execute": "qom-list-types", "id": "devices", "arguments": {"implements": "device", "abstract": false}}),
        json!({"execute": "query-machines", "id": "machines"}),
        json!({"execute": "quit"}),
    ];
    let input: String = commands.iter().map(|command| format!("{command}\n")).collect();
    let finished = Invocation::new(qemu, lifetime)
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
            "-qmp",
            "stdio",
        ])
        .run(Some(input.as_bytes()))
        .await?;
    parse_features(&finished.stdout).ok_or_else(|| {
        Error::new(
            ErrorKind::HostMissing,
            format!(
                "expected {} to answer over QMP, but it {}",
                qemu.display(),
                crate::process::describe(finished.status)
            ),
        )
        .with_source(finished.failure("query the version of QEMU"))
        .with_help(format!("install a complete QEMU: {INSTALL}"))
    })
}

fn parse_features(output: &[u8]) -> Option<QemuFeatures> {
    let (mut version, mut kvm) = (None, false);
    let (mut devices, mut machines) = (BTreeSet::new(), BTreeMap::new());
    for line in output.split(|byte| *byte == b'\n') {
        let Ok(answer) = serde_json::from_slice::<Value>(line) else { continue };
        let value = &answer["return"];
        match answer["id"].as_str() {
            Some("version") => {
                let number = |part| value["qemu"][part].as_u64();
                version = Some(format!("{}.{}.{}", number("major")?, number("minor")?, number("micro")?));
            }
            Some("kvm") => kvm = value["present"].as_bool()?,
            Some("devices") => {
                let names = value.as_array()?.iter().filter_map(|one| one["name"].as_str());
                devices.extend(names.map(str::to_owned));
            }
            Some("machines") => {
                let text = |one: &Value, key| one[key].as_str().map(str::to_owned);
                let named = value.as_array()?.iter();
                machines.extend(named.filter_map(|one| Some((text(one, "alias")?, text(one, "name")?))));
            }
            _ => {}
        }
    }
    Some(QemuFeatures { version: version?, kvm, devices, machines })
}

/// Returns the version in `NAME version 7.2.22 (…)`.
async fn program_version(program: &Path, lifetime: Lifetime) -> Result<String> {
    let finished = Invocation::new(program, lifetime).args(["--version"]).run(None).await?;
    let finished = finished.success("query its version")?;
    Ok(parse_version(&String::from_utf8_lossy(&finished.stdout)))
}

fn parse_version(text: &str) -> String {
    let mut fields = text.split_whitespace().skip_while(|word| *word != "version").skip(1);
    fields.next().unwrap_or("unknown").trim_end_matches(',').to_owned()
}

/// Reports what the host has, what is missing, and how to fix it. `store` is the directory that contains the labs.
pub async fn diagnose(programs: &Programs, requested: Accelerator, store: &Path) -> HostReport {
    let mut report = HostReport::default();
    let setpriv = find(programs.setpriv.as_deref(), "setpriv");
    let lifetime = Lifetime::WithOwner(setpriv.clone());

    let qemu = async {
        let path = require(programs.qemu.as_deref(), "qemu-system-x86_64")?;
        query_qemu(&path, lifetime.clone()).await
    }
    .await;
    let img = async {
        let path = require(programs.qemu_img.as_deref(), "qemu-img")?;
        program_version(&path, lifetime.clone()).await
    }
    .await;
    report.findings.push(finding(
        "qemu-system-x86_64",
        true,
        qemu.as_ref().map(|features| features.version.clone()),
    ));
    report.findings.push(finding("qemu-img", true, img.as_ref().map(Clone::clone)));
    let nbd = require(programs.qemu_img.as_deref(), "qemu-img").and_then(|path| require_nbd(&path));
    report.findings.push(finding("qemu-nbd", true, nbd.as_ref().map(|path| path.display().to_string())));

    if let Ok(features) = &qemu {
        let decided = accelerator::decide(requested, KvmSupport::detect(features.kvm));
        let detail = decided.as_ref().map(|(chosen, notice)| match notice {
            Some(notice) => format!("{chosen}: {notice}"),
            None => chosen.to_string(),
        });
        report.findings.push(finding("accelerator", true, detail));
    }
    let setpriv = match &setpriv {
        Some(path) => HostFinding::present("setpriv", path.display().to_string()),
        None => {
            let detail = "without it, the machines of a killed builder run until the next build removes them";
            HostFinding::missing("setpriv", detail).help("apt-get install util-linux".to_owned())
        }
    };
    report.findings.push(setpriv.optional());
    if let Ok(features) = &qemu {
        report.findings.extend(optional(programs, features));
    }
    report.findings.push(free_space(store));
    report
}

/// Returns the findings about what only some manifests need.
fn optional(programs: &Programs, features: &QemuFeatures) -> Vec<HostFinding> {
    let Some(qemu) = find(programs.qemu.as_deref(), "qemu-system-x86_64") else { return Vec::new() };
    let catalog = programs.catalog(&qemu);
    let alias = Chipset::Q35.machine();
    let machine = features.machines.get(alias).map_or(alias, String::as_str);
    let firmware = |secure| {
        let uefi = catalog.choose(Requirements { machine, secure, variables: None });
        uefi.map(|uefi| uefi.code.path.display().to_string())
    };
    let tpm = TpmPrograms::find(programs.swtpm.as_deref()).map(|tpm| tpm.swtpm.display().to_string());
    [("UEFI", firmware(false)), ("Secure Boot", firmware(true)), ("TPM", tpm)]
        .map(|(what, found)| finding(what, false, found.as_ref().map(Clone::clone)))
        .into()
}

fn finding(what: &str, required: bool, outcome: Result<String, &Error>) -> HostFinding {
    let finding = match outcome {
        Ok(detail) => HostFinding::present(what, detail),
        Err(error) => HostFinding::missing(what, error.to_string()).help(error.help().map(str::to_owned)),
    };
    if required { finding } else { finding.optional() }
}

/// Number of free bytes below which even a small build is likely to fail.
const MIN_FREE_SPACE: u64 = 2 << 30;

fn free_space(store: &Path) -> HostFinding {
    // If the store does not exist yet, its nearest existing parent counts.
    let existing = store.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(existing).map(|stat| stat.f_bavail * stat.f_frsize);
    let detail = match &free {
        Ok(free) => format!("{} MiB free at {}", free >> 20, existing.display()),
        Err(error) => format!("unknown at {}: {error}", existing.display()),
    };
    let finding = match free {
        Ok(MIN_FREE_SPACE..) => HostFinding::present("free disk space", detail),
        _ => HostFinding::missing("free disk space", detail)
            .help("free some space there, or use a store on a larger disk".to_owned()),
    };
    finding.optional()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn relative_paths_of_programs_become_absolute() {
        let programs = Programs {
            qemu: Some("bin/qemu".into()),
            qemu_img: Some("qemu-img".into()),
            swtpm: Some("./swtpm".into()),
            firmware: Some(vec!["firmware".into()]),
            ..Programs::default()
        };
        let (here, programs) = (std::env::current_dir().unwrap(), programs.rooted());
        assert_eq!(programs.qemu, Some(here.join("bin/qemu")));
        assert_eq!(programs.qemu_img.as_deref(), Some(Path::new("qemu-img")), "it is found through PATH");
        assert_eq!(programs.swtpm, Some(here.join("swtpm")));
        assert_eq!(programs.firmware, Some(vec![here.join("firmware")]));
    }

    #[test]
    fn qmp_responses_are_parsed_among_events() {
        let features = parse_features(
            b"{\"QMP\": {}}\n{\"return\": {}}\n\
              {\"return\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"x\"}, \"id\": \"version\"}\n\
              {\"event\": \"SHUTDOWN\"}\n{\"id\": \"kvm\", \"return\": {\"enabled\": false, \"present\": true}}\n\
              {\"id\": \"devices\", \"return\": [{\"name\": \"e1000\", \"parent\": \"pci-device\"}]}\n\
              {\"id\": \"machines\", \"return\": [{\"name\": \"pc-q35-10.0\", \"alias\": \"q35\"}, {\"name\": \"none\"}]}\n",
        )
        .unwrap();
        assert_eq!((features.version.as_str(), features.kvm), ("10.0.2", true));
        assert!(features.devices.contains("e1000"));
        assert_eq!(features.machines, BTreeMap::from([("q35".to_owned(), "pc-q35-10.0".to_owned())]));
        assert!(parse_features(b"Segmentation fault\n").is_none());
        assert_eq!(parse_version("TPM emulator version 0.7.1, Copyright (c)"), "0.7.1");
        assert_eq!(parse_version("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"), "7.2.22");
    }

    #[tokio::test]
    async fn a_missing_qemu_is_reported_with_the_install_command() {
        let programs = Programs { qemu: Some("/nonexistent/qemu".into()), ..Programs::default() };
        let error = Host::examine(&programs, Accelerator::Auto).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostMissing);
        assert_eq!(
            error.report(),
            "expected the program qemu-system-x86_64 at /nonexistent/qemu, but found none\n  help: install it: apt-get \
             install --no-install-recommends qemu-system-x86 qemu-utils"
        );
        let report = diagnose(&programs, Accelerator::Auto, Path::new("/")).await;
        assert!(!report.is_ready());
    }
}
