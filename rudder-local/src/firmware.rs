//! The choice of a machine's UEFI firmware: QEMU's firmware descriptors are read and selected according to their specification
//! ([docs/interop/firmware.json]). Firmware is only found through descriptors; no paths are built in.
//!
//! [docs/interop/firmware.json]: https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/firmware.json

use rudder_core::{Error, ErrorKind, Result, digest::Digest};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

/// How to install what is missing, on Debian and its derivatives.
pub const INSTALL: &str = "apt-get install --no-install-recommends ovmf";

/// The architecture of machines, as named in descriptors.
const ARCHITECTURE: &str = "x86_64";

/// UEFI firmware for a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uefi {
    /// The firmware executable.
    pub code: Image,
    /// The template that the variables of a new machine are copied from.
    pub template: Image,
    /// Whether it protects its variables from the guest's kernel with system management mode.
    pub smm: bool,
}

impl Uefi {
    /// Returns the version for the provenance: the name and digest of its file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn version(&self) -> Result<String> {
        let path = &self.code.path;
        let bytes = fs::read(path)
            .map_err(|error| Error::io(format_args!("read the firmware {}", path.display()), error))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(format!("{name} sha256:{}", Digest::of(&bytes)))
    }
}

/// A flash image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Image {
    /// Path of the file.
    #[serde(rename = "filename")]
    pub path: PathBuf,
    /// Its format, in QEMU's naming.
    pub format: String,
}

/// Requirements for a firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirements<'a> {
    /// The full name of the machine type, such as `pc-q35-7.2`.
    pub machine: &'a str,
    /// Whether it enforces Secure Boot, with enrolled keys.
    pub secure: bool,
    /// Format and size of existing variables, which it must be able to use.
    pub variables: Option<(&'a str, u64)>,
}

/// The fields of a descriptor that are used here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    interface_types: Vec<String>,
    mapping: Mapping,
    targets: Vec<Target>,
    #[serde(default)]
    features: Vec<String>,
}

/// How a firmware is mapped into the machine.
#[derive(Debug, Deserialize)]
#[serde(tag = "device", rename_all = "kebab-case")]
enum Mapping {
    Flash {
        /// The default is `split`: an executable that all machines share, and variables for each machine.
        #[serde(default)]
        mode: Option<String>,
        executable: Image,
        #[serde(rename = "nvram-template")]
        nvram_template: Option<Image>,
    },
    /// Without variables, or with variables of another kind.
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Target {
    architecture: String,
    machines: Vec<String>,
}

impl Descriptor {
    fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|one| one == feature)
    }

    fn is_for(&self, machine: &str) -> bool {
        self.interface_types.iter().any(|one| one == "uefi")
            && self.targets.iter().any(|target| {
                target.architecture == ARCHITECTURE
                    && target.machines.iter().any(|pattern| matches(pattern.as_bytes(), machine.as_bytes()))
            })
    }

    fn images(&self) -> Option<(&Image, &Image)> {
        match &self.mapping {
            Mapping::Flash { mode, executable, nvram_template: Some(template) }
                if mode.as_deref().is_none_or(|mode| mode == "split") =>
            {
                Some((executable, template))
            }
            _ => None,
        }
    }
}

/// The installed firmware, in order of preference.
#[derive(Debug, Default)]
pub struct Catalog {
    directories: Vec<PathBuf>,
    descriptors: Vec<(PathBuf, Descriptor)>,
    /// Descriptors that could not be read, and why.
    unreadable: Vec<String>,
}

