//! Text recognition on screens of real consoles. The screenshots in `frames/` were taken by `tools/fonts/frames`; the
//! text beside each was compared with the screenshot by eye, or with what was printed. U+FFFD in it stands for what is
//! not a character (a logo), and for what is documented as not readable (double-width characters). `RUDDER_UPDATE=1`
//! writes the recognised text to these files.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use rudder_core::console::{
    Framebuffer,
    text::{self, UNREAD},
};

fn frames() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frames")
}

fn screenshot(path: &Path) -> Framebuffer {
    let mut reader = png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    let (width, height) = (info.width as usize, info.height as usize);
    let mut screen = Framebuffer::new(width, height);
    for y in 0..height {
        for (x, pixel) in screen.row_mut(y).iter_mut().enumerate() {
            pixel.copy_from_slice(&bytes[(y * width + x) * 3..][..3]);
        }
    }
    screen
}

/// Splits a text into rows, without trailing spaces.
fn rows(text: &str) -> Vec<String> {
    text.lines().map(|row| row.trim_end().to_owned()).collect()
}

/// Counts the characters of a row, and those of them that are the same in another. Cells that are empty or not a
/// character in both do not count.
fn compare(read: &str, expected: &str) -> (usize, usize) {
    let (mut read, mut expected) = (read.chars(), expected.chars());
    let (mut all, mut same) = (0, 0);
    loop {
        match (read.next(), expected.next()) {
            (None, None) => return (all, same),
            (Some(' ') | None, Some(' ') | None) | (Some(UNREAD), Some(UNREAD)) => {}
            (a, b) => {
                all += 1;
                same += usize::from(a == b);
            }
        }
    }
}

#[test]
fn consoles_are_read_without_errors() {
    let mut names: Vec<_> = fs::read_dir(frames()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "png"));
    names.sort();
    let (mut report, mut wrong) = (String::new(), false);
    let (mut all, mut right) = (0, 0);
    for path in &names {
        let screen = text::read(&screenshot(path));
        let read = screen.lines().collect::<Vec<_>>();
        let beside = path.with_extension("txt");
        if std::env::var_os("RUDDER_UPDATE").is_some() {
            fs::write(&beside, format!("{}\n", read.join("\n").trim_end())).unwrap();
        }
        let expected = rows(&fs::read_to_string(&beside).unwrap());
        let counts = (0..read.len().max(expected.len())).map(|row| {
            let line = |rows: &[String]| rows.get(row).cloned().unwrap_or_default();
            compare(&line(&read), &line(&expected))
        });
        let (cells, same) = counts.fold((0, 0), |(all, same), (cells, right)| (all + cells, same + right));
        (all, right) = (all + cells, right + same);
        wrong |= same != cells || cells == 0;
        let name = path.file_stem().unwrap().display();
        report += &format!(
            "{name:24} {same:5} of {cells:5} characters read right, {} cells are no character\n",
            screen.unread()
        );
    }
    let share = 100.0 * right as f64 / all as f64;
    report += &format!("{share:.2} % of {all} characters on {} screens are read right\n", names.len());
    println!("{report}");
    assert!(!wrong && names.len() >= 10, "{report}");
}

/// Fonts draw some characters alike, so another one may be read than was written; a search still finds it.
#[test]
fn text_on_the_screens_is_found() {
    for (name, texts) in [
        (
            "grub-uefi-800",
            &["Größe, naïve façade, Ελληνικά, Русский, ąęłż", "or `c' for a command-line."][..],
        ),
        (
            "linux-text",
            &["┘┌█▄▌▐▀ ░▒▓", "nopqrstuvwxyz{|}~ red bold green inverse yellow on blue", "0123456789 end"],
        ),
        ("linux-vesa-terminus12x6", &["ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖ×ØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõö÷øùúûüýþÿ"]),
        (
            "grub-graphics",
            &["echo ' !\"#$%&()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abc", "grub>"],
        ),
        // In columns, and wrapped within a column.
        (
            "edk2-setup",
            &["This is the option one adjusts to change the language for the current system", "Boot Manager"],
        ),
        (
            "edk2-boot-manager",
            &["Fv(7CB8BDC9-F8EB-4F34-AAEA-3EE4AF6516A1)/FvFile(7C04A583-9E3E-4F1C-AD65-E05268D0B4D1)"],
        ),
        // On top of images.
        ("installer-menu", &["Debian GNU/Linux installer menu (BIOS mode) Install Advanced options"]),
        ("installer-grub", &["*Install", "Accessible dark contrast installer menu ..."]),
        ("ipxe-uefi", &["gw fe80::2", "iPXE> echo"]),
        (
            "installer-language",
            &[
                "[!!] Select a language",
                "Беларуская",
                "Ελληνικά",
                "ქართული",
                "English - English",
                "<Go Back>",
            ],
        ),
    ] {
        let screen = text::read(&screenshot(&frames().join(name).with_extension("png")));
        for text in texts {
            assert!(screen.contains(text), "{name}: expected {text:?}, but read\n{screen}");
        }
    }
}
