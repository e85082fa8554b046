//! The console on a machine of the memory backend whose keyboard and display are as slow and unreliable as real ones
//! can be: nothing is lost, nothing is typed twice, and no key stays down.
#![allow(clippy::unwrap_used, missing_docs)]

use rudder_core::{
    ErrorKind,
    backend::{Backend as _, Lab, LabSpec, Machine, MachineSpec},
    console::Console,
    keys::named_key,
    memory::{Guest, MemoryBackend, Typed},
    plan::PlannedNetwork,
};
use std::{sync::Arc, time::Duration};
use tokio::time::{sleep, timeout};

const NO_KEYS: [u32; 0] = [];
const TEXT: &str = "Typed on, or not: 42";

fn key(name: &str) -> u32 {
    named_key(name).unwrap()
}

struct Rig {
    backend: MemoryBackend,
    lab: Arc<dyn Lab>,
    machine: Arc<dyn Machine>,
    console: Console,
}

impl Rig {
    async fn new(script: impl FnOnce(Guest) -> Guest) -> Self {
        let backend = MemoryBackend::new().machine("web", script);
        let network = PlannedNetwork::default();
        let lab = backend.open_lab(&LabSpec::new("console", network)).await.unwrap();
        let machine = lab.create_machine(&MachineSpec::new("web", 1, 1 << 30)).await.unwrap();
        machine.start().await.unwrap();
        Self { backend, lab, console: Console::new(machine.clone()), machine }
    }

    /// Returns what the keyboard received, after the guest has read all of it.
    async fn typed(&self) -> Typed {
        sleep(Duration::from_secs(5)).await;
        self.backend.typed("web").unwrap()
    }

    /// Returns the keys that are still down after the console was dropped.
    async fn held_at_the_end(self) -> Vec<u32> {
        drop(self.console);
        sleep(Duration::from_secs(5)).await;
        let held = self.backend.typed("web").unwrap().held;
        drop(self.machine);
        self.lab.destroy().await.unwrap();
        assert_eq!(self.backend.leftovers().await, Vec::<String>::new());
        held
    }
}

