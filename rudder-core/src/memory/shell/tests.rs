//! The language and the commands, as scripts see them.

use super::*;

fn run(script: &str) -> (String, u32) {
    let (mut tree, guest) = (FileTree::of_a_system(), Guest::default());
    let acts = Shell::new(&mut tree, &guest, "id", "host", "root", b"one\ntwo\n".to_vec()).run(script);
    let (mut out, mut code) = (String::new(), u32::MAX);
    for act in acts {
        match act {
            Act::Stdout(bytes) => out.push_str(&String::from_utf8_lossy(&bytes)),
            Act::Exit(exit) => code = exit,
            _ => {}
        }
    }
    (out, code)
}

#[test]
fn the_language_is_that_of_a_shell() {
    for (script, out, code) in [
        (
            "if [ \"$(id -u)\" = 0 ] && ! command -v nothing-here; then echo root; else echo not; fi",
            "/usr/bin/nothing-here\nnot\n",
            0,
        ),
        ("for x in a 'b c' $UNSET; do printf '<%s>' \"$x\"; done", "<a><b c>", 0),
        ("i=0; while [ $i -lt 3 ]; do i=$((i + 1)); echo $i; done", "1\n2\n3\n", 0),
        ("f() { echo \"$1-$#\"; return 4; }; f x y || echo $?", "x-2\n4\n", 0),
        ("case web-1 in db*|cache) echo no ;; web-?) echo yes ;; esac", "yes\n", 0),
        ("cat <<END >/tmp/x\nhello $USER\nEND\ncat /tmp/x", "hello root\n", 0),
        ("cat <<'END' | wc -l\n$USER\nEND", "1\n", 0),
        ("read -r a; read -r b; echo \"$b $a\"", "two one\n", 0),
        ("x=a.tar.gz; echo ${x%%.*} ${x#*.} ${y:-none} ${#x}", "a tar.gz none 8\n", 0),
        ("set -e; false || true; (exit 3); echo never", "", 3),
        ("{ echo out; echo err >&2; } 2>/dev/null; exit 7", "out\n", 7),
        ("sh -c 'echo \"$0 $1 $@\"' name one two", "name one one two\n", 0),
        ("cd /tmp && touch a && [ -f /tmp/a ] && pwd", "/tmp\n", 0),
        ("x=$(false) || echo failed", "failed\n", 0),
        ("unknown-command --with options", "", 0),
        ("unknown-command | grep -q something", "", 0),
        ("echo one | grep two", "", 1),
        ("[[ not posix ]]", "", 0),
    ] {
        assert_eq!(run(script), (out.to_owned(), code), "{script}");
    }
    assert_eq!(run("while true; do sleep 1; done").1, u32::MAX, "it never ends");
}
