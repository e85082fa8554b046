//! The examples with streams that are closed, full or gone, and with signals: they cancel first, clean up, never panic,
//! and exit with a code that says what happened.

use crate::support::{Bench, example, tiny_manifest};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const QUICK: &str = "name: quick\nvms:\n  - name: vm\n    source: {url: 'https://images.example/a.qcow2', checksum: SUM}\n    \
                     resources: {cpu: 1, memory: 512Mi}\n    cloudInit: {}\n    provisioners:\n      \
                     - {type: shell, shell: {inline: 'echo said'}}\n";
/// Waits for a person until a signal arrives.
const PAUSES: &str = "      - {type: handbuild, handbuild: {instructions: wait for me}}\n";
const WRONG: &str = "name: wrong\nvms:\n  - name: vm\n    tmp: true\n";

fn quick() -> String {
    QUICK.replace("SUM", &"0".repeat(64))
}

fn pausing() -> String {
    quick() + PAUSES
}

/// Returns the command that runs `build` on the memory backend.
fn build(bench: &Bench, manifest: &str) -> Command {
    let mut command = Command::new(example("build"));
    let file = bench.write("manifest.yaml", manifest);
    command.args(["--backend", "memory", "--store"]).arg(bench.store()).arg(file);
    command.env("TMPDIR", bench.tmp()).stdin(Stdio::piped());
    command
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// Returns the writing end of a pipe without readers.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// Runs a command to completion, without input.
fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Reads standard error up to a line that contains a text.
fn until(child: &mut Child, text: &str) {
    let mut lines = BufReader::new(child.stderr.as_mut().unwrap());
    let mut output = String::new();
    while !output.contains(text) {
        assert!(lines.read_line(&mut output).unwrap() > 0, "ended before {text:?}:\n{output}");
    }
}

/// Asserts the exit code, and that no panic was reported.
#[track_caller]
fn expect(output: &Output, code: i32) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{:?}: {said}", output.status.signal());
    assert!(!said.contains("panicked"), "{said}");
}

#[track_caller]
fn expect_stderr(output: &Output, text: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(text), "expected {text:?}, but found:\n{said}");
}

/// Returns the last event of a JSON Lines text.
fn last_event(lines: &str) -> Value {
    serde_json::from_str(lines.lines().last().unwrap()).unwrap()
}

#[test]
fn a_build_whose_events_cannot_be_written_is_cancelled() {
    let bench = Bench::new();
    let written_to = |stdout: Stdio| {
        let mut command = build(&bench, &pausing());
        command.args(["--events", "json"]).stdout(stdout).stderr(Stdio::piped());
        // Its standard input stays open, so only the cancellation ends the pause.
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(input);
        output
    };
    let output = written_to(full().into());
    expect(&output, 1);
    expect_stderr(&output, "error: cannot write to standard output: No space left on device");
    expect_stderr(&output, "cancelled");
    let output = written_to(unread());
    expect(&output, 141);
    expect_stderr(&output, "cancelled");
    bench.expect_clean();
}

