//! The decoder against the encoder, and against arbitrary bytes.
#![allow(clippy::unwrap_used)]

use super::{
    encode::{Encoder, Form, tile},
    *,
};
use crate::ErrorKind;
use proptest::prelude::*;

/// Waits for a future that is never pending: it reads from memory.
fn ready<T>(future: impl Future<Output = T>) -> T {
    futures::FutureExt::now_or_never(future).unwrap()
}

/// Decodes the data of a rectangle that is the whole frame.
fn decode(decoder: &mut Decoder, mut data: &[u8], frame: &mut Framebuffer) -> Result<()> {
    let size = (frame.width(), frame.height());
    ready(decoder.draw(&mut data, frame, (0, 0), size))
}

/// Decodes what was not compressed yet, on a connection of its own.
fn decode_plain(plain: &[u8], (width, height): (usize, usize)) -> Result<Framebuffer> {
    let mut frame = Framebuffer::new(width, height);
    decode(&mut Decoder::default(), &Encoder::default().pack(plain), &mut frame).map(|()| frame)
}

/// A screen with as many colours, in runs of about this length.
fn screen() -> impl Strategy<Value = Framebuffer> {
    let colours = prop::collection::vec(any::<[u8; 3]>(), 1..200);
    ((0..100usize, 0..100usize), colours, 1..400usize, any::<u64>()).prop_map(|(size, colours, run, seed)| {
        let mut frame = Framebuffer::new(size.0, size.1);
        let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
        let mut next = |below| rand::RngExt::random_range(&mut random, 0..below);
        let (mut colour, mut left) = (colours[0], 0);
        for y in 0..size.1 {
            for pixel in frame.row_mut(y) {
                if left == 0 {
                    (colour, left) = (colours[next(colours.len())], next(run));
                } else {
                    left -= 1;
                }
                *pixel = colour;
            }
        }
        frame
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Several rectangles of one connection, each tile in any form that can represent it.
    #[test]
    fn what_is_encoded_is_decoded(
        screens in prop::collection::vec(screen(), 1..4),
        forms in prop::collection::vec(prop::sample::select(&Form::ALL), 1..20),
    ) {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
        let mut forms = forms.iter().cycle();
        for screen in screens {
            let size = (screen.width(), screen.height());
            let data = encoder.encode_as(&screen, (0, 0), size, |pixels, width| {
                let chosen = tile(pixels, width, *forms.next().unwrap());
                chosen.or_else(|| tile(pixels, width, Form::Raw)).unwrap()
            });
            let mut shown = Framebuffer::new(size.0, size.1);
            decode(&mut decoder, &data, &mut shown).unwrap();
            prop_assert_eq!(&shown, &screen);

            let mut shown = Framebuffer::new(size.0, size.1);
            decode(&mut decoder, &encoder.encode(&screen, (0, 0), size), &mut shown).unwrap();
            prop_assert!(shown == screen, "in the shortest forms");
        }
    }

    /// Parts of a screen arrive where they belong, and nothing else changes.
    #[test]
    fn a_part_is_drawn_at_its_position(screen in screen(), at in [0.0..1.0f64, 0.0..1.0, 0.0..1.0, 0.0..1.0]) {
        let part = |from: usize, at: f64| (from as f64 * at) as usize;
        let (x, y) = (part(screen.width(), at[0]), part(screen.height(), at[1]));
        let (width, height) = (part(screen.width() - x, at[2]), part(screen.height() - y, at[3]));
        let data = Encoder::default().encode(&screen, (x, y), (width, height));
        let mut shown = Framebuffer::new(screen.width(), screen.height());
        let mut stream = data.as_slice();
        ready(Decoder::default().draw(&mut stream, &mut shown, (x, y), (width, height))).unwrap();
        prop_assert!(stream.is_empty(), "read to the end");
        for row in 0..screen.height() {
            for column in 0..screen.width() {
                let inside = (x..x + width).contains(&column) && (y..y + height).contains(&row);
                let expected = if inside { screen.row(row)[column] } else { [0; 3] };
                prop_assert_eq!(shown.row(row)[column], expected);
            }
        }
    }

    /// Compressed or not, arbitrary bytes are a picture or an error, in the memory that every decoder has.
    #[test]
    fn arbitrary_bytes_are_a_picture_or_an_error(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(255), 0..20u8, 126..132u8], 0..2_000),
        size in (0..100usize, 0..100usize),
        is_packed in any::<bool>(),
    ) {
        let data = match is_packed {
            true => [(bytes.len() as u32).to_be_bytes().as_slice(), &bytes].concat(),
            false => Encoder::default().pack(&bytes),
        };
        let mut decoder = Decoder::default();
        let mut frame = Framebuffer::new(size.0, size.1);
        if let Err(error) = decode(&mut decoder, &data, &mut frame) {
            prop_assert_eq!(error.kind(), ErrorKind::Protocol);
        }
        prop_assert_eq!(decoder.unpacked.len(), UNPACKED);
        prop_assert!(decoder.packed.capacity() as u64 <= PIECE);
        prop_assert_eq!(decoder.pixels.len(), TILE * TILE);
    }

    /// One byte of valid data is changed, or its end is missing.
    #[test]
    fn damaged_data_is_a_picture_or_an_error(
        screen in screen(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let size = (screen.width(), screen.height());
        let mut data = Encoder::default().encode(&screen, (0, 0), size);
        let at = at.index(data.len());
        match cut {
            true => data.truncate(at),
            false => data[at] = value,
        }
        let mut shown = Framebuffer::new(size.0, size.1);
        if let Err(error) = decode(&mut Decoder::default(), &data, &mut shown) {
            prop_assert_eq!(error.kind(), ErrorKind::Protocol);
        }
    }
}

#[test]
fn every_form_of_a_tile_is_decoded() {
    // Bytes written by hand from the RFC, so that the encoder and the decoder are not wrong together.
    const RED: [u8; 3] = [200, 0, 1];
    const BLUE: [u8; 3] = [2, 0, 250];
    let (red, blue) = ([1, 0, 200], [250, 0, 2]);
    let cases: [(&str, Vec<u8>); 6] = [
        ("raw", [[0].as_slice(), &red, &blue, &red, &red, &red, &blue].concat()),
        ("packed with 1 bit", [[2].as_slice(), &red, &blue, &[0b0100_0000, 0b0010_0000]].concat()),
        ("packed with 2 bits", [[3].as_slice(), &blue, &red, &[9; 3], &[0b0100_0100, 0b0101_0000]].concat()),
        ("packed with 4 bits", [[5].as_slice(), &[9; 9], &red, &blue, &[0x34, 0x30, 0x33, 0x40]].concat()),
        ("runs", [[128].as_slice(), &red, &[0], &blue, &[0], &red, &[2], &blue, &[0]].concat()),
        ("runs of a palette", [[130].as_slice(), &red, &blue, &[0, 1, 128, 2, 1]].concat()),
    ];
    for (form, plain) in cases {
        let frame = decode_plain(&plain, (3, 2)).unwrap_or_else(|error| panic!("{form}: {error}"));
        assert_eq!([frame.row(0), frame.row(1)], [[RED, BLUE, RED], [RED, RED, BLUE]], "{form}");
    }
    assert_eq!(decode_plain(&[&[1], red.as_slice()].concat(), (3, 2)).unwrap().row(1), [RED; 3]);
    // 256 and 4096: lengths are sums.
    let long = [[128].as_slice(), &red, &[255, 0], &blue, &[255; 15], &[14]].concat();
    let frame = decode_plain(&long, (64, 64)).unwrap();
    assert_eq!((frame.row(3)[63], frame.row(4)[0], frame.row(63)[63]), (RED, BLUE, BLUE));
}

#[test]
fn invalid_tiles_are_refused_with_what_was_found() {
    let endless = [[128, 1, 2, 3].as_slice(), &[255; 20_000]].concat();
    let cases: [(&[u8], &str); 8] = [
        (&[17], "the unused subencoding 17"),
        (&[127], "the unused subencoding 127"),
        (&[129], "the unused subencoding 129"),
        (&[3, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0b1100_0000, 0], "a ZRLE palette of 3, but found the index 3"),
        (&[130, 0, 0, 0, 1, 1, 1, 2], "a ZRLE palette of 2, but found the index 2"),
        (&[128, 0, 0, 0, 4], "at most 4 pixels in a ZRLE tile, but found one of 5"),
        (&endless, "at most 4 pixels"),
        (&[1, 0, 0], "the end of the rectangle's data"),
    ];
    for (plain, text) in cases {
        let error = decode_plain(plain, (2, 2)).unwrap_err();
        assert!(error.to_string().contains(text), "expected {text:?}, but found {error}");
    }
    let error = decode_plain(&[1, 0, 0, 0, 7], (2, 2)).unwrap_err();
    assert_eq!(error.to_string(), "expected the ZRLE data of 2×2 pixels, but found more than that");
    let error =
        decode(&mut Decoder::default(), &[0, 0, 0, 3, 1, 2, 3], &mut Framebuffer::new(2, 2)).unwrap_err();
    assert_eq!(error.to_string(), "expected zlib data in a ZRLE rectangle, but found something else");
}

#[test]
fn one_zlib_stream_lasts_for_the_connection() {
    let mut packed = Vec::new();
    let mut deflate = flate2::Compress::new(flate2::Compression::fast(), true);
    packed.reserve(100);
    deflate.compress_vec(&[1, 5, 6, 7], &mut packed, flate2::FlushCompress::Finish).unwrap();
    let one = [(packed.len() as u32).to_be_bytes().as_slice(), &packed].concat();
    let (mut decoder, mut frame) = (Decoder::default(), Framebuffer::new(2, 2));
    decode(&mut decoder, &one, &mut frame).unwrap();
    assert_eq!(frame.row(0)[0], [7, 6, 5]);
    // The server ended its stream, and begins another.
    let error = decode(&mut decoder, &one, &mut frame).unwrap_err();
    assert!(error.to_string().contains("but found data after its end"), "{error}");
}

#[test]
fn a_small_rectangle_cannot_unpack_to_gigabytes() {
    // A thousandfold: 64 MiB from 64 KiB. Nothing after the first tile is kept.
    let data = Encoder::default().pack(&vec![1; 64 << 20]);
    assert!(data.len() < 1 << 20);
    let mut decoder = Decoder::default();
    let error = decode(&mut decoder, &data, &mut Framebuffer::new(2, 2)).unwrap_err();
    assert!(error.to_string().contains("more than that"), "{error}");
    assert!(decoder.inflate.total_out() <= 2 * UNPACKED as u64, "{}", decoder.inflate.total_out());
}
