//! Passwords of VNC viewers, and the proof of knowing one.

use des::{
    Des,
    cipher::{BlockCipherEncrypt as _, KeyInit as _},
};
use rand::RngExt as _;
use std::fmt;
use subtle::ConstantTimeEq as _;

/// Characters that are not easily confused.
const ALPHABET: &[u8] = b"23456789abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ";
/// The part of a password that RFB uses (RFC 6143, 7.2.2).
const LENGTH: usize = 8;

/// A random password. Never shown by `Debug`.
#[derive(Clone)]
pub(super) struct Password([u8; LENGTH]);

/// The bytes that a viewer has to encrypt.
pub(super) type Challenge = [u8; 16];

impl Password {
    /// Returns one of 56⁸ passwords, about 2⁴⁶.
    pub(super) fn new() -> Self {
        let mut random = rand::rng();
        Self(std::array::from_fn(|_| ALPHABET[random.random_range(..ALPHABET.len())]))
    }

    #[cfg(test)]
    pub(super) fn of(bytes: [u8; LENGTH]) -> Self {
        Self(bytes)
    }

    pub(super) fn as_text(&self) -> String {
        self.0.iter().copied().map(char::from).collect()
    }

    /// Whether the response is the challenge encrypted with the password, compared in constant time.
    pub(super) fn is_proof(&self, challenge: &Challenge, response: &Challenge) -> bool {
        self.encrypt(challenge).ct_eq(response).into()
    }

    /// Encrypts as "VNC Authentication" (RFC 6143, 7.2.2) does: DES of both halves, with the bits of each byte of the
    /// key reversed.
    pub(super) fn encrypt(&self, challenge: &Challenge) -> Challenge {
        let key = Des::new(&self.0.map(u8::reverse_bits).into());
        let mut response = *challenge;
        for half in response.chunks_exact_mut(8) {
            let mut block = [0; 8];
            block.copy_from_slice(half);
            let mut block = block.into();
            key.encrypt_block(&mut block);
            half.copy_from_slice(&block);
        }
        response
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_encrypted_as_viewers_do() {
        // The output of Perl's Crypt::DES for the bytes 0 to 15, with the bits of each byte of "hunter2x" reversed.
        let expected =
            [0x23, 0xc4, 0x81, 0x08, 0x42, 0xc0, 0x39, 0x94, 0xab, 0x49, 0x6f, 0xc4, 0x67, 0x5c, 0xf3, 0xdc];
        let (password, challenge) = (Password(*b"hunter2x"), std::array::from_fn(|at| at as u8));
        assert_eq!(password.encrypt(&challenge), expected);
        assert!(password.is_proof(&challenge, &expected));
        assert!(!Password(*b"hunter2y").is_proof(&challenge, &expected));
    }

    #[test]
    fn passwords_differ_and_are_not_shown() {
        let (one, two) = (Password::new(), Password::new());
        assert_ne!(one.as_text(), two.as_text());
        assert_eq!((one.as_text().len(), format!("{one:?}")), (8, "***".to_owned()));
    }
}
