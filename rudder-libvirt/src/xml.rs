//! Writes XML: elements, attributes and text, all escaped by the writer and never concatenated as strings. Reads
//! elements with their attributes and text.

use quick_xml::{
    Reader, Writer, XmlVersion,
    events::{BytesEnd, BytesStart, BytesText, Event},
};

/// An XML document that is being written.
#[allow(missing_debug_implementations)] // A writer of quick-xml has none.
pub(crate) struct Xml(Writer<Vec<u8>>);

impl Xml {
    pub(crate) fn new() -> Self {
        Self(Writer::new_with_indent(Vec::new(), b' ', 2))
    }

    fn event(&mut self, event: Event<'_>) {
        // Writing to memory does not fail.
        let _ = self.0.write_event(event);
    }

    /// Writes an element with content.
    pub(crate) fn element(
        &mut self,
        name: &str,
        attributes: &[(&str, &str)],
        inside: impl FnOnce(&mut Self),
    ) {
        self.event(Event::Start(start(name, attributes)));
        inside(self);
        self.event(Event::End(BytesEnd::new(name)));
    }

    /// Writes an empty element.
    pub(crate) fn empty(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.event(Event::Empty(start(name, attributes)));
    }

    /// Writes an element that contains text.
    pub(crate) fn text(&mut self, name: &str, attributes: &[(&str, &str)], text: &str) {
        let text = clean(text);
        self.element(name, attributes, |xml| xml.event(Event::Text(BytesText::new(&text))));
    }

    /// Returns the document.
    pub(crate) fn finish(self) -> String {
        String::from_utf8_lossy(&self.0.into_inner()).into_owned()
    }
}

fn start<'a>(name: &'a str, attributes: &[(&str, &str)]) -> BytesStart<'a> {
    let mut start = BytesStart::new(name);
    for (key, value) in attributes {
        start.push_attribute((*key, clean(value).as_str()));
    }
    start
}

/// Replaces characters that XML cannot represent (Extensible Markup Language 1.0, 2.2: most control characters) with
/// U+FFFD.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { '\u{fffd}' } else { c })
        .collect()
}

/// An element that was read: its name without a prefix, its attributes, its ancestors and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) name: String,
    pub(crate) attributes: Vec<(String, String)>,
    /// The names of its ancestors, outermost first.
    pub(crate) around: Vec<String>,
    /// The text directly in it.
    pub(crate) text: String,
}

impl Element {
    pub(crate) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Returns whether the names of its ancestors, followed by its own, equal `path`.
    pub(crate) fn is(&self, path: &[&str]) -> bool {
        let own = self.around.iter().map(String::as_str).chain([self.name.as_str()]);
        own.eq(path.iter().copied())
    }
}

/// Returns all elements of a text, in order, up to the first syntax error.
pub(crate) fn elements(text: &str) -> Vec<Element> {
    let mut reader = Reader::from_str(text);
    let (mut found, mut open): (Vec<Element>, Vec<usize>) = (Vec::new(), Vec::new());
    loop {
        match reader.read_event() {
            Ok(Event::Start(start)) => {
                let element = read(&start, &found, &open);
                open.push(found.len());
                found.push(element);
            }
            Ok(Event::Empty(start)) => {
                let element = read(&start, &found, &open);
                found.push(element);
            }
            Ok(Event::Text(piece)) => {
                if let Some(element) = open.last().and_then(|index| found.get_mut(*index)) {
                    element.text.push_str(piece.xml10_content().trim());
                }
            }
            Ok(Event::End(_)) => {
                open.pop();
            }
            Ok(Event::Eof) | Err(_) => return found,
            Ok(_) => {}
        }
    }
}

fn read(start: &BytesStart<'_>, found: &[Element], open: &[usize]) -> Element {
    let attributes = start.attributes().flatten().filter_map(|attribute| {
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).ok()?.into_owned();
        Some((attribute.key.local_name().as_ref().to_owned(), value))
    });
    Element {
        name: start.local_name().as_ref().to_owned(),
        attributes: attributes.collect(),
        around: open
            .iter()
            .filter_map(|index| found.get(*index))
            .map(|element| element.name.clone())
            .collect(),
        text: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_read_back_as_it_was_written() {
        let nasty = r#"a "b" <c> & 'd', ä\"#;
        let mut xml = Xml::new();
        xml.element("x:one", &[("xmlns:x", "urn:x"), ("a", nasty)], |xml| {
            xml.text("two", &[], "words");
            xml.empty("three", &[("b", "a\u{1}b\n")]);
        });
        let text = xml.finish();
        let found = elements(&text);
        assert_eq!(found.len(), 3);
        assert_eq!(found.first().and_then(|one| one.attribute("a")), Some(nasty));
        assert!(found.get(1).is_some_and(|two| two.is(&["one", "two"]) && two.text == "words"));
        assert_eq!(found.get(2).and_then(|three| three.attribute("b")), Some("a\u{fffd}b\u{fffd}"));
    }

    #[test]
    fn malformed_xml_yields_what_could_be_read() {
        assert_eq!(elements("nothing"), []);
        assert_eq!(elements("<a><b").len(), 1);
    }
}
