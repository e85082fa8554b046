//! The labels that Rudder writes into the metadata of its domains and networks. Objects without a label are never
//! touched.

use crate::xml::{Element, Xml, elements};
use rudder_core::{backend::LabId, digest::Digest};
use rudder_local::store::Store;

/// The namespace of the labels (Domain XML format, "metadata": each application has its own).
pub(crate) const NAMESPACE: &str = "https://rudder-vm.github.io/libvirt/1";

/// What a libvirt object belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Label {
    /// A lab, whether or not its owner still lives.
    Lab {
        /// The store that contains the lab.
        store: StoreLabel,
        lab: LabId,
        /// The name of the machine; empty for a network.
        vm: String,
        /// The id of the process that created the object. Informative only: the lab's lock shows whether the owner
        /// lives.
        owner: u32,
    },
    /// A published module.
    Module { store: StoreLabel, name: String, digest: Digest, vm: String },
}

/// A store, as labels identify it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreLabel {
    /// The path of its directory.
    pub(crate) path: String,
    /// The [mark](Store::mark) that identifies the store; empty in labels of earlier versions.
    pub(crate) mark: String,
}

/// The store of a backend, which recognises the labels of that backend.
#[derive(Debug, Clone)]
pub(crate) struct Owner(Store);

impl Owner {
    pub(crate) fn new(store: &Store) -> Self {
        Self(store.clone())
    }

    fn path(&self) -> String {
        self.0.root().to_string_lossy().into_owned()
    }

    /// Returns the identity of the store in the labels of labs: their processes belong to this very directory.
    pub(crate) fn of_labs(&self) -> StoreLabel {
        StoreLabel { path: self.path(), mark: self.0.mark() }
    }

    /// Returns the identity of the store in the labels of modules, which outlive a reboot of the host.
    pub(crate) fn of_modules(&self) -> StoreLabel {
        StoreLabel { path: self.path(), mark: self.0.name().to_owned() }
    }

    /// Returns whether a label belongs to this store: the path alone is not enough, since another container may have a
    /// different store at the same path.
    pub(crate) fn owns(&self, label: &Label) -> bool {
        let store = label.store();
        store.path == self.path() && (store.mark.is_empty() || self.0.recognises(&store.mark))
    }

    /// Returns whether a label belongs to this lab of this store.
    pub(crate) fn owns_lab(&self, label: &Label, id: &LabId) -> bool {
        matches!(label, Label::Lab { lab, .. } if lab == id) && self.owns(label)
    }
}

impl Label {
    /// Writes the label as the only child of `metadata`.
    pub(crate) fn write(&self, xml: &mut Xml) {
        let namespace = ("xmlns:rudder", NAMESPACE);
        xml.element("metadata", &[], |xml| match self {
            Self::Lab { store, lab, vm, owner } => xml.empty(
                "rudder:lab",
                &[
                    namespace,
                    ("id", lab.as_str()),
                    ("vm", vm),
                    ("store", &store.path),
                    ("mark", &store.mark),
                    ("owner", &owner.to_string()),
                ],
            ),
            Self::Module { store, name, digest, vm } => xml.empty(
                "rudder:module",
                &[
                    namespace,
                    ("name", name),
                    ("digest", &digest.to_string()),
                    ("vm", vm),
                    ("store", &store.path),
                    ("mark", &store.mark),
                ],
            ),
        });
    }

    /// Reads a label from an element of our namespace, as libvirt returns it.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let elements = elements(text);
        Self::of(elements.iter().find(|element| matches!(element.name.as_str(), "lab" | "module"))?)
    }

    /// Finds a label in the XML of a network: before 9.7, libvirt cannot return the metadata of a network separately.
    pub(crate) fn of_network(text: &str) -> Option<Self> {
        let elements = elements(text);
        let of_lab = |element: &&Element| element.is(&["network", "metadata", "lab"]);
        // Prefixes are not kept when names are read, so check that `rudder` is bound to our namespace.
        let ours = |element: &&Element| element.attribute("rudder") == Some(NAMESPACE);
        Self::of(elements.iter().filter(of_lab).find(ours)?)
    }

    fn of(element: &Element) -> Option<Self> {
        let attribute = |name| element.attribute(name).map(str::to_owned);
        let store = StoreLabel { path: attribute("store")?, mark: attribute("mark").unwrap_or_default() };
        let vm = attribute("vm")?;
        Some(match element.name.as_str() {
            "lab" => Self::Lab {
                store,
                vm,
                lab: LabId::parse(element.attribute("id")?).ok()?,
                owner: element.attribute("owner")?.parse().ok()?,
            },
            _ => Self::Module {
                store,
                vm,
                name: attribute("name")?,
                digest: element.attribute("digest")?.parse().ok()?,
            },
        })
    }

    /// Returns the store that the label belongs to.
    fn store(&self) -> &StoreLabel {
        match self {
            Self::Lab { store, .. } | Self::Module { store, .. } => store,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_label_is_read_back_as_it_was_written() {
        let store = StoreLabel { path: "/a \"b\" & <c>".to_owned(), mark: "1/2/3".to_owned() };
        let lab = Label::Lab {
            store: store.clone(),
            lab: LabId::parse("web-0123456789ab").unwrap(),
            vm: "ü 'x'".to_owned(),
            owner: 17,
        };
        let module =
            Label::Module { store, name: "web".to_owned(), digest: Digest::of(b"x"), vm: "web".to_owned() };
        for label in [lab, module] {
            let mut xml = Xml::new();
            label.write(&mut xml);
            assert_eq!(Label::read(&xml.finish()), Some(label));
        }
    }

    #[test]
    fn an_incomplete_label_is_ignored() {
        assert_eq!(Label::read("<other/>"), None);
        assert_eq!(Label::read("<lab store='/x' vm='a' id='../x' owner='1'/>"), None);
        assert_eq!(Label::read(""), None);
    }

    fn lab_of(store: StoreLabel) -> Label {
        Label::Lab { store, lab: LabId::parse("web-0123456789ab").unwrap(), vm: String::new(), owner: 1 }
    }

    #[test]
    fn a_label_belongs_to_one_store_and_to_no_other_at_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let open = || Owner::new(&Store::open(&path).unwrap());
        let original = open();
        let (lab, name) = (original.of_labs(), original.of_modules());
        let module =
            Label::Module { store: name, name: "web".into(), digest: Digest::of(b"x"), vm: "a".into() };
        let earlier = lab_of(StoreLabel { mark: String::new(), ..lab.clone() });
        let lab = lab_of(lab);
        assert!(open().owns(&lab) && open().owns(&module) && open().owns(&earlier));

        // A copy of the store at its path: labs belong to the original, and the domains of modules name files at this
        // path.
        let elsewhere = dir.path().join("elsewhere");
        std::fs::rename(&path, &elsewhere).unwrap();
        let copied = std::process::Command::new("cp").arg("-a").args([&elsewhere, &path]).status().unwrap();
        assert!(copied.success());
        assert!(!open().owns(&lab) && open().owns(&module));
        assert!(!Owner::new(&Store::open(&elsewhere).unwrap()).owns(&module));

        // A different store at the same path.
        std::fs::remove_dir_all(&path).unwrap();
        assert!(!open().owns(&lab) && !open().owns(&module));
    }
}
