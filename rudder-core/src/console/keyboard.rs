//! Typing at the speed of the guest, without ever sending a key twice.
//!
//! **Pace.** Keyboards have small buffers (a PS/2 keyboard of QEMU keeps 16 bytes, a BIOS 15 keys) and drop whatever
//! arrives when they are full, and no protocol reports how full they are. So keys are sent in bursts of half that size,
//! and the next burst waits until the screen shows what the last one typed. Where nothing is echoed (a password, a
//! menu), it waits for a fixed time instead, and for longer if the screen echoed earlier keys or has begun to echo,
//! since the guest is then only busy.
//!
//! **A connection that breaks.** Key events are handed to one connection and never sent again. If the server has
//! confirmed that it received them, or the screen, read as text, shows every character, typing continues over a new
//! connection. If neither can be established, it fails, so that a text is either typed completely or an error is
//! returned.

use super::{
    Console, Framebuffer,
    echo::{self, Echo},
    link::{KeyEvent, Link, Sent},
};
use crate::{
    Error, ErrorKind, Result,
    keys::{SHIFT_LEFT, Stroke, us_stroke},
};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, timeout_at};

/// Bytes of a PS/2 keyboard's queue that a burst may use: half of the queue, so that one burst may still be in it.
const BURST_BYTES: usize = 8;
/// How long to wait for an echo where earlier keys were not echoed. That is about as slow as other tools always type.
const SILENT_WAIT: Duration = Duration::from_millis(700);
/// How long to wait for an echo where it is not yet known whether keys are echoed.
const UNKNOWN_WAIT: Duration = Duration::from_secs(2);
/// How long to wait for an echo where earlier keys were echoed, or the echo has begun.
const ECHO_WAIT: Duration = Duration::from_secs(6);
/// How long a key that is not a character may take to have an effect on the screen.
const KEY_WAIT: Duration = Duration::from_millis(150);
/// How long the screen must remain unchanged after something other than an echo was drawn. A server that draws thirty
/// times a second has sent an update within that time.
const STILL_AFTER: Duration = Duration::from_millis(70);
/// How long a screen that changes all the time delays a burst.
const RESTLESS_LIMIT: Duration = Duration::from_millis(500);
/// When the server is probed if the screen shows no reaction.
const PROBE_AFTER: Duration = Duration::from_millis(100);
/// How long the server may take to answer a probe.
const DELIVERY_LIMIT: Duration = Duration::from_secs(10);
/// How often a burst of which nothing was written is sent again on a new connection.
const MAX_SENDS: usize = 3;

/// State that is kept between keys.
#[derive(Debug, Default)]
pub(super) struct Keyboard {
    /// The keys that a caller holds down.
    held: Vec<u32>,
    /// The keys that were sent last.
    last: Vec<u32>,
    /// The connection on which they were sent.
    link: Option<u64>,
    /// Whether the screen echoed what was typed last; `None` while unknown.
    echoes: Option<bool>,
}

/// Keys that are sent together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Burst {
    events: Vec<KeyEvent>,
    /// The characters of the text; empty for other keys.
    text: String,
    /// Width of the echo in cells, from the first to the last visible character; `None` when only the guest knows what
    /// the keys do.
    span: Option<usize>,
    /// How long the screen may take to react to keys whose effect only the guest knows.
    patience: Duration,
}

impl Burst {
    fn keys(events: Vec<KeyEvent>, patience: Duration) -> Self {
        Self { events, text: String::new(), span: None, patience }
    }
}

fn down(keysym: u32) -> KeyEvent {
    KeyEvent { keysym, down: true }
}

fn up(keysym: u32) -> KeyEvent {
    KeyEvent { keysym, down: false }
}

/// Whether a key is Shift, Ctrl, Lock, Meta, Alt, Super or Hyper, left or right.
fn is_modifier(keysym: u32) -> bool {
    (0xffe1..=0xffee).contains(&keysym)
}

