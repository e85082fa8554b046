//! Times reading a screen, compared with encoding it as PNG, and shows how much is read correctly.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use rudder_core::console::{Framebuffer, text};
use std::{
    fs::{self, File},
    hint::black_box,
    io::BufReader,
    path::Path,
    time::{Duration, Instant},
};

fn picture(path: &Path) -> (Framebuffer, Vec<u8>) {
    let mut reader = png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    let (width, height) = (info.width as usize, info.height as usize);
    let mut screen = Framebuffer::new(width, height);
    for (y, row) in bytes.chunks(3 * width).enumerate() {
        screen
            .row_mut(y)
            .iter_mut()
            .zip(row.chunks(3))
            .for_each(|(pixel, bytes)| pixel.copy_from_slice(bytes));
    }
    (screen, bytes)
}

fn to_png(screen: &Framebuffer, bytes: &[u8]) -> Vec<u8> {
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, screen.width() as u32, screen.height() as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(bytes).unwrap();
    png
}

/// Returns the shortest of several runs: the time it takes on an otherwise idle machine.
fn time(mut what: impl FnMut()) -> Duration {
    (0..15)
        .map(|_| {
            let start = Instant::now();
            what();
            start.elapsed()
        })
        .min()
        .unwrap()
}

fn main() {
    let frames = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frames");
    let mut names: Vec<_> = fs::read_dir(frames).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "png"));
    names.sort();
    println!("{:28} {:>10} {:>9} {:>9} {:>6}", "screen", "pixels", "read", "PNG", "ratio");
    let (mut read, mut png) = (Duration::ZERO, Duration::ZERO);
    let (mut right, mut all) = (0, 0);
    for path in names {
        let (screen, bytes) = picture(&path);
        let one = time(|| drop(black_box(text::read(&screen))));
        let other = time(|| drop(black_box(to_png(&screen, &bytes))));
        read += one;
        png += other;
        let expected = fs::read_to_string(path.with_extension("txt")).unwrap();
        let shown = text::read(&screen).lines().collect::<Vec<_>>().join("\n");
        for (read, wanted) in shown.lines().zip(expected.lines()) {
            let pairs =
                || read.chars().zip(wanted.chars()).filter(|(_, wanted)| !" \u{fffd}".contains(*wanted));
            all += pairs().count();
            right += pairs().filter(|(read, wanted)| read == wanted).count();
        }
        let name = path.file_stem().unwrap().display().to_string();
        let size = format!("{}x{}", screen.width(), screen.height());
        println!(
            "{name:28} {size:>10} {one:>9.1?} {other:>9.1?} {:>6.2}",
            one.as_secs_f64() / other.as_secs_f64()
        );
    }
    println!("{:.2} % of {all} characters are read right", 100.0 * right as f64 / all as f64);
    println!("reading all, to making PNGs of all: {:.2}", read.as_secs_f64() / png.as_secs_f64());
}
