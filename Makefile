# Needs python3 (3.11 or newer, with venv) and make; everything else goes into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo test test-slow check lint unit bench clean
.DELETE_ON_ERROR:

help:               ## this list
	@sed -n 's/^\([a-z-]*\): *[^#]*## /\1\t/p' Makefile | expand -t 12

venv: $(INSTALLED)  ## install hsl-node, with what tests and export need, into .venv

demo: $(INSTALLED)  ## a federation of three daemons on synthetic images, in minutes
	@$(BIN)/hsl-node demo

test: $(INSTALLED)  ## the tests
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)  ## campaigns of many minutes
	$(BIN)/python -m pytest -m slow

check: lint test    ## what must pass before a commit

lint: $(INSTALLED)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(INSTALLED)  ## the systemd unit: valid, and its exposure at most 1.5 of 10 (needs systemd-analyze)
	@mkdir -p build/unit
	@sed 's#^ExecStart=/opt/hsl-node/venv#ExecStart=$(abspath $(VENV))#' systemd/hsl-node.service >build/unit/hsl-node.service
	systemd-analyze verify build/unit/hsl-node.service
	systemd-analyze security --offline=true --threshold=15 --no-pager build/unit/hsl-node.service >build/unit/exposure.txt
	@tail -n 1 build/unit/exposure.txt

bench: $(INSTALLED)  ## exchange and training step; figures go into benchmarks/README.md
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/train_step.py

clean:              ## remove what tests, tools and the demo left; .venv stays
	rm -rf build dist hsl-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp makes a second call instant; a change of the dependencies installs again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This python3 lacks venv. Debian, Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV): about 6 GB, some minutes (log: $(VENV)/install.log) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev,onnx]' \
	  >$(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log >&2; exit 1; }
	@touch $@
	@echo 'Installed.'