/// Splits a text into bursts. No burst ends with a space unless it consists of spaces, so that its last character is
/// visible on the screen.
///
/// # Errors
/// `InvalidInput` for a character that a US keyboard does not have.
fn bursts(text: &str) -> Result<Vec<Burst>> {
    let mut strokes = Vec::new();
    for character in text.chars() {
        let stroke = us_stroke(character).ok_or_else(|| {
            let message = format!("expected characters of a US keyboard, but found {character:?}");
            Error::new(ErrorKind::InvalidInput, message)
        })?;
        strokes.push((character, stroke));
    }
    let mut bursts = Vec::new();
    let mut rest = strokes.as_slice();
    while !rest.is_empty() {
        let mut count = longest_burst(rest);
        let blank = |(character, _): &(char, Stroke)| *character == ' ';
        if let Some(last) = rest[..count].iter().rposition(|stroke| !blank(stroke)) {
            count = last + 1;
        }
        let (now, later) = rest.split_at(count);
        bursts.push(burst(now));
        rest = later;
    }
    Ok(bursts)
}

/// Returns how many strokes fit into a burst. The effect of newlines and tabs is known only to the guest, so each is a
/// burst of its own.
fn longest_burst(strokes: &[(char, Stroke)]) -> usize {
    let (mut bytes, mut shifted) = (0, false);
    let mut count = 0;
    for (character, stroke) in strokes {
        bytes += 2 + usize::from(stroke.shift != shifted);
        shifted = stroke.shift;
        if count > 0 && (character.is_control() || bytes + usize::from(shifted) > BURST_BYTES) {
            break;
        }
        count += 1;
        if character.is_control() {
            break;
        }
    }
    count
}

fn burst(strokes: &[(char, Stroke)]) -> Burst {
    let mut events = Vec::new();
    let mut shifted = false;
    for (_, stroke) in strokes {
        if stroke.shift != shifted {
            events.push(KeyEvent { keysym: SHIFT_LEFT, down: stroke.shift });
            shifted = stroke.shift;
        }
        events.extend([down(stroke.keysym), up(stroke.keysym)]);
    }
    if shifted {
        events.push(up(SHIFT_LEFT));
    }
    let shows = |(character, _): &(char, Stroke)| *character > ' ';
    let span = strokes.iter().position(shows).zip(strokes.iter().rposition(shows));
    Burst {
        events,
        text: strokes.iter().map(|(character, _)| character).collect(),
        span: span.map(|(first, last)| last + 1 - first),
        patience: SILENT_WAIT,
    }
}

impl Console {
    /// Types a text as on a US keyboard, with Enter for newlines. Returns when the guest has taken it, as far as the
    /// screen shows; keys of concurrent callers are not interleaved.
    ///
    /// Nothing is typed twice. If the future is dropped, typing stops between two characters, and no key stays down.
    ///
    /// # Errors
    /// `InvalidInput` for a character that a US keyboard does not have, before anything is typed. `Protocol` when the
    /// connection to the display broke and either could not be made again or it cannot be determined how much was
    /// typed. Keys that were [held](Self::hold) are released in that case.
    pub async fn type_text(&self, text: &str) -> Result<()> {
        let bursts = bursts(text)?;
        let mut keyboard = self.keyboard.lock().await;
        let mut typed = 0;
        for burst in bursts {
            if let Err(error) = self.play(&mut keyboard, &burst).await {
                let all = text.chars().count();
                return Err(error.with_context("typed for certain", format!("{typed} of {all} characters")));
            }
            typed += burst.text.chars().count();
        }
        Ok(())
    }

    /// Presses and releases a key, given by its X11 keysym.
    ///
    /// # Errors
    /// The same errors as [`type_text`](Self::type_text).
    pub async fn press(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        self.play(&mut keyboard, &Burst::keys(vec![down(keysym), up(keysym)], KEY_WAIT)).await
    }

    /// Presses a key and holds it until [`release`](Self::release), an error of the keyboard, or the end of the
    /// console.
    ///
    /// When a connection breaks, Shift, Ctrl, Alt and Super are pressed again on the next one, and other keys are
    /// released.
    ///
    /// # Errors
    /// The same errors as [`type_text`](Self::type_text).
    pub async fn hold(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        self.play(&mut keyboard, &Burst::keys(vec![down(keysym)], Duration::ZERO)).await?;
        keyboard.held.push(keysym);
        Ok(())
    }

    /// Releases a key.
    ///
    /// # Errors
    /// The same errors as [`type_text`](Self::type_text).
    pub async fn release(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        keyboard.held.retain(|other| *other != keysym);
        self.play(&mut keyboard, &Burst::keys(vec![up(keysym)], Duration::ZERO)).await
    }

