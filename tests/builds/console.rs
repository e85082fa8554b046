//! Typing into real programs on QEMU: no character is lost or duplicated, whatever reads the keyboard.

use crate::support::typing::{self, Typed, printable};

/// Number of printable characters, of every kind.
const MANY: usize = 2000;

fn expect_all(typed: &Typed) {
    eprintln!("{} characters in {:.1?}: {:.0} per second", typed.strokes, typed.took, typed.rate());
    assert_eq!(typed.found, typed.wanted);
}

#[tokio::test]
async fn grub_gets_every_character() {
    expect_all(&typing::grub(&printable(MANY)).await);
}

#[tokio::test]
async fn ipxe_gets_every_character() {
    expect_all(&typing::ipxe(&printable(MANY)).await);
}

#[tokio::test]
async fn linux_gets_every_character() {
    expect_all(&typing::linux(&printable(MANY), &crate::support::guest_path("tiny.qcow2")).await);
}
