//! The text that was read from a screen.

use std::fmt;

use super::font::alike;

/// Marks a cell that could not be read (U+FFFD).
pub const UNREAD: char = '\u{FFFD}';

/// The text of a screen: rows of cells with one character each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScreenText {
    columns: usize,
    cells: Vec<char>,
}

impl ScreenText {
    /// Creates a screen from `cells`, which must be a whole number of rows.
    pub(super) fn new(columns: usize, cells: Vec<char>) -> Self {
        Self { columns, cells }
    }

    /// Returns the number of cells in a row; 0 if the screen shows no text.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the rows from the top, each with all of its cells.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[char]> + Clone {
        self.cells.chunks(self.columns.max(1))
    }

    /// Returns the rows from the top, without trailing spaces.
    pub fn lines(&self) -> impl ExactSizeIterator<Item = String> {
        self.rows().map(|row| row.iter().collect::<String>().trim_end().to_owned())
    }

    /// Returns the number of cells that are not blank.
    #[must_use]
    pub fn written(&self) -> usize {
        self.cells.iter().filter(|char| **char != ' ').count()
    }

    /// Returns the number of cells that are not blank and could not be read.
    #[must_use]
    pub fn unread(&self) -> usize {
        self.cells.iter().filter(|char| **char == UNREAD).count()
    }

    /// Returns the fraction of the non-blank cells that was read, from 0 to 1; 1 for a blank screen. For a text console
    /// it is 1 or almost 1, for a graphical screen much less.
    #[must_use]
    pub fn share_read(&self) -> f64 {
        match self.written() {
            0 => 1.0,
            written => (written - self.unread()) as f64 / written as f64,
        }
    }

    /// Whether the screen contains the text.
    ///
    /// Spaces and newlines in the text match any run of blanks, including the end of a row. A text may wrap at the
    /// right edge of the screen to the next row, and at the right edge of a column or of a frame to the next row of the
    /// same column: one that starts at the same position, with two blanks or a line to its left. The match is
    /// case-sensitive. A blank text is always contained.
    #[must_use]
    pub fn contains(&self, text: &str) -> bool {
        // A full block fills its cell with one colour, as a blank does.
        let words =
            text.split(|char: char| char.is_whitespace() || char == '█').filter(|word| !word.is_empty());
        let expected: Vec<char> = words.collect::<Vec<_>>().join(" ").chars().collect();
        let matches = |rows: &[&[char]]| {
            let flow = flow(rows);
            (0..=flow.len()).any(|start| matches_at(&flow[start..], &expected))
        };
        matches(&self.trimmed_rows()) || self.columns_of_text().iter().any(|rows| matches(rows))
    }

    /// Returns the rows without the columns that are blank in every row: a console may leave columns at both sides
    /// free.
    fn trimmed_rows(&self) -> Vec<&[char]> {
        let left = self.rows().filter_map(|row| row.iter().position(|char| *char != ' ')).min().unwrap_or(0);
        self.rows().map(|row| row[..used(row)].get(left..).unwrap_or_default()).collect()
    }

    /// Returns pieces of rows that start at the same position in successive rows.
    fn columns_of_text(&self) -> Vec<Vec<&[char]>> {
        let mut done: Vec<Vec<&[char]>> = Vec::new();
        let mut open: Vec<(usize, Vec<&[char]>)> = Vec::new();
        for row in self.rows() {
            let mut next = Vec::new();
            for (start, piece) in pieces(row) {
                let above = open.iter().position(|(column, _)| *column == start);
                let mut rows = above.map(|index| open.swap_remove(index).1).unwrap_or_default();
                rows.push(piece);
                next.push((start, rows));
            }
            done.extend(std::mem::replace(&mut open, next).into_iter().map(|(_, rows)| rows));
        }
        done.extend(open.into_iter().map(|(_, rows)| rows));
        done.retain(|rows| rows.len() > 1); // one row alone is part of the whole
        done
    }
}

/// Returns the length of a row up to its last cell that is not blank.
fn used(row: &[char]) -> usize {
    row.iter().rposition(|char| *char != ' ').map_or(0, |last| last + 1)
}

/// Returns the parts of a row between lines, images and runs of more than one blank, each with the column where it
/// starts.
fn pieces(row: &[char]) -> Vec<(usize, &[char])> {
    let line = |char: char| ('─'..='╿').contains(&char) || char == '|' || char == UNREAD;
    let gap = |column: usize| {
        line(row[column])
            || (row[column] == ' ' && row.get(column + 1).is_none_or(|next| *next == ' ' || line(*next)))
    };
    let mut pieces = Vec::new();
    let mut column = 0;
    while column < row.len() {
        if row[column] == ' ' || gap(column) {
            column += 1;
            continue;
        }
        let end = (column..row.len()).find(|&at| gap(at)).unwrap_or(row.len());
        pieces.push((column, &row[column..end]));
        column = end;
    }
    pieces
}