    /// Releases every key that is held.
    ///
    /// # Errors
    /// The same errors as [`type_text`](Self::type_text).
    pub async fn release_all(&self) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        let held = std::mem::take(&mut keyboard.held);
        if held.is_empty() {
            return Ok(());
        }
        let events = held.into_iter().rev().map(up).collect();
        self.play(&mut keyboard, &Burst::keys(events, Duration::ZERO)).await
    }

    /// Sends a burst and waits until the guest has taken it. After an error, no key is held.
    async fn play(&self, keyboard: &mut Keyboard, burst: &Burst) -> Result<()> {
        let played = self.send_and_wait(keyboard, burst).await;
        if played.is_err() {
            let held = std::mem::take(&mut keyboard.held);
            // Only on a connection that still works: without one, nothing is pressed any more.
            if let Some(link) = self.living_link().await {
                link.send(held.into_iter().chain(keyboard.last.drain(..)).map(up).collect()).await;
            }
        }
        played
    }

    async fn send_and_wait(&self, keyboard: &mut Keyboard, burst: &Burst) -> Result<()> {
        let mut tries = 0;
        loop {
            let link = self.ready(keyboard).await?;
            let before = link.frame();
            keyboard.last = burst.events.iter().map(|event| event.keysym).collect();
            keyboard.last.dedup();
            match link.send(burst.events.clone()).await {
                Sent::Not if tries < MAX_SENDS => tries += 1,
                Sent::Not => return link.check(),
                Sent::Written | Sent::Unknown => {
                    return self.wait_until_taken(keyboard, burst, link, &before).await;
                }
            }
        }
    }

    /// Returns a working connection. On a new one, keys that were pressed on the last are released, and held modifiers
    /// are pressed again.
    async fn ready(&self, keyboard: &mut Keyboard) -> Result<Arc<Link>> {
        let link = self.link().await?;
        if keyboard.link.replace(link.number()).is_some_and(|last| last != link.number()) {
            let (modifiers, others): (Vec<_>, Vec<_>) =
                keyboard.held.iter().partition(|keysym| is_modifier(**keysym));
            let released = others.into_iter().chain(keyboard.last.iter().copied());
            let released = released.filter(|keysym| !modifiers.contains(keysym)).map(up);
            // Pressing a modifier twice is harmless; any other key would be typed again.
            let events: Vec<_> = released.chain(modifiers.iter().copied().map(down)).collect();
            if !events.is_empty() {
                link.send(events).await;
            }
            keyboard.held = modifiers;
        }
        Ok(link)
    }

    /// Waits until the screen shows that the guest took a burst. If the screen does not show it, waits until the server
    /// has confirmed the burst and the guest has had time to process it.
    async fn wait_until_taken(
        &self,
        keyboard: &mut Keyboard,
        burst: &Burst,
        mut link: Arc<Link>,
        before: &Framebuffer,
    ) -> Result<()> {
        let mut patience = match (burst.span, keyboard.echoes) {
            (None, _) => burst.patience,
            (Some(_), None) => UNKNOWN_WAIT,
            (Some(_), Some(true)) => ECHO_WAIT,
            (Some(_), Some(false)) => SILENT_WAIT,
        };
        let mut sent = Instant::now();
        let mut progress = link.progress();
        let mut delivery = Delivery::default();
        let (mut seen, mut changed, mut broke) = (None, None, None);
        loop {
            let state = progress.borrow_and_update().clone();
            let now = Instant::now();
            if seen.replace(state.changes) != Some(state.changes) {
                let echo = link.with_frame(|frame| echo::compare(before, frame, burst.span.unwrap_or(1)));
                match (echo, burst.span) {
                    (Echo::Nothing | Echo::Cell, Some(_)) | (Echo::Nothing, None) => {}
                    (Echo::Part, Some(_)) => patience = ECHO_WAIT,
                    (Echo::All, Some(span)) if broke.is_none() => {
                        if span > 1 {
                            keyboard.echoes = Some(true);
                        }
                        return Ok(());
                    }
                    // After a break, the question is how much of the burst arrived, not only whether the guest is ready
                    // for more.
                    (Echo::All, Some(_)) => {
                        if link.with_frame(|frame| echo::reads(before, frame, &burst.text)) {
                            return Ok(());
                        }
                    }
                    (Echo::Other, _) | (_, None) => changed = Some(now),
                }
            }
            delivery.heard(state.updates);
            if let Some(error) = state.ended {
                match broke {
                    _ if delivery.is_sure() => return Ok(()),
                    Some(error) => return Err(lost(&error)),
                    None => broke = Some(error),
                }
                // The screen may still show what arrived.
                link = self.ready(keyboard).await?;
                progress = link.progress();
                (seen, changed, sent) = (None, None, Instant::now());
                continue;
            }
            let until = changed.map_or(sent + patience, |at| (at + STILL_AFTER).min(sent + RESTLESS_LIMIT));
            if now >= until {
                if let Some(error) = broke {
                    return Err(lost(&error));
                }
                if delivery.is_sure() {
                    if changed.is_none() && burst.span.is_some() {
                        keyboard.echoes = Some(false);
                    }
                    return Ok(());
                }
                if now >= sent + DELIVERY_LIMIT {
                    let message = "expected the display to answer within 10 s, but it did not";
                    return Err(Error::new(ErrorKind::TimedOut, message));
                }
            }
            let probe = if changed.is_some() { sent } else { sent + PROBE_AFTER.min(patience) };
            if now >= probe {
                delivery.ask(&link, state.updates);
            }
            let wakes = [probe, until, sent + DELIVERY_LIMIT].into_iter().filter(|at| *at > now);
            // A link that is gone has already reported its end.
            let _ = timeout_at(wakes.min().unwrap_or(sent + DELIVERY_LIMIT), progress.changed()).await;
        }
    }
}

