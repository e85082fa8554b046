//! Typing: as fast as the guest takes it, and nothing twice.
//!
//! **Pace.** Keyboards have small memories (a PS/2 keyboard of QEMU keeps 16 bytes, a BIOS 15 keys) and forget what comes
//! when they are full, and no protocol tells how full they are. So keys go out in bursts of half of that, and the next burst
//! waits until the screen shows what the last one typed. Where nothing is echoed (a password, a menu) it waits a while
//! instead; longer where the screen answered before, or begins to, since then the guest is only busy.
//!
//! **A connection that breaks.** Key events are handed to one connection and never sent again. When the server told that it
//! has them, or the screen, read as text, shows every character, typing goes on over a new connection; when that cannot be
//! known it fails, so that a text is typed as a whole or an error.

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

/// Bytes of a PS/2 keyboard's queue that a burst may take: twice as many fit, so that one burst may be left in it.
const BURST: usize = 8;
/// How long an echo is waited for where none came before. That is about as slow as others type always.
const SILENT: Duration = Duration::from_millis(700);
/// How long it is waited for where nothing is known yet.
const UNKNOWN: Duration = Duration::from_secs(2);
/// How long it is waited for where the screen answered before, or has begun to.
const ECHOING: Duration = Duration::from_secs(6);
/// How long a key that is no character may take to show on the screen.
const PRESSED: Duration = Duration::from_millis(150);
/// How long the screen must stand still after something else than an echo was drawn. A server that draws thirty times a
/// second has had its turn then.
const STILL: Duration = Duration::from_millis(70);
/// How long a screen that moves all the time holds up a burst.
const RESTLESS: Duration = Duration::from_millis(500);
/// When the server is asked for a sign of life, where the screen gives none.
const PROBE: Duration = Duration::from_millis(100);
/// How long it may take to give one.
const DELIVERY: Duration = Duration::from_secs(10);
/// How often a burst is tried on a new connection, of which nothing was written.
const TRIES: usize = 3;

/// What is remembered between keys.
#[derive(Debug, Default)]
pub(super) struct Keyboard {
    /// The keys that a caller holds.
    held: Vec<u32>,
    /// The keys that were sent last.
    last: Vec<u32>,
    /// The connection that they were sent on.
    link: Option<u64>,
    /// Whether the screen showed what was typed last.
    echoes: Option<bool>,
}

/// Keys that are sent together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Burst {
    events: Vec<KeyEvent>,
    /// The characters of the text.
    text: String,
    /// How many cells the echo spans, from the first to the last character that is not blank; `None` when only the guest
    /// knows what the keys do.
    span: Option<usize>,
    /// How long the screen may take to answer keys of which only the guest knows what they do.
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

/// Shift, Ctrl, Lock, Meta, Alt, Super and Hyper, left and right.
fn is_modifier(keysym: u32) -> bool {
    (0xffe1..=0xffee).contains(&keysym)
}

/// Cuts a text into bursts, none of which ends with a blank after something else: the last character shows on the screen.
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
        let mut count = longest(rest);
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

