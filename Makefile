# What runs where: `make help`. Needs python3 (3.11 to 3.13 for the pinned environments), pip, gcc and g++.
# VENV=path, FULL_VENV=path or TRL_VENV=path use another environment; an existing one is kept and brought up to date.

PYTHON ?= python3
VENV ?= .venv
FULL_VENV ?= .venv-full
TRL_VENV ?= .venv-trl
WORKERS ?= 2
INTEGRATION_LIMIT ?= 2700
PYTEST_ARGS ?=
BENCH_ARGS ?=

TORCH := torch==2.13.0
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-integration .integration test-trl lint format bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Run the demo: exact speculation, on and off, on this machine
	@$(VENV)/bin/rollout-spec demo

# A file of tests at a time for each worker, in the order in which tests/conftest.py puts them. One thread each, but for tests
# that ask for more; these sleep while they wait, for their cores are shared.
test: $(VENV)/.installed ## Run the CPU tests; PYTEST_ARGS='-k name' selects
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

test-integration: test-trl ## Run the tests that start vLLM, verl, Ray or TRL
	@if grep -rqE "mark\.integration" tests; then $(MAKE) --no-print-directory .integration; \
	else echo "test-integration: there are no integration tests yet"; fi

# Workers of vLLM and Ray can hang instead of failing, hence the limit in seconds. One thread, from the start: set
# later, the threads of a process would disagree, which vLLM's attention on CPU refuses. vLLM's engines run beside each
# other, Ray's clusters do not. Status 5 is a selection without tests in one of the halves.
.integration: $(FULL_VENV)/.installed
	@export OMP_NUM_THREADS=1; run="timeout --kill-after=30 $(INTEGRATION_LIMIT) $(FULL_VENV)/bin/python -m pytest -m integration"; \
	{ $$run -n $(WORKERS) --dist loadfile tests/vllm $(PYTEST_ARGS) || [ $$? -eq 5 ]; } && \
	{ $$run --ignore=tests/vllm $(PYTEST_ARGS) || [ $$? -eq 5 ]; }

test-trl: $(TRL_VENV)/.installed ## Run the tests that train with TRL, in an environment of its own
	@OMP_NUM_THREADS=1 timeout --kill-after=30 $(INTEGRATION_LIMIT) $(TRL_VENV)/bin/python -m pytest -m trl $(PYTEST_ARGS)

lint: $(VENV)/.installed ## Check style, layout and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.installed ## Lay out the code and mend what ruff can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: $(VENV)/.installed ## Run the benchmarks; BENCH_ARGS is passed on
	@$(VENV)/bin/rollout-spec bench $(BENCH_ARGS)

clean: ## Remove caches and build products; environments stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.installed: requirements/light.txt pyproject.toml
	$(call install,$(VENV),requirements/light.txt)

$(FULL_VENV)/.installed: requirements/full.txt pyproject.toml
	$(call install,$(FULL_VENV),requirements/full.txt)

$(TRL_VENV)/.installed: requirements/trl.txt requirements/light.txt pyproject.toml
	$(call install,$(TRL_VENV),requirements/trl.txt)

# $(1) environment, $(2) its pins. torch is resolved with its dependencies, the pins without a resolver.
define install
	@test -x $(1)/bin/python || { \
	  $(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
	    "make: the pinned environments need Python 3.11 to 3.13, not %d.%d; set PYTHON=" % v[:2])' && \
	  echo "creating $(1)" && $(PYTHON) -m venv $(1); }
	@echo "installing $(2) into $(1)"
	@$(1)/bin/python $(PIP_INSTALL) $(TORCH)
	@$(1)/bin/python $(PIP_INSTALL) --no-deps -r $(2)
	@$(1)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
endef
