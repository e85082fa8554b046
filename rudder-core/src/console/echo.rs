//! Detects from changes on the screen that a guest took keys.
//!
//! The pace is kept without knowing any font. A character is at least [`CELL`] pixels wide, so several that are echoed
//! side by side change a strip of the screen of at least the corresponding width; a blinking cursor changes one cell.
//! This shows that a guest takes keys, but not exactly how many it took, since a cursor precedes them. Where that
//! matters, the text is [read](reads).

use super::{Framebuffer, text};

/// Width of the narrowest console characters, in pixels.
const CELL: usize = 8;
/// Width of the widest cursors, in pixels.
const CURSOR: usize = 9;
/// Height of the tallest console lines, in pixels; a taller change is more than a line.
const LINE: usize = 36;

/// How much of an echo is visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Echo {
    /// Nothing has changed.
    Nothing,
    /// One cell, where more were typed: a cursor blinked, or the first character appeared.
    Cell,
    /// Less than what was typed would have drawn, but more than a cursor.
    Part,
    /// More than a line has changed: the screen scrolled, or shows something else.
    Other,
    /// As much as what was typed would draw.
    All,
}

/// Compares the screen before and after characters were typed. `span` is the number of cells from the first to the last
/// visible character, inclusive.
pub(super) fn compare(before: &Framebuffer, now: &Framebuffer, span: usize) -> Echo {
    if (before.width(), before.height()) != (now.width(), now.height()) {
        return Echo::Other;
    }
    let mut differing = (0..now.height()).filter(|&y| !before.same_row(now, y));
    let Some(top) = differing.next() else { return Echo::Nothing };
    let bottom = differing.next_back().unwrap_or(top);
    if bottom - top >= LINE {
        return Echo::Other;
    }
    let (mut left, mut right) = (usize::MAX, 0);
    for y in top..=bottom {
        let (old, new) = (before.row(y), now.row(y));
        let differs = |x: &usize| old[*x] != new[*x];
        let Some(first) = (0..now.width()).find(differs) else { continue };
        left = left.min(first);
        right = right.max((0..now.width()).rfind(differs).unwrap_or(first));
    }
    // The outermost cells may be drawn only in part.
    let width = right + 1 - left;
    if width >= span.saturating_sub(1) * CELL + 1 + usize::from(span > 1) {
        Echo::All
    } else if width <= CURSOR {
        Echo::Cell
    } else {
        Echo::Part
    }
}

/// Whether the first row of text that changed did so by exactly these characters, all of them, and nothing before them.
/// Returns `false` for what cannot be read, and for what might be a cursor.
pub(super) fn reads(before: &Framebuffer, now: &Framebuffer, typed: &str) -> bool {
    if typed.ends_with(['_', ' ']) || typed.is_empty() {
        return false;
    }
    let (before, now) = (text::read(before), text::read(now));
    let Some((old, new)) = before.rows().zip(now.rows()).find(|(old, new)| old != new) else { return false };
    let first = old.iter().zip(new).position(|(old, new)| old != new).unwrap_or(old.len());
    let spaces = typed.chars().take_while(|character| *character == ' ').count();
    // Spaces change nothing, unless a cursor was there.
    [first.checked_sub(spaces), Some(first)].into_iter().flatten().any(|start| {
        let mut shown = new[start..].iter();
        typed.chars().all(|character| shown.next().is_some_and(|cell| *cell == character))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ink(frame: &mut Framebuffer, x: usize, y: usize, width: usize) {
        for y in y..y + 2 {
            frame.row_mut(y)[x..x + width].fill([170; 3]);
        }
    }

    #[test]
    fn an_echo_is_as_wide_as_the_typed_text() {
        let before = Framebuffer::new(640, 400);
        assert_eq!(compare(&before, &before, 3), Echo::Nothing);
        let mut now = before.clone();
        // A blinking cursor, nine pixels wide.
        ink(&mut now, 16, 30, 9);
        assert_eq!(compare(&before, &now, 2), Echo::Cell);
        ink(&mut now, 24, 30, 9);
        assert_eq!(compare(&before, &now, 3), Echo::Part);
        // The thinnest two characters, each two pixels wide.
        let mut now = before.clone();
        ink(&mut now, 19, 30, 2);
        assert_eq!(compare(&before, &now, 1), Echo::All);
        ink(&mut now, 27, 30, 2);
        assert_eq!(compare(&before, &now, 2), Echo::All);
        assert_eq!(compare(&before, &now, 3), Echo::Part);
    }

    fn screen(line: &str) -> Framebuffer {
        let mut frame = Framebuffer::new(640, 400);
        text::draw(&mut frame, (0, 0), "Welcome", [170; 3], [0; 3]);
        text::draw(&mut frame, (0, 32), line, [170; 3], [0; 3]);
        frame
    }

    #[test]
    fn an_echo_is_compared_to_the_last_character() {
        let before = screen("> one t");
        assert!(reads(&before, &screen("> one two"), "wo"));
        // A cursor was where the text continues, and is now behind it.
        let cursor = screen("> one t_");
        assert!(reads(&cursor, &screen("> one two_"), "wo"));
        assert!(reads(&cursor, &screen("> one t wo_"), " wo"));
        assert!(reads(&before, &screen("> one t wo_"), " wo"));
        for missing in ["> one t", "> one tw", "> one tw_", "> one tow", "> one twoo", "login: wo"] {
            let whole = missing == "> one twoo";
            assert_eq!(reads(&before, &screen(missing), "wo"), whole, "{missing}");
        }
        // Two of three characters and a cursor look like three.
        assert!(!reads(&screen("> ab"), &screen("> abab_"), "ab_"));
        assert!(!reads(&screen("> ab"), &screen("> aba"), "ab"));
        assert!(!reads(&screen("> ab"), &Framebuffer::new(320, 200), "ab"));
    }

    #[test]
    fn a_scrolled_screen_is_not_an_echo() {
        let before = Framebuffer::new(640, 400);
        let mut now = before.clone();
        ink(&mut now, 16, 30, 600);
        ink(&mut now, 16, 90, 600);
        assert_eq!(compare(&before, &now, 3), Echo::Other);
        assert_eq!(compare(&before, &Framebuffer::new(720, 400), 3), Echo::Other);
    }
}