/// How many strokes fit into a burst. What newlines and tabs do is known to the guest alone, so they come alone.
fn longest(strokes: &[(char, Stroke)]) -> usize {
    let (mut bytes, mut shifted) = (0, false);
    let mut count = 0;
    for (character, stroke) in strokes {
        bytes += 2 + usize::from(stroke.shift != shifted);
        shifted = stroke.shift;
        if count > 0 && (character.is_control() || bytes + usize::from(shifted) > BURST) {
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
        patience: SILENT,
    }
}

impl Console {
    /// Types a text as on a US keyboard, newlines as Enter. Returns when the guest has taken it, as far as the screen tells;
    /// keys of several callers do not mix.
    ///
    /// Nothing is typed twice. When the future is dropped, typing stops between two characters, and no key stays down.
    ///
    /// # Errors
    /// `InvalidInput` for a character that a US keyboard does not have, before anything is typed. `Protocol` when the
    /// connection to the display broke, and either could not be made again or nobody can know how much was typed. Keys that
    /// were [held](Self::hold) are released then.
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

    /// Presses and releases a key, by its X11 keysym.
    ///
    /// # Errors
    /// As of [`type_text`](Self::type_text).
    pub async fn press(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        self.play(&mut keyboard, &Burst::keys(vec![down(keysym), up(keysym)], PRESSED)).await
    }

    /// Presses a key and holds it until [`release`](Self::release), an error of the keyboard, or the end of the console.
    ///
    /// When a connection breaks, the next one holds Shift, Ctrl, Alt and Super again, and lets other keys go.
    ///
    /// # Errors
    /// As of [`type_text`](Self::type_text).
    pub async fn hold(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        self.play(&mut keyboard, &Burst::keys(vec![down(keysym)], Duration::ZERO)).await?;
        keyboard.held.push(keysym);
        Ok(())
    }

    /// Releases a key.
    ///
    /// # Errors
    /// As of [`type_text`](Self::type_text).
    pub async fn release(&self, keysym: u32) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        keyboard.held.retain(|other| *other != keysym);
        self.play(&mut keyboard, &Burst::keys(vec![up(keysym)], Duration::ZERO)).await
    }

    /// Releases every key that is held.
    ///
    /// # Errors
    /// As of [`type_text`](Self::type_text).
    pub async fn release_all(&self) -> Result<()> {
        let mut keyboard = self.keyboard.lock().await;
        let held = std::mem::take(&mut keyboard.held);
        if held.is_empty() {
            return Ok(());
        }
        let events = held.into_iter().rev().map(up).collect();
        self.play(&mut keyboard, &Burst::keys(events, Duration::ZERO)).await
    }

    /// Sends a burst and waits until the guest took it. After an error nothing is held.
    async fn play(&self, keyboard: &mut Keyboard, burst: &Burst) -> Result<()> {
        let played = self.send_and_wait(keyboard, burst).await;
        if played.is_err() {
            let held = std::mem::take(&mut keyboard.held);
            // On a connection that lives, or on none: that is the end of what was pressed, too.
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
                Sent::Not if tries < TRIES => tries += 1,
                Sent::Not => return link.check(),
                Sent::Written | Sent::Unknown => return self.taken(keyboard, burst, link, &before).await,
            }
        }
    }

    /// The connection. On a new one, what was pressed on the last is released, and what is held is held.
    async fn ready(&self, keyboard: &mut Keyboard) -> Result<Arc<Link>> {
        let link = self.link().await?;
        if keyboard.link.replace(link.number()).is_some_and(|last| last != link.number()) {
            let (modifiers, others): (Vec<_>, Vec<_>) =
                keyboard.held.iter().partition(|keysym| is_modifier(**keysym));
            let released = others.into_iter().chain(keyboard.last.iter().copied());
            let released = released.filter(|keysym| !modifiers.contains(keysym)).map(up);
            // A modifier that is pressed twice is pressed; another key would be typed again.
            let events: Vec<_> = released.chain(modifiers.iter().copied().map(down)).collect();
            if !events.is_empty() {
                link.send(events).await;
            }
            keyboard.held = modifiers;
        }
        Ok(link)
    }

    /// Waits until the screen shows that the guest took a burst; where it does not tell, until the server has it and the
    /// guest had its time.
    async fn taken(
        &self,
        keyboard: &mut Keyboard,
        burst: &Burst,
        mut link: Arc<Link>,
        before: &Framebuffer,
    ) -> Result<()> {
        let mut patience = match (burst.span, keyboard.echoes) {
            (None, _) => burst.patience,
            (Some(_), None) => UNKNOWN,
            (Some(_), Some(true)) => ECHOING,
            (Some(_), Some(false)) => SILENT,
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
                    (Echo::Part, Some(_)) => patience = ECHOING,
                    (Echo::All, Some(span)) if broke.is_none() => {
                        if span > 1 {
                            keyboard.echoes = Some(true);
                        }
                        return Ok(());
                    }
                    // How much of it arrived is asked now, not only whether the guest is ready for more.
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
                // The screen may still tell.
                link = self.ready(keyboard).await?;
                progress = link.progress();
                (seen, changed, sent) = (None, None, Instant::now());
                continue;
            }
            let until = changed.map_or(sent + patience, |at| (at + STILL).min(sent + RESTLESS));
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
                if now >= sent + DELIVERY {
                    let message = "expected the display to answer within 10 s, but it did not";
                    return Err(Error::new(ErrorKind::TimedOut, message));
                }
            }
            let probe = if changed.is_some() { sent } else { sent + PROBE.min(patience) };
            if now >= probe {
                delivery.ask(&link, state.updates);
            }
            let wakes = [probe, until, sent + DELIVERY].into_iter().filter(|at| *at > now);
            // Who is gone has told that it ended.
            let _ = timeout_at(wakes.min().unwrap_or(sent + DELIVERY), progress.changed()).await;
        }
    }
}

fn lost(error: &Arc<Error>) -> Error {
    let message = "the connection to the display broke while keys were on their way, and the screen does not tell whether the guest got them";
    Error::new(ErrorKind::Protocol, message)
        .with_source(error.clone())
        .with_help("nothing is typed twice, so typing has to begin anew from a place that the guest knows")
}

/// Whether a server has read what was sent.
///
/// A request for a pixel is answered after everything that was sent before it. But the answer to an earlier request may
/// be on its way: only the second update after asking is certain to come later than the question.
#[derive(Debug, Default)]
struct Delivery {
    questions: u8,
    /// The updates that had come when the last question was asked.
    updates: u64,
    answers: u8,
}

impl Delivery {
    fn heard(&mut self, updates: u64) {
        if self.questions > self.answers && updates > self.updates {
            self.answers += 1;
        }
    }

    fn is_sure(&self) -> bool {
        self.answers == 2
    }

    fn ask(&mut self, link: &Link, updates: u64) {
        if self.questions == self.answers && self.questions < 2 {
            self.questions += 1;
            self.updates = updates;
            link.probe();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What a PS/2 keyboard and its user make of events.
    fn typed(bursts: &[Burst]) -> String {
        let mut text = String::new();
        for burst in bursts {
            assert!(burst.events.len() <= BURST);
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
    fn bursts_are_the_text_and_fit_the_queue() {
        for text in ["", "a", "hello WORLD  \n\tx", "    ", "~!@#$%^&*()_+{}|:\"<>?", "aBcDeF gH\n\n"] {
            assert_eq!(typed(&bursts(text).unwrap()), text);
        }
        let all: String = (' '..='~').chain(['\n']).cycle().take(2000).collect();
        assert_eq!(typed(&bursts(&all).unwrap()), all);
        assert_eq!(bursts("naïve").unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn no_burst_ends_with_a_blank_that_hides() {
        let cut = bursts("ab  cd e\nx").unwrap();
        let spans: Vec<_> = cut.iter().map(|burst| (burst.text.len(), burst.span)).collect();
        assert_eq!(spans, [(2, Some(2)), (4, Some(2)), (2, Some(1)), (1, None), (1, Some(1))]);
    }
}
