# make demo    the whole way of a job on this machine, nothing downloaded but packages
# make test    set up and run all tests
# make check   what CI checks besides: format, lint, types, arrows, migrations, Dockerfiles
# make faults  everything killed, stopped, cut off and starved, and a checker over what it did; some minutes
# make audit   known vulnerabilities of what requirements.lock names; asks the network, so it is not part of CI here
# make bench   measurements, apart from the tests; each prints JSON lines (about an hour, most of it the peers')

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
AUDIT  := .venv-audit
OPENAI := .venv-openai-1/.ready .venv-openai-3/.ready

.PHONY: setup demo test check faults faults-long audit bench containers clean

setup: $(READY) $(OPENAI)

# torch comes from the lock file with everything else: a plain pip takes the build that fits the machine.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sftd needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

# The oldest and the newest openai package that /v1 is tested with, each in an environment of its own.
.venv-openai-%/.ready: tests/contract/requirements-openai-%.txt
	test -x .venv-openai-$*/bin/python || $(PYTHON) -m venv .venv-openai-$*
	.venv-openai-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	folder=$$(mktemp -d) && for command in upgrade check downgrade; do \
	  $(BIN)/python -m sftd_server.migrations $$command --database-url sqlite:///$$folder/check.db || exit 1; done; \
	  rm -rf $$folder
	$(BIN)/hadolint Dockerfile Dockerfile.gpu

# Some lines need root (small disks) or libfaketime (clocks); where they are not to be had these lines are skipped and say so.
faults: setup
	$(BIN)/python -m tests.faults $(FAULTS)

# The same, more of it: about three hours, and the model of the life cycle for 100,000 steps.
faults-long: setup
	SFTD_MODEL_STEPS=100000 $(BIN)/python -m pytest tests/server/test_lifecycle_model.py
	$(BIN)/python -m tests.faults --long $(FAULTS)

# In an environment of its own: the auditor's dependencies are none of ours.
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet "pip-audit>=2.9"; }
	$(AUDIT)/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip $(AUDIT_FLAGS)

bench: setup
	$(BIN)/python bench/import_time.py
	$(BIN)/python -m bench.training --case all
	$(BIN)/python -m bench.start
	$(BIN)/python -m bench.upload
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.profile_step
	$(BIN)/python -m bench.gpu

# Builds both images and runs a job through the composed service. Needs root and tens of minutes; not part of CI.
containers: setup
	bash tests/containers/run.sh

clean:
	rm -rf $(VENV) $(AUDIT) .venv-openai-1 .venv-openai-3 demo-data
