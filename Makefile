# Every target sets up what it needs; nothing has to be done by hand before.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Arguments for run, bench and pytest: make run ARGS="--memory 1G"
ARGS ?=
# make run shows the engine that every host has.
ENGINE ?= bt

# The program in guests that runs commands for the host: static, for a guest of any kind.
AGENT := src/tetrarch/images/guest/tetrarch-agent
AGENT_FLAGS := -C target-feature=+crt-static -C strip=symbols -C opt-level=s

RUST_SOURCES := Cargo.toml Cargo.lock $(shell find crates -path '*/src/*.rs' -o -name Cargo.toml)
# When make starts, before it looks at any file's time.
$(shell find crates -name '*.rs' -print0 | xargs -0 tools/touch-changed \
	Cargo.lock $(wildcard Cargo.toml crates/*/Cargo.toml) pyproject.toml requirements/dev.txt)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-long bench fuzz wheel lint fmt lock clean packages
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(AGENT) $(VENV)/.stamp-package ## Build the core and install everything into .venv

run: setup ## Boot the default guest to a shell (ENGINE=auto|bt|kvm, ARGS= for more options)
	@$(BIN)/tetrarch run --engine $(ENGINE) $(ARGS) || { code=$$?; \
	echo "make run: tetrarch ended with exit code $$code, which make turns into 2" >&2; exit $$code; }

# Most tests wait for a guest, which has one CPU.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist worksteal

# Nothing may ask the terminal for input: in its background that would stop the tests.
test: setup packages lint ## Check and test all but the long tests
	cargo test --release --workspace --locked --no-fail-fast </dev/null
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not long" $(ARGS)

test-long: setup packages ## Run all tests, the long ones too
	@tools/test-packages long
	cargo test --release --workspace --locked --no-fail-fast -- --include-ignored </dev/null
	$(BIN)/python -m pytest $(ARGS)

bench: setup ## Measure against QEMU's TCG and native execution
	@tools/test-packages bench
	$(BIN)/python -m tools.bench $(ARGS)

TARGET ?= differential
fuzz: ## Fuzz a TARGET of fuzz/ for ten minutes (see docs/fuzzing.md)
	cargo fetch --locked --manifest-path fuzz/Cargo.toml
	cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run $(TARGET) -- -max_total_time=600 -max_len=768 -len_control=0

# Where maturin looks for what lies beside the package: man pages, and what makes shells complete.
WHEEL_DATA := tetrarch._native.data
SHARE := $(WHEEL_DATA)/data/share

wheel: setup ## Build the wheel into dist/
	rm -rf $(WHEEL_DATA)
	$(BIN)/tetrarch man $(SHARE)/man
	install -d $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions \
		$(SHARE)/fish/vendor_completions.d
	$(BIN)/tetrarch completion bash >$(SHARE)/bash-completion/completions/tetrarch
	$(BIN)/tetrarch completion zsh >$(SHARE)/zsh/site-functions/_tetrarch
	$(BIN)/tetrarch completion fish >$(SHARE)/fish/vendor_completions.d/tetrarch.fish
	$(BIN)/maturin build --release --strip --locked --out dist

lint: setup ## Check format, types and style of Rust and Python
	@PYTHON=$(PYTHON) tools/check-host lint
	cargo fmt --all --check
	cargo fetch --quiet --locked --manifest-path fuzz/Cargo.toml
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" \
		cargo doc --quiet --workspace --no-deps --document-private-items --locked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/stubtest --concise tetrarch._native

fmt: setup ## Format Rust and Python
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without --upgrade the versions that are locked stay, as far as pyproject.toml lets them.
UV := uv==0.13.9
COMPILE := $(VENV)/lock/bin/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 \
	--generate-hashes --custom-compile-command "make lock"
lock: ## Lock the Python dependencies of pyproject.toml in requirements/ (ARGS=--upgrade: the newest)
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(COMPILE) --extra dev $(ARGS) --output-file requirements/dev.txt
	$(COMPILE) --constraints requirements/dev.txt --no-annotate --output-file requirements/run.txt

clean: ## Remove everything that was built
	rm -rf $(VENV) dist build target $(WHEEL_DATA) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/tetrarch/_native*.so $(AGENT)
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

packages: # what the tests need of the system
	@tools/test-packages

$(AGENT): Cargo.lock crates/agent/Cargo.toml $(wildcard crates/agent/src/*.rs)
	@PYTHON=$(PYTHON) tools/check-host
	RUSTFLAGS="$(AGENT_FLAGS)" cargo build --quiet --release --locked --package tetrarch-agent \
		--target x86_64-unknown-linux-gnu --target-dir target/agent
	install -m 755 target/agent/x86_64-unknown-linux-gnu/release/tetrarch-agent $@

# Wheels only: what building from source would need is locked nowhere.
$(VENV)/.stamp-tools: requirements/dev.txt tools/check-host
	@PYTHON=$(PYTHON) tools/check-host
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: --requirement requirements/dev.txt
	@touch $@

# Python code runs from src/ and needs no building. All it depends on is there: no index is asked.
$(VENV)/.stamp-package: $(VENV)/.stamp-tools pyproject.toml $(RUST_SOURCES)
	@PYTHON=$(PYTHON) tools/check-host
	PIP_NO_INDEX=1 $(BIN)/maturin develop --release --locked
	@touch $@
