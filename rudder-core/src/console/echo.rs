//! How the screen tells that a guest took keys: by what it drew since.
//!
//! To keep the pace, no font is known. A character is at least [`CELL`] pixels wide, so several that are echoed side by side
//! change a strip of the screen that is at least so wide; a blinking cursor changes one cell. That tells when a guest takes
//! keys, but not exactly how many it took, since a cursor goes before them: where that matters the text is [read](reads).

use super::{Framebuffer, text};

/// The narrowest characters of consoles are 8 pixels wide.
const CELL: usize = 8;
/// The widest cursors.
const CURSOR: usize = 9;
/// The highest lines of consoles; what is higher is more than a line.
const LINE: usize = 36;

/// What became of an echo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Echo {
    /// Nothing is different.
    Nothing,
    /// One cell, where more were typed: a cursor blinked, or the first character came.
    Cell,
    /// Less than what was typed could have drawn, but more than a cursor.
    Part,
    /// More than a line is different: the screen scrolled, or shows something else.
    Other,
    /// As much as what was typed would draw.
    All,
}

/// Compares the screen before and after characters were typed. `span` is how many cells lie between the first and the last
/// of them that are not blanks, both counted.
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
    // Of the outermost cells only a part may be inked.
    let width = right + 1 - left;
    if width >= span.saturating_sub(1) * CELL + 1 + usize::from(span > 1) {
        Echo::All
    } else if width <= CURSOR {
        Echo::Cell
    } else {
        Echo::Part
    }
}

/// Whether the first row of text that became different did so by these characters, all of them, and nothing else before
/// them. What cannot be read says no, and so does what might be a cursor.
pub(super) fn reads(before: &Framebuffer, now: &Framebuffer, typed: &str) -> bool {
    if typed.ends_with(['_', ' ']) || typed.is_empty() {
        return false;
    }
    let (before, now) = (text::read(before), text::read(now));
    let Some((old, new)) = before.rows().zip(now.rows()).find(|(old, new)| old != new) else { return false };
    let first = old.iter().zip(new).position(|(old, new)| old != new).unwrap_or(old.len());
    let blanks = typed.chars().take_while(|character| *character == ' ').count();
    // Blanks change nothing, unless a cursor stood there.
    [first.checked_sub(blanks), Some(first)].into_iter().flatten().any(|start| {
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
    fn an_echo_is_as_wide_as_what_was_typed() {
        let before = Framebuffer::new(640, 400);
        assert_eq!(compare(&before, &before, 3), Echo::Nothing);
        let mut now = before.clone();
        // A cursor that blinks, nine pixels wide.
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
    fn what_was_typed_is_read_to_the_last_character() {
        let before = screen("> one t");
        assert!(reads(&before, &screen("> one two"), "wo"));
        // A cursor stood where the text goes on, and stands behind it.
        let cursor = screen("> one t_");
        assert!(reads(&cursor, &screen("> one two_"), "wo"));
        assert!(reads(&cursor, &screen("> one t wo_"), " wo"));
        assert!(reads(&before, &screen("> one t wo_"), " wo"));
        for missing in ["> one t", "> one tw", "> one tw_", "> one tow", "> one twoo", "login: wo"] {
            let whole = missing == "> one twoo";
            assert_eq!(reads(&before, &screen(missing), "wo"), whole, "{missing}");
        }
        // Two of three and a cursor look like three.
        assert!(!reads(&screen("> ab"), &screen("> abab_"), "ab_"));
        assert!(!reads(&screen("> ab"), &screen("> aba"), "ab"));
        assert!(!reads(&screen("> ab"), &Framebuffer::new(320, 200), "ab"));
    }

    #[test]
    fn a_screen_that_scrolls_is_no_echo() {
        let before = Framebuffer::new(640, 400);
        let mut now = before.clone();
        ink(&mut now, 16, 30, 600);
        ink(&mut now, 16, 90, 600);
        assert_eq!(compare(&before, &now, 3), Echo::Other);
        assert_eq!(compare(&before, &Framebuffer::new(720, 400), 3), Echo::Other);
    }
}