impl Catalog {
    /// Reads the descriptors in these directories, the most specific of which comes first. A file hides files of the same name in
    /// later directories, and an empty file serves only that purpose. All descriptors are ordered by name.
    pub fn read(directories: Vec<PathBuf>) -> Self {
        let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
        for directory in &directories {
            // Most hosts lack some of them.
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|extension| extension == "json") {
                    files.entry(entry.file_name()).or_insert(path);
                }
            }
        }
        let mut catalog = Self { directories, ..Self::default() };
        for path in files.into_values() {
            let read = fs::read(&path).map_err(|error| error.to_string()).and_then(|text| {
                if text.is_empty() {
                    return Ok(None);
                }
                serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string())
            });
            match read {
                Ok(Some(descriptor)) => catalog.descriptors.push((path, descriptor)),
                Ok(None) => {}
                Err(error) => catalog.unreadable.push(format!("{}: {error}", path.display())),
            }
        }
        catalog
    }

    /// Returns the firmware for a machine: the first that meets the requirements.
    ///
    /// # Errors
    /// `HostMissing`, with the package to install.
    pub fn choose(&self, requirements: Requirements<'_>) -> Result<Uefi> {
        let mut reasons = self.unreadable.clone();
        let mut evaluate = |path: &Path, descriptor: &Descriptor| {
            if !descriptor.is_for(requirements.machine) {
                return None;
            }
            let (code, template) = descriptor.images()?;
            if requirements.secure {
                // Without SMM the guest's kernel could change the keys; without keys nothing is enforced.
                let all = ["secure-boot", "enrolled-keys", "requires-smm"];
                all.iter().all(|feature| descriptor.has(feature)).then_some(())?;
            } else if descriptor.has("enrolled-keys") {
                // It would enforce Secure Boot, which was not requested.
                return None;
            }
            match usable(code, template, requirements.variables) {
                Ok(()) => Some(Uefi {
                    code: code.clone(),
                    template: template.clone(),
                    smm: descriptor.has("requires-smm"),
                }),
                Err(reason) => {
                    reasons.push(format!("{}: {reason}", path.display()));
                    None
                }
            }
        };
        let mut found = None;
        for (path, descriptor) in &self.descriptors {
            let Some(uefi) = evaluate(path, descriptor) else { continue };
            // System management mode costs time, and protects nothing if there are no keys.
            if requirements.secure || !uefi.smm {
                return Ok(uefi);
            }
            found.get_or_insert(uefi);
        }
        found.ok_or_else(|| self.missing(requirements, &reasons))
    }

    fn missing(&self, requirements: Requirements<'_>, reasons: &[String]) -> Error {
        let what = if requirements.secure {
            "UEFI firmware that enforces Secure Boot with enrolled keys"
        } else {
            "UEFI firmware"
        };
        let directories: Vec<String> =
            self.directories.iter().map(|directory| directory.display().to_string()).collect();
        let mut message = format!(
            "expected {what} for {} among the firmware descriptors of QEMU ({}), but found none",
            requirements.machine,
            directories.join(", ")
        );
        for reason in reasons {
            message.push_str("; ");
            message.push_str(reason);
        }
        let help = if requirements.variables.is_some() {
            "install the firmware that the module was built with, or build the module again".to_owned()
        } else {
            format!("install it: {INSTALL}")
        };
        Error::new(ErrorKind::HostMissing, message).with_help(help)
    }
}

/// Checks that the files of a descriptor can be used; the error says why not.
fn usable(code: &Image, template: &Image, variables: Option<(&str, u64)>) -> Result<(), String> {
    let size = |image: &Image| {
        let meta = fs::metadata(&image.path);
        meta.map(|meta| meta.len()).map_err(|error| format!("{}: {error}", image.path.display()))
    };
    size(code)?;
    let capacity = size(template)?;
    let Some((format, size)) = variables else { return Ok(()) };
    if template.format != format {
        return Err(format!(
            "its variables are in the format {}, but the existing ones are in the format {format}",
            template.format
        ));
    }
    // For other formats, the file size differs from that of the flash memory.
    if format == "raw" && capacity != size {
        return Err(format!("it has {capacity} bytes for variables, but the existing ones take {size}"));
    }
    Ok(())
}

/// Returns the directories of descriptors, the most specific first: the user's, the administrator's, the distribution's, and
/// that of a QEMU installed elsewhere.
pub fn directories(qemu: &Path) -> Vec<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
    let mut bases: Vec<PathBuf> = user.into_iter().collect();
    bases.extend([PathBuf::from("/etc"), PathBuf::from("/usr/share")]);
    let own = fs::canonicalize(qemu).ok();
    if let Some(prefix) = own.as_deref().and_then(Path::parent).and_then(Path::parent) {
        let base = prefix.join("share");
        if !bases.contains(&base) {
            bases.push(base);
        }
    }
    bases.into_iter().map(|base| base.join("qemu/firmware")).collect()
}

/// Returns whether a name matches a pattern in which `*` is any text and `?` any byte.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => {
            matches(rest, name) || name.split_first().is_some_and(|(_, name)| matches(pattern, name))
        }
        (Some((one, pattern)), Some((byte, name))) if *one == b'?' || one == byte => matches(pattern, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