fn lost(error: &Arc<Error>) -> Error {
    let message = "the connection to the display broke while keys were in transit, and the screen does not \
         show whether the guest received them";
    Error::new(ErrorKind::Protocol, message)
        .with_source(error.clone())
        .with_help("bring the guest into a known state and type again from there: nothing is typed twice")
}

/// Determines whether a server has read what was sent.
///
/// A request for a pixel is answered after everything that was sent before it. But the answer to an earlier request may
/// still be in transit: only the second update after the request certainly follows it.
#[derive(Debug, Default)]
struct Delivery {
    requests: u8,
    /// The number of updates received when the last request was sent.
    updates: u64,
    answers: u8,
}

impl Delivery {
    fn heard(&mut self, updates: u64) {
        if self.requests > self.answers && updates > self.updates {
            self.answers += 1;
        }
    }

    fn is_sure(&self) -> bool {
        self.answers == 2
    }

    fn ask(&mut self, link: &Link, updates: u64) {
        if self.requests == self.answers && self.requests < 2 {
            self.requests += 1;
            self.updates = updates;
            link.probe();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Returns the text that a PS/2 keyboard produces from the events.
    fn typed(bursts: &[Burst]) -> String {
        let mut text = String::new();
        for burst in bursts {
            assert!(burst.events.len() <= BURST_BYTES);
            let mut held = Vec::new();
            for event in &burst.events {
                if event.down {
                    if event.keysym != SHIFT_LEFT {
                        let character = match event.keysym {
                            0xff0d => '\n',
                            0xff09 => '\t',
                            keysym => char::from_u32(keysym).unwrap(),
                        };
                        assert_eq!(us_stroke(character).unwrap().shift, held.contains(&SHIFT_LEFT));
                        text.push(character);
                    }
                    held.push(event.keysym);
                } else {
                    held.retain(|keysym| *keysym != event.keysym);
                }
            }
            assert_eq!(held, Vec::<u32>::new());
        }
        text
    }

    #[test]
    fn bursts_type_the_text_and_fit_the_queue() {
        for text in ["", "a", "hello WORLD  \n\tx", "    ", "~!@#$%^&*()_+{}|:\"<>?", "aBcDeF gH\n\n"] {
            assert_eq!(typed(&bursts(text).unwrap()), text);
        }
        let all: String = (' '..='~').chain(['\n']).cycle().take(2000).collect();
        assert_eq!(typed(&bursts(&all).unwrap()), all);
        assert_eq!(bursts("naïve").unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn no_burst_ends_with_an_invisible_space() {
        let cut = bursts("ab  cd e\nx").unwrap();
        let spans: Vec<_> = cut.iter().map(|burst| (burst.text.len(), burst.span)).collect();
        assert_eq!(spans, [(2, Some(2)), (4, Some(2)), (2, Some(1)), (1, None), (1, Some(1))]);
    }
}
