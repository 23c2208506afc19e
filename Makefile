# Needs python3 (3.11 or newer, with venv) and make; everything else goes into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help map docs venv demo test test-all check lint threats mutations unit bench chaos fuzz audit clean
.DELETE_ON_ERROR:

help:               ## this list
	@sed -n 's/^\([a-z-]*\): *[^#]*## /\1\t/p' Makefile | expand -t 12

map:                ## every file of hsl_node, with what it promises
	@$(PYTHON) tests/repository/package_map.py

venv: $(INSTALLED)  ## install hsl-node, with what tests and export need, into .venv

demo: $(INSTALLED)  ## a federation of three daemons on synthetic images, in minutes
	@$(BIN)/hsl-node demo

# One process more than cores, since they wait for daemons, but four at most: those start others by the dozen. They start a
# sixth faster when hsl_node is compiled, so the tests may write bytecode where the environment says otherwise; `make clean`
# removes it.
AT_ONCE ?= $(shell n=$$(($$(nproc) + 1)); echo $$((n < 4 ? n : 4)))
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(AT_ONCE) --dist worksteal
test: $(INSTALLED)  ## the tests; of each campaign a sample, other cases each day (HSL_TEST_SAMPLE=... repeats one)
	$(PYTEST) -m "not slow and not full"

test-all: $(INSTALLED)  ## all tests, each campaign whole: before a release; many minutes
	HSL_TEST_ALL=1 $(PYTEST)

check: lint test    ## what must pass before a commit

lint: $(INSTALLED)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the index of the decisions, the examples of protocol and deploy, the methods, the manual page, where they changed
	$(BIN)/python tests/repository/decisions_index.py
	$(BIN)/python tests/repository/protocol_examples.py
	$(BIN)/python tests/repository/plan_words.py
	$(BIN)/ruff format -q hsl_node/federation/plan_keys.py
	$(BIN)/python tests/repository/methods_page.py
	$(BIN)/python tests/repository/example_federation.py
	$(BIN)/python tests/repository/man_page.py

threats: $(INSTALLED)  ## tests/README.md: which test answers which threat, and what `make test` leaves to test-all
	$(BIN)/python tests/repository/threat_table.py

mutations: $(INSTALLED)  ## tests/mutations/MUTATIONS.md: each protection switched off, and which tests then fail; minutes
	$(BIN)/python tests/mutations/mutations.py

unit: $(INSTALLED)  ## the systemd unit: valid, and its exposure at most 1.5 of 10 (needs systemd-analyze)
	@mkdir -p build/unit
	@sed 's#^ExecStart=/opt/hsl-node/venv#ExecStart=$(abspath $(VENV))#' systemd/hsl-node.service >build/unit/hsl-node.service
	systemd-analyze verify build/unit/hsl-node.service
	systemd-analyze security --offline=true --threshold=15 --no-pager build/unit/hsl-node.service >build/unit/exposure.txt
	@tail -n 1 build/unit/exposure.txt

bench: $(INSTALLED)  ## exchange and training step; figures go into benchmarks/README.md
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/learning_speed.py

CHAOS_SIMULATED ?= 500
CHAOS_DAEMONS ?= 25
chaos: $(INSTALLED)  ## federations under random kills, cuts and disk faults; SEED=... repeats a run, failures in build/chaos
	$(BIN)/python tests/chaos/chaos.py --simulated $(CHAOS_SIMULATED) --daemons $(CHAOS_DAEMONS) $(if $(SEED),--seed $(SEED))

FUZZ_S ?= 60
fuzz: $(INSTALLED)  ## fuzz each parser of foreign bytes for FUZZ_S seconds; findings in build/fuzz/findings
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_S)

audit:              ## known advisories against constraints.txt; a package that the service does not know fails; in no other target
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && \
	  build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } || \
	  { echo 'pip-audit could not be installed: this target needs the network.' >&2; rm -rf build/audit; exit 1; }
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

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
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev,dicom,onnx,pretrained,timm]' \
	  >$(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log >&2; exit 1; }
	@touch $@
	@echo 'Installed: $(BIN)/hsl-node. So that plain hsl-node is found in this shell: . $(BIN)/activate'