/// Returns `count` printable ASCII characters, in lines.
fn printable(count: usize) -> String {
    let all: Vec<char> = (' '..='~').cycle().take(count).collect();
    all.chunks(70).map(|line| format!("{}\n", line.iter().collect::<String>())).collect()
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_receives_every_character() {
    // The keyboard buffers 16 events. The guest takes about eight characters a second, then two.
    for (interval, count) in [(50, 190), (200, 95)] {
        let rig = Rig::new(|guest| guest.takes_keys_every(Duration::from_millis(interval))).await;
        let text = printable(count);
        rig.console.type_text(&text).await.unwrap();
        let typed = rig.typed().await;
        assert_eq!(typed.lines.join("\n") + "\n", text, "an event every {interval} ms");
        assert_eq!((typed.prompt.as_str(), typed.keys.len()), ("", 0));
        assert_eq!(rig.held_at_the_end().await, NO_KEYS);
    }
}

#[tokio::test(start_paused = true)]
async fn text_that_is_not_echoed_arrives() {
    let rig = Rig::new(|guest| guest.hides_typing().takes_keys_every(Duration::from_millis(40))).await;
    rig.console.type_text("Correct Horse Battery Staple\n").await.unwrap();
    assert_eq!(rig.typed().await.lines, ["Correct Horse Battery Staple"]);
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_line_appears_on_the_screen() {
    let script = |guest: Guest| guest.screen("Welcome\nboot:").on_line("linux", "Loading linux...\nready");
    let rig = Rig::new(script).await;
    rig.console.wait_text("boot:", Duration::from_secs(1)).await.unwrap();
    rig.console.type_text("linux\n").await.unwrap();
    let screen = rig.console.wait_text("ready", Duration::from_secs(1)).await.unwrap();
    let lines: Vec<_> = screen.lines().take(6).collect();
    assert_eq!(lines, ["Welcome", "boot:", "> linux", "Loading linux...", "ready", ">"]);
    assert!(rig.console.screenshot().await.unwrap().starts_with(b"\x89PNG"));

    let error = rig.console.wait_text("login:", Duration::from_secs(90)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("within 90 s, but it shows:\nWelcome\nboot:\n> linux\n"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_character_without_a_key_is_refused_before_anything_is_typed() {
    let rig = Rig::new(|guest| guest).await;
    assert_eq!(rig.console.type_text("naïve").await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(rig.typed().await, Typed::default());
}

#[tokio::test(start_paused = true)]
async fn concurrent_callers_do_not_interleave_keys() {
    let rig = Rig::new(|guest| guest.takes_keys_every(Duration::from_millis(10))).await;
    let (one, two) =
        tokio::join!(rig.console.type_text("first line\n"), rig.console.type_text("SECOND LINE\n"));
    one.and(two).unwrap();
    assert_eq!(rig.typed().await.lines, ["first line", "SECOND LINE"]);
}

/// Types `TEXT` again and again, with the connection breaking after 1 key, after `1 + every` keys and so on; returns
/// how often all of it was typed.
async fn interrupted(every: usize, script: impl Fn(Guest) -> Guest) -> usize {
    let mut whole = 0;
    for breaks in (1..=TEXT.len()).step_by(every) {
        let rig = Rig::new(|guest| script(guest).breaks_display_after(breaks as u32)).await;
        let result = rig.console.type_text(TEXT).await;
        let typed = rig.typed().await;
        match result {
            Ok(()) => {
                assert_eq!(typed.prompt, TEXT, "broken after {breaks} keys");
                whole += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
                assert!(TEXT.starts_with(&typed.prompt), "broken after {breaks} keys: {typed:?}");
            }
        }
        assert_eq!((typed.held.len(), typed.keys.len()), (0, 0), "broken after {breaks} keys");
        // Whether or not typing failed, the keyboard still works.
        rig.console.type_text("\nx").await.unwrap();
        assert_eq!(rig.typed().await.prompt, "x");
        assert_eq!(rig.held_at_the_end().await, NO_KEYS);
    }
    whole
}

#[tokio::test(start_paused = true)]
async fn nothing_is_typed_twice_over_a_lost_connection() {
    // If the screen shows that the last key before the break arrived, typing continues.
    assert!(interrupted(1, |guest| guest).await >= 4);
    // Also if the guest reads it later.
    assert!(interrupted(2, |guest| guest.takes_keys_every(Duration::from_millis(30))).await >= 1);
    // Without an echo it is unknown what arrived: typing may fail.
    interrupted(4, Guest::hides_typing).await;
}

#[tokio::test(start_paused = true)]
async fn typing_on_an_ended_display_fails() {
    // Shift counts as a key.
    let rig = Rig::new(|guest| guest.loses_display_after(10)).await;
    let error = rig.console.type_text(TEXT).await.unwrap_err();
    assert!(error.to_string().contains("display"), "{error}");
    assert_eq!(rig.typed().await.prompt, "Typed on,");
    assert!(rig.console.text().await.is_err());
    assert!(rig.console.wait_text("Typed", Duration::from_secs(60)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn held_keys_are_released_when_the_console_is_dropped() {
    let rig = Rig::new(|guest| guest).await;
    rig.console.hold(key("leftCtrl")).await.unwrap();
    rig.console.hold(key("leftAlt")).await.unwrap();
    assert_eq!(rig.typed().await.held, [key("leftCtrl"), key("leftAlt")]);
    rig.console.press(key("f2")).await.unwrap();
    assert_eq!(rig.typed().await.keys, [key("leftCtrl"), key("leftAlt"), key("f2")]);
    assert_eq!(rig.held_at_the_end().await, NO_KEYS);

    let rig = Rig::new(|guest| guest).await;
    rig.console.hold(key("leftCtrl")).await.unwrap();
    rig.console.hold(u32::from('a')).await.unwrap();
    rig.console.release_all().await.unwrap();
    assert_eq!(rig.typed().await.held, NO_KEYS);
}

#[tokio::test(start_paused = true)]
async fn held_keys_are_released_when_typing_fails() {
    // The screen shows nothing, and the fourth key is the last that arrives: whether the others arrived is unknown.
    let rig = Rig::new(|guest| guest.hides_typing().breaks_display_after(4)).await;
    rig.console.hold(key("leftAlt")).await.unwrap();
    rig.console.hold(u32::from('q')).await.unwrap();
    rig.console.type_text("abcd").await.unwrap_err();
    assert_eq!(rig.typed().await.held, NO_KEYS);
    rig.console.press(key("enter")).await.unwrap();
    assert_eq!(rig.typed().await.lines, [""]);
}

#[tokio::test(start_paused = true)]
async fn a_held_modifier_survives_a_lost_connection() {
    let rig = Rig::new(|guest| guest.breaks_display_after(2)).await;
    rig.console.hold(key("leftCtrl")).await.unwrap();
    // The connection breaks with this key; it is unknown whether it arrived.
    rig.console.hold(key("leftAlt")).await.unwrap_err();
    assert_eq!(rig.typed().await.held, NO_KEYS);

    let rig = Rig::new(|guest| guest.breaks_display_after(2)).await;
    rig.console.hold(key("leftCtrl")).await.unwrap();
    rig.console.type_text("\n").await.unwrap_err();
    assert_eq!(rig.typed().await.held, NO_KEYS);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_call_leaves_no_key_down() {
    for millis in (0..1200).step_by(97) {
        let rig = Rig::new(|guest| guest.takes_keys_every(Duration::from_millis(15))).await;
        let cut = timeout(Duration::from_millis(millis), rig.console.type_text(TEXT)).await.is_err();
        let typed = rig.typed().await;
        assert!(TEXT.starts_with(&typed.prompt) && typed.held.is_empty(), "{typed:?} after {millis} ms");
        assert!(cut || typed.prompt == TEXT);
        rig.console.type_text("\nnext\n").await.unwrap();
        assert_eq!(rig.typed().await.lines, [typed.prompt.as_str(), "next"]);
        assert_eq!(rig.held_at_the_end().await, NO_KEYS);
    }
}
