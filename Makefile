# The commands of this project. Each sets up what it needs, says what it installs, and is quick when nothing is to do.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench guests

GUESTS := target/guests
STORE := target/demo-store

# "timed NAME COMMAND": runs it, and says how long it took.
timed = s=$$SECONDS; $(2); echo "$(1): $$((SECONDS - s)) s"

help: ## What can be done here
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: guests ## Build a module from a real Debian guest, then a second one on top of it
	@tools/demo "$(STORE)"

test: guests ## Every test, those with real guests included
	@tools/setup build headers qemu libvirt isos test
	@$(call timed,test: compiling,cargo test --workspace --features libvirt --no-run --quiet)
	@$(call timed,test: running,RUDDER_GUESTS="$(CURDIR)/$(GUESTS)" cargo test --workspace --features libvirt --no-fail-fast)

test-slow: guests ## Installing on a machine slowed down, where fixed waits fail: about half an hour without hardware acceleration
	@tools/setup build qemu test
	@$(call timed,test-slow: compiling,cargo build --quiet --examples && cargo test --quiet --no-run --test install_slowed)
	@$(call timed,test-slow: running,RUDDER_GUESTS="$(CURDIR)/$(GUESTS)" cargo test --test install_slowed -- --nocapture)

check: ## Format, lints, documentation, licences and sources of dependencies, the oldest Rust: what must be green before a change lands
	@tools/setup build headers deny
	@$(call timed,check: format,cargo fmt --all --check)
	@$(call timed,check: clippy,cargo clippy --workspace --features libvirt --all-targets --quiet -- -D warnings && cargo clippy --quiet --test install_slowed -- -D warnings)
	@$(call timed,check: rustdoc,RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --features libvirt --no-deps --quiet)
	@$(call timed,check: dependencies,target/tools/bin/cargo-deny --log-level warn check licenses bans sources)
	@$(call timed,check: oldest Rust,tools/msrv)

guests: ## The guests of the tests and the demo, from Debian's packages, into target/guests
	@tools/setup qemu guests
	@tools/guests/make --out $(GUESTS) debian-12 tiny installer

RUNS ?= 5

bench: guests ## Whole builds against the floor and Packer, capture, typing, planning; RUNS=5
	@tools/setup build bench
	@cargo build --release --quiet --examples
	@cargo bench --quiet --package rudder-core
	@cargo bench --quiet --bench whole_build -- $(RUNS)
	@cargo bench --quiet --bench capture -- $(RUNS)
	@cargo bench --quiet --bench typing
