# Everything runs in .venv, made on first use. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.installed
TOOLS := .venv/.installed-dev
OUTPUT_DIR ?= outputs/demo

TEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: install demo test test-all drills bench replicate lint types format clean

install: $(TOOLS)

# what the package itself needs
$(RUNTIME): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

# in the same environment: tests, linters, and the packages that benchmarks compare with
$(TOOLS): $(RUNTIME)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(RUNTIME)
	$(BIN)/accelerate launch --num_processes 1 run_mim_pretrain.py --output_dir $(OUTPUT_DIR) --overwrite_output_dir

test: install
	$(TEST) -m "not extended" tests

# the first lane, then the rest: every test is run once
test-all: test
	$(TEST) -m extended tests

# The oldest versions that setup.cfg allows (each `>=` as `==`), in an environment of their own; Python 3.11 or 3.12
FLOOR := .venv-floor
FLOOR_TESTS := private_parts modeling backbone checkpoint_loading misimmim classification_trainer dense_trainer mask_rcnn \
	data_sources data_decoding data_augmentation evaluation export

.PHONY: test-floor
test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest -n 2 --dist worksteal -m "not extended" $(FLOOR_TESTS:%=tests/test_%.py)

$(FLOOR)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install --quiet --upgrade pip
	sed -n '/^install_requires/,/^\[/s/^    \(.*\)>=\(.*\)/\1==\2.*/p' setup.cfg > $(FLOOR)/oldest.txt
	$(FLOOR)/bin/pip install --quiet --constraint $(FLOOR)/oldest.txt --editable '.[test]'
	touch $@

drills: install
	$(BIN)/python -m mimae.drills

bench: install
	$(BIN)/python -m mimae.benchmarks

# glibc keeps freed memory: without page faults at each step the small models take less time on a CPU (docs/LOG.md)
replicate: install
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 $(BIN)/python -m mimae.replication

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the root is the package, whatever its folder is called: mypy sees it as build/types/mimae
types: install
	mkdir -p build/types
	ln -sfn ../.. build/types/mimae
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-floor build *.egg-info
