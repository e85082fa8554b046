//! The keys and buttons that a viewer holds down.

use super::messages::Input;

/// What must be released when a viewer leaves, so that it does not stay down for the other viewers.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// The keys that are down, in the order in which they were pressed.
    keys: Vec<Input>,
    /// The last position of the pointer, while a button is down.
    pointer: Option<(u16, u16)>,
}

impl Held {
    /// Notes an event.
    pub(super) fn note(&mut self, input: Input) {
        let keysym_of = |input: &Input| match input {
            Input::Key { keysym, .. } | Input::ExtendedKey { keysym, .. } => Some(*keysym),
            Input::Pointer { .. } => None,
        };
        match input {
            Input::Key { down, keysym } | Input::ExtendedKey { down, keysym, .. } => {
                self.keys.retain(|held| keysym_of(held) != Some(keysym));
                if down {
                    self.keys.push(input);
                }
            }
            Input::Pointer { buttons, x, y } => self.pointer = (buttons != 0).then_some((x, y)),
        }
    }

    /// Returns the events that release everything, the last key first.
    pub(super) fn releases(self) -> Vec<Input> {
        let released = |input| match input {
            Input::Key { keysym, .. } => Input::Key { down: false, keysym },
            Input::ExtendedKey { keysym, scancode, .. } => {
                Input::ExtendedKey { down: false, keysym, scancode }
            }
            pointer @ Input::Pointer { .. } => pointer,
        };
        let pointer = self.pointer.map(|(x, y)| Input::Pointer { buttons: 0, x, y });
        self.keys.into_iter().rev().map(released).chain(pointer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_down_is_released() {
        let key = |down, keysym| Input::Key { down, keysym };
        let extended = |down, keysym, scancode| Input::ExtendedKey { down, keysym, scancode };
        let mut held = Held::default();
        for input in [
            key(true, 0x61),
            extended(true, 0xffe3, 0x1d),
            key(true, 0x62),
            // A key that repeats is pressed once; one that was pressed one way may be released the other way.
            extended(true, 0xffe3, 0x1d),
            extended(false, 0x61, 0x1e),
            Input::Pointer { buttons: 1, x: 5, y: 6 },
            Input::Pointer { buttons: 4, x: 7, y: 8 },
        ] {
            held.note(input);
        }
        let released =
            [extended(false, 0xffe3, 0x1d), key(false, 0x62), Input::Pointer { buttons: 0, x: 7, y: 8 }];
        assert_eq!(held.releases(), released);

        let mut held = Held::default();
        held.note(Input::Pointer { buttons: 1, x: 5, y: 6 });
        held.note(Input::Pointer { buttons: 0, x: 5, y: 6 });
        assert!(held.releases().is_empty());
    }
}