#[test]
fn a_reader_that_closes_after_one_line_ends_the_build() {
    let bench = Bench::new();
    let mut command = build(&bench, &pausing());
    let mut child =
        command.args(["--events", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut line, input) = (String::new(), child.stdin.take());
    BufReader::with_capacity(1, child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(last_event(&line)["event"], "build_started");
    expect(&child.wait_with_output().unwrap(), 141);
    drop(input);
    bench.expect_clean();
}

#[test]
fn a_build_does_not_need_standard_error() {
    for stderr in [Stdio::from(full()), unread()] {
        let bench = Bench::new();
        let output = run(build(&bench, &quick()).stderr(stderr).stdout(Stdio::piped()));
        expect(&output, 0);
        let path = String::from_utf8(output.stdout).unwrap();
        assert!(Path::new(path.trim()).is_file(), "{path}");
    }
}

#[test]
fn a_module_is_kept_although_its_path_cannot_be_written() {
    for (stdout, code) in [(Stdio::from(full()), 1), (unread(), 141)] {
        let bench = Bench::new();
        expect(&run(build(&bench, &quick()).stdout(stdout).stderr(Stdio::piped())), code);
        let modules = run(modules(&bench).arg("list"));
        assert!(String::from_utf8_lossy(&modules.stdout).contains("quick"));
    }
}

fn modules(bench: &Bench) -> Command {
    let mut command = Command::new(example("modules"));
    command.args(["--backend", "memory", "--store"]).arg(bench.store());
    command
}

fn validate(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = Command::new(example("validate"));
    command.args(arguments).arg(bench.write("wrong.yaml", WRONG));
    command
}

#[test]
fn modules_and_validate_report_failed_writes() {
    let bench = Bench::new();
    expect(&run(&mut build(&bench, &quick())), 0);
    for arguments in [&["list"][..], &["show", "quick"], &["show", "--json", "quick"], &["gc"]] {
        let output = run(modules(&bench).args(arguments).stdout(full()).stderr(Stdio::piped()));
        expect(&output, 1);
        expect_stderr(&output, "error: cannot write to standard output");
        expect(&run(modules(&bench).args(arguments).stdout(unread()).stderr(Stdio::piped())), 141);
        expect(&run(modules(&bench).args(arguments).stderr(full())), 0);
    }
    for stream in [Stdio::from(full()), unread()] {
        expect(&run(modules(&bench).args(["show", "none"]).stderr(stream)), 1);
    }
    let output = run(validate(&bench, &["--json"]).stdout(full()).stderr(Stdio::piped()));
    expect(&output, 2);
    expect_stderr(&output, "error: cannot write to standard output");
    expect(&run(validate(&bench, &["--json"]).stdout(unread()).stderr(Stdio::piped())), 141);
    expect(&run(validate(&bench, &["--json"]).stderr(full())), 1);
    expect(&run(validate(&bench, &[]).stderr(full())), 2);
    expect(&run(validate(&bench, &[]).stderr(unread())), 141);
    expect(&run(&mut validate(&bench, &[])), 1);
}

#[test]
fn programs_run_with_closed_streams() {
    let bench = Bench::new();
    let closed = |command: &Command, streams: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec \"$@\" {streams}"), "sh"]).arg(command.get_program());
        run(shell.args(command.get_args()).env("TMPDIR", bench.tmp()))
    };
    for streams in [">&-", "2>&-", "<&-", "<&- >&- 2>&-"] {
        expect(&closed(&build(&bench, &quick()), streams), 0);
        expect(&closed(build(&bench, &quick()).args(["--events", "json"]), streams), 0);
        expect(&closed(modules(&bench).arg("list"), streams), 0);
        expect(&closed(&validate(&bench, &[]), streams), 1);
    }
    bench.expect_clean();
}

