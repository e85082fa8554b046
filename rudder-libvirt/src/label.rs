//! Labels: what Rudder writes into the metadata of the domains and networks that it makes. What carries none is never touched.

use crate::xml::{Element, Xml, elements};
use rudder_core::{backend::LabId, digest::Digest};

/// The namespace of the labels (Domain XML format, "metadata": an application has one of its own).
pub(crate) const NAMESPACE: &str = "https://rudder-vm.github.io/libvirt/1";

/// What something of libvirt's belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Label {
    /// A lab that a living process works in, or did.
    Lab {
        /// The store that the lab is in: its directory.
        store: String,
        lab: LabId,
        /// The machine; empty for a network.
        vm: String,
        /// The number of the process that made it. For people: whether it lives is told by the lab's lock.
        owner: u32,
    },
    /// A published module.
    Module { store: String, name: String, digest: Digest, vm: String },
}

impl Label {
    /// Writes it as the only child of `metadata`.
    pub(crate) fn write(&self, xml: &mut Xml) {
        let namespace = ("xmlns:rudder", NAMESPACE);
        xml.element("metadata", &[], |xml| match self {
            Self::Lab { store, lab, vm, owner } => xml.empty(
                "rudder:lab",
                &[
                    namespace,
                    ("id", lab.as_str()),
                    ("vm", vm),
                    ("store", store),
                    ("owner", &owner.to_string()),
                ],
            ),
            Self::Module { store, name, digest, vm } => xml.empty(
                "rudder:module",
                &[namespace, ("name", name), ("digest", &digest.to_string()), ("vm", vm), ("store", store)],
            ),
        });
    }

    /// Reads the element in our namespace, as libvirt gives it.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let elements = elements(text);
        Self::of(elements.iter().find(|element| matches!(element.name.as_str(), "lab" | "module"))?)
    }

    /// Finds it in the XML of a network: libvirt does not give the metadata of networks on its own before 9.7.
    pub(crate) fn of_network(text: &str) -> Option<Self> {
        let elements = elements(text);
        let of_lab = |element: &&Element| element.is(&["network", "metadata", "lab"]);
        // Names are read without their prefixes: ours is bound to our namespace.
        let ours = |element: &&Element| element.attribute("rudder") == Some(NAMESPACE);
        Self::of(elements.iter().filter(of_lab).find(ours)?)
    }

    fn of(element: &Element) -> Option<Self> {
        let attribute = |name| element.attribute(name).map(str::to_owned);
        let store = attribute("store")?;
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

    /// Whether it belongs to this lab of a store.
    pub(crate) fn is_of(&self, store: &str, id: &LabId) -> bool {
        matches!(self, Self::Lab { store: its, lab, .. } if its == store && lab == id)
    }

    /// The store that it belongs to.
    pub(crate) fn store(&self) -> &str {
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
    fn a_label_is_read_as_it_was_written() {
        let store = "/a \"b\" & <c>".to_owned();
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
    fn what_is_not_whole_is_no_label() {
        assert_eq!(Label::read("<other/>"), None);
        assert_eq!(Label::read("<lab store='/x' vm='a' id='../x' owner='1'/>"), None);
        assert_eq!(Label::read(""), None);
    }
}