/// Returns rows as one sequence. A text that wraps goes from the last column used to the first one.
fn flow(rows: &[&[char]]) -> Vec<Symbol> {
    let right = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let mut flow = Vec::with_capacity(rows.len() * (right + 1));
    for row in rows {
        flow.extend(row.iter().map(|char| if *char == ' ' { Symbol::Blank } else { Symbol::Char(*char) }));
        flow.push(if row.len() == right && right > 0 { Symbol::Edge } else { Symbol::Blank });
    }
    flow
}

#[derive(Clone, Copy, PartialEq)]
enum Symbol {
    Char(char),
    /// A blank, or the end of a row that is not full.
    Blank,
    /// The end of a full row: matches a blank or nothing.
    Edge,
}

/// Whether a text, in which blanks are single, is at the start of a sequence.
fn matches_at(mut stream: &[Symbol], expected: &[char]) -> bool {
    for &char in expected {
        if char == ' ' {
            let spaces = stream.iter().take_while(|symbol| !matches!(symbol, Symbol::Char(_))).count();
            if spaces == 0 {
                return false;
            }
            stream = &stream[spaces..];
            continue;
        }
        if let [Symbol::Edge, rest @ ..] = stream {
            stream = rest;
        }
        match stream {
            [Symbol::Char(read), rest @ ..] if alike(*read, char) => stream = rest,
            _ => return false,
        }
    }
    true
}

/// Writes the rows that contain text, without trailing blanks, without blank rows around them, and with at most one
/// blank row between them.
impl fmt::Display for ScreenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A row of an image has cells that happen to look like a stroke or a dot.
        let is_text = |line: &String| !line.contains(UNREAD) || line.chars().any(char::is_alphanumeric);
        let mut gap = None;
        for line in self.lines() {
            if line.is_empty() || !is_text(&line) {
                gap = gap.map(|_| "\n\n");
                continue;
            }
            write!(f, "{}{line}", gap.unwrap_or_default())?;
            gap = Some("\n");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(columns: usize, rows: &[&str]) -> ScreenText {
        let cells = rows
            .iter()
            .flat_map(|row| row.chars().chain(std::iter::repeat(' ')).take(columns).collect::<Vec<_>>())
            .collect();
        ScreenText::new(columns, cells)
    }

    #[test]
    fn spaces_match_spaces_and_the_ends_of_rows() {
        let screen = screen(20, &["Press  ENTER to", "   continue", "", "login:"]);
        assert!(screen.contains("Press ENTER to continue"));
        assert!(screen.contains("ENTER\n  to"));
        assert!(screen.contains("continue login:"));
        assert!(screen.contains(" ") && screen.contains(""));
        for other in ["PressENTER", "tocontinue", "press", "login: root"] {
            assert!(!screen.contains(other), "{other}");
        }
    }

    #[test]
    fn text_may_wrap_at_the_edge_of_the_screen() {
        let wrapped = screen(8, &["Welcome ", "to insta", "ller 2", "ok"]);
        assert!(wrapped.contains("to installer 2 ok"));
        assert!(wrapped.contains("Welcome to"));
        assert!(!wrapped.contains("installer 2ok"));
        // A console with a border of blank cells.
        let framed = screen(12, &["", "  abcdefgh  ", "  ij", ""]);
        assert!(framed.contains("ghij"));
    }

    #[test]
    fn text_may_wrap_in_a_column_or_a_frame() {
        let dialogue = screen(
            48,
            &[
                "  ┌───────┤ Low memory ├─────────┐ Help:",
                "  │                              │ This is the",
                "  │ This system has little free  │ option one",
                "  │ memory, so it will enter low │ adjusts",
                "  │ memory mode. Continue?       │ 0123456789ab",
                "  │                              │ cdef",
                "  └──────────────────────────────┘",
            ],
        );
        for text in [
            "This system has little free memory, so it will enter low memory mode. Continue?",
            "Low memory",
            "This is the option one adjusts",
            "9abcdef",
        ] {
            assert!(dialogue.contains(text), "{text}");
        }
        for other in ["little free option", "This is the memory", "low memory Continue", "adjusts memory"] {
            assert!(!dialogue.contains(other), "{other}");
        }
    }

    #[test]
    fn characters_that_look_alike_match() {
        let cyrillic = screen(10, &["HOBO"]); // read as Latin
        assert!(cyrillic.contains("НОВО"));
        assert!(!screen(10, &["НОВО"]).contains("HOBO"));
        assert!(!screen(4, &["\u{fffd}\u{fffd}"]).contains("a"));
    }

    #[test]
    fn surrounding_spaces_and_images_are_not_shown() {
        let screen = screen(12, &["", "\u{fffd}|\u{fffd}-", "  Title  ", "", "", "a\u{fffd}b", "", ""]);
        assert_eq!(screen.to_string(), "  Title\n\na\u{fffd}b");
        assert_eq!((screen.written(), screen.unread()), (12, 3));
    }
}