#[test]
fn every_signal_cancels_the_build_and_cleans_up() {
    for kind in [Signal::INT, Signal::TERM, Signal::HUP] {
        let bench = Bench::new();
        let mut command = build(&bench, &pausing());
        let mut child =
            command.args(["--events", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until(&mut child, "press Enter");
        signal(&child, kind);
        let input = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(input);
        expect(&output, 130);
        expect_stderr(&output, "cancelled");
        let last = last_event(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(last["outcome"]["result"], "cancelled");
        bench.expect_clean();
    }
}

#[test]
fn a_signal_cancels_when_nothing_can_be_printed() {
    let bench = Bench::new();
    // Its standard error is gone by the time the signal arrives.
    let mut child = build(&bench, &pausing()).stdout(full()).stderr(Stdio::piped()).spawn().unwrap();
    until(&mut child, "press Enter");
    drop(child.stderr.take());
    signal(&child, Signal::INT);
    let input = child.stdin.take();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(input);
    bench.expect_clean();
}

#[test]
fn signals_end_a_build_whose_output_is_not_read() {
    let bench = Bench::new();
    // More events than a pipe holds.
    let lines = "      - {type: shell, shell: {inline: 'true'}}\n".repeat(500);
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = build(&bench, &(quick() + &lines + PAUSES));
    let mut child = command.args(["--events", "json"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    // Against a wait without end, should a build of this length ever print less.
    let deadline = Instant::now() + Duration::from_secs(300);
    // A pipe holds 16 pages; the last page may have space left into which the next line does not fit.
    while rustix::io::ioctl_fionread(&reader).unwrap() < 15 * 4096 {
        std::thread::sleep(Duration::from_millis(10));
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
    }
    signal(&child, Signal::INT);
    until(&mut child, "cancelling: ");
    signal(&child, Signal::INT);
    expect(&child.wait_with_output().unwrap(), 130);
    drop(reader);
    bench.expect_clean();
}

#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    let bench = Bench::new();
    let inner = build(&bench, &pausing());
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(inner.get_program()).args(inner.get_args());
    command.env("TMPDIR", bench.tmp()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    until(&mut child, "press Enter");
    signal(&child, Signal::HUP);
    writeln!(child.stdin.take().unwrap()).unwrap();
    expect(&child.wait_with_output().unwrap(), 0);
}

/// Runs the build on its own terminal, through script(1), and closes the terminal by killing script.
#[test]
fn a_terminal_that_is_closed_cancels_the_build() {
    for events in ["", "--events json"] {
        let bench = Bench::new();
        let inner = build(&bench, &pausing());
        let arguments: Vec<_> = inner.get_args().map(|word| word.to_str().unwrap()).collect();
        let program = inner.get_program().to_str().unwrap();
        let (code, events_path) = (bench.path("code"), bench.path("events"));
        let stdout = if events.is_empty() { String::new() } else { format!(" >{}", events_path.display()) };
        // The shell survives the signal and records the exit code of the build.
        let code_path = code.display();
        let line = format!(
            "trap : HUP; {program} {events} {}{stdout}; echo $? >{code_path}.new; mv {code_path}.new {code_path}",
            arguments.join(" "),
        );
        let mut command = Command::new("script");
        command.args(["-qefc", &line, "/dev/null"]).env("TMPDIR", bench.tmp()).env("SHELL", "/bin/sh");
        let mut terminal = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut screen = BufReader::new(terminal.stdout.take().unwrap());
        let mut output = Vec::new();
        while !String::from_utf8_lossy(&output).contains("press Enter") {
            let some = screen.fill_buf().unwrap();
            assert!(!some.is_empty(), "{}", String::from_utf8_lossy(&output));
            output.extend_from_slice(some);
            let length = some.len();
            screen.consume(length);
        }
        signal(&terminal, Signal::KILL);
        terminal.wait().unwrap();
        bench.expect_no_process_within(Duration::from_secs(60));
        assert_eq!(fs::read_to_string(&code).unwrap().trim(), "130");
        if !events.is_empty() {
            let last = last_event(&fs::read_to_string(events_path).unwrap());
            assert_eq!(last["outcome"]["result"], "cancelled");
        }
    }
}

/// Returns the command that runs the program of the README, on QEMU.
fn embed(bench: &Bench, manifest: &str) -> Command {
    let mut command = Command::new(example("embed"));
    command.arg(bench.write("manifest.yaml", manifest)).env("RUDDER_STORE", bench.store());
    command.env("TMPDIR", bench.tmp()).stdin(Stdio::null());
    command
}

#[test]
fn the_program_of_the_readme_renders_errors_and_warnings() {
    let bench = Bench::new();
    let output = run(&mut embed(&bench, "name: wrong\nvms:\n  - {name: vm, source: {url: 'file:a b'}}\n"));
    expect(&output, 1);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("Error: ") && said.contains("\nerror["), "{said}");
    assert!(said.contains("\n  |\n") && !said.contains("\\n"), "{said}");

    // A missing checksum is a warning; a missing image is an error of the build.
    let missing = quick().replace("https://images.example/a.qcow2", "http://127.0.0.1:9/none");
    let missing = missing.replace(&format!(", checksum: {}", "0".repeat(64)), "");
    let output = run(&mut embed(&bench, &missing));
    expect(&output, 1);
    expect_stderr(&output, "warning[");
    expect_stderr(&output, "Error: build quick: ");
    bench.expect_clean();
}

#[test]
fn the_program_of_the_readme_cleans_up() {
    let hangs = tiny_manifest("hangs", "- {type: shell, shell: {inline: 'echo started; sleep 600'}}");
    for kind in [Some(Signal::TERM), Some(Signal::HUP), None] {
        let bench = Bench::new();
        let mut child = embed(&bench, &hangs).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::with_capacity(1, child.stdout.take().unwrap());
        let mut output = String::new();
        let wanted = if kind.is_some() { "| started" } else { "vm: Booting" };
        while !output.contains(wanted) {
            assert!(lines.read_line(&mut output).unwrap() > 0, "{output}");
        }
        match kind {
            Some(kind) => {
                signal(&child, kind);
                std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
            }
            // Closes the reading end.
            None => drop(lines),
        }
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
        assert!(said.contains("the build was cancelled") && !said.contains("panicked"), "{said}");
        bench.expect_clean();
    }
}
