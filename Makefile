# The commands of this project. Each installs and reports missing tools, and returns quickly if there is nothing to do.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-kubevirt test-slow check bench guests

GUESTS := target/guests
STORE := target/demo-store
# The backend of the demo's first layer, optionally followed by that of the second: "libvirt", "libvirt qemu", "qemu libvirt".
BACKENDS ?= qemu

# The control plane that the tests of the KubeVirt backend start.
KUBE := target/kube/kube
KUBEVIRT := --package rudder-kubevirt --package rudder-kubevirt-double

# Tests that are too slow for `make test`.
SLOW := --test install_slowed --test libvirt_debian

# timed NAME,COMMAND: runs a command and prints how long it took.
timed = s=$$SECONDS; $(2); echo "$(1): $$((SECONDS - s)) s"

help: ## Show this help
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: guests ## Build a module from a real Debian guest, then a second one on top of it; BACKENDS="libvirt qemu"
	@tools/setup build $(if $(findstring libvirt,$(BACKENDS)),headers libvirt)
	@tools/demo "$(STORE)" $(BACKENDS)

test: guests ## Run all tests, including those with real guests, except for those of the KubeVirt backend
	@tools/setup build headers qemu libvirt isos test
	@$(call timed,test: compiling,cargo test --workspace $(KUBEVIRT:--package=--exclude) --features libvirt --no-run --quiet)
	@$(call timed,test: running,RUDDER_GUESTS="$(CURDIR)/$(GUESTS)" cargo test --workspace $(KUBEVIRT:--package=--exclude) --features libvirt --no-fail-fast)

test-kubevirt: guests ## Run the tests of the KubeVirt backend, on a Kubernetes control plane of their own
	@tools/setup build qemu kube
	@$(call timed,test-kubevirt: control plane,tools/kube/build "$(KUBE)")
	@$(call timed,test-kubevirt: compiling,cargo test $(KUBEVIRT) --no-run --quiet)
	@$(call timed,test-kubevirt: running,RUDDER_GUESTS="$(CURDIR)/$(GUESTS)" RUDDER_KUBE="$(CURDIR)/$(KUBE)" cargo test $(KUBEVIRT) --no-fail-fast)

test-slow: guests ## Run the slow tests: installations on a slowed-down machine, where fixed delays fail, and Debian on libvirt (about 45 minutes without hardware acceleration)
	@tools/setup build headers qemu libvirt test
	@$(call timed,test-slow: compiling,cargo build --quiet --examples --features libvirt && cargo test --quiet --no-run --features libvirt $(SLOW))
	@$(call timed,test-slow: running,RUDDER_GUESTS="$(CURDIR)/$(GUESTS)" cargo test --features libvirt --no-fail-fast $(SLOW) -- --nocapture --test-threads 1)

check: ## Check format, structure, lints, other targets, documentation, dependency licences and sources, packages, and the oldest supported Rust; must pass before a change lands
	@tools/setup build headers deny
	@$(call timed,check: format,cargo fmt --all --check)
	@$(call timed,check: structure,tools/structure --check)
	@$(call timed,check: clippy,cargo clippy --workspace --features libvirt --features kubevirt --all-targets --quiet -- -D warnings && cargo clippy --quiet --features libvirt $(SLOW) -- -D warnings)
	@$(call timed,check: no optional features,cargo clippy --package rudder --package rudder-core --quiet -- -D warnings)
	@$(call timed,check: other targets,tools/targets)
	@$(call timed,check: rustdoc,RUSTDOCFLAGS=-Dwarnings cargo doc --workspace --features libvirt --features kubevirt --features testing --no-deps --quiet)
	@$(call timed,check: dependencies,target/tools/bin/cargo-deny --log-level warn check licenses bans sources)
	@$(call timed,check: packages,tools/package)
	@$(call timed,check: oldest Rust,tools/msrv)

guests: ## Build the guests of the tests and the demo from Debian's packages, in target/guests
	@tools/setup qemu guests
	@tools/guests/make --out $(GUESTS) debian-12 tiny installer

RUNS ?= 5

bench: guests ## Measure whole builds on QEMU and libvirt (compared with plain QEMU and Packer), capture, typing, displays and planning; RUNS=5
	@tools/setup build headers qemu libvirt bench
	@cargo build --release --quiet --examples --features libvirt
	@cargo bench --quiet --package rudder-core
	@cargo bench --quiet --features libvirt --bench whole_build -- --runs $(RUNS)
	@cargo bench --quiet --features libvirt --bench capture -- $(RUNS)
	@cargo bench --quiet --features libvirt --bench typing
	@cargo bench --quiet --features libvirt --bench display
