//! How the screen tells that a guest took keys: by what it drew since.
//!
//! No font is known here. A character is at least [`CELL`] pixels wide, so several that are echoed side by side change a
//! strip of the screen that is at least so wide; a blinking cursor changes one cell.

use super::Framebuffer;

/// The narrowest characters of consoles are 8 pixels wide.
const CELL: usize = 8;
/// The highest lines of consoles; what is higher is more than a line.
const LINE: usize = 36;

/// What became of an echo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Echo {
    /// Nothing is different.
    Nothing,
    /// Less than what was typed could have drawn.
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
    let mut differing = (0..now.height()).filter(|&y| before.row(y) != now.row(y));
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
    if width >= span.saturating_sub(1) * CELL + 1 + usize::from(span > 1) { Echo::All } else { Echo::Part }
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
        assert_eq!(compare(&before, &now, 2), Echo::Part);
        // The thinnest two characters, each two pixels wide.
        let mut now = before.clone();
        ink(&mut now, 19, 30, 2);
        assert_eq!(compare(&before, &now, 1), Echo::All);
        ink(&mut now, 27, 30, 2);
        assert_eq!(compare(&before, &now, 2), Echo::All);
        assert_eq!(compare(&before, &now, 3), Echo::Part);
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
