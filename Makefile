# dualign: `make help` lists the targets. CONFIG= picks a recipe, RUN= names the run, REDO_FROM= redoes a step of stage1 or
# stage2 and what follows it; give it to that target alone. WORKERS= says how many processes test at once. Every target
# sets up .venv first, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= embedded
RUN ?=
REDO_FROM ?=
ARGS ?=
WORKERS ?= 2

# A machine with an NVIDIA GPU has a driver that answers; everything else gets the CPU lock. LOCK=cpu|cuda overrides.
LOCK ?= $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
LOCKFILE := requirements/$(LOCK).txt
STAMP := $(VENV)/.installed-$(LOCK)
CPU_WHEELS := https://download.pytorch.org/whl/cpu

RUN_ARGS = --config $(CONFIG) $(if $(RUN),--run $(RUN)) $(if $(REDO_FROM),--redo-from $(REDO_FROM)) $(ARGS)

.PHONY: help
help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make stage1 stage2                    the whole run on the embedded default"
	@echo "  make stage1 CONFIG=my.yaml RUN=mine   stage 1 of your own recipe"

# Some recipes come with packages of their own (requirements/recipe-NAME.txt), each by its hash.
RECIPE_STAMP = $(if $(wildcard requirements/recipe-$(CONFIG).txt),$(VENV)/.recipe-$(CONFIG))

.PHONY: setup
setup: $(STAMP) $(RECIPE_STAMP)  ## make .venv from the full version lock (requirements/)

$(STAMP): $(LOCKFILE) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "dualign needs Python 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=."; exit 2; }
	@echo "setting up $(VENV) from $(LOCKFILE) (some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# --no-deps: the lock is complete, and leaves out what a text pipeline must not have (requirements/cpu-overrides.txt).
# torch goes first and alone: pip's configured sources may have the CPU build; if not, PyTorch's own index has.
	@grep -E '^torch==' $(LOCKFILE) > $(VENV)/torch.txt
	@grep -vE '^torch==' $(LOCKFILE) > $(VENV)/rest.txt
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -r $(VENV)/torch.txt 2>$(VENV)/torch.log \
	  || $(BIN)/pip install -q --disable-pip-version-check --no-deps --index-url $(CPU_WHEELS) -r $(VENV)/torch.txt \
	  || { cat $(VENV)/torch.log >&2; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -r $(VENV)/rest.txt
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.recipe-%: requirements/recipe-%.txt $(STAMP)
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --require-hashes -r $<
	@touch $@

.PHONY: stage1
stage1: setup  ## prepare, sample, score, solve, export
	@$(BIN)/dualign stage1 $(RUN_ARGS)

.PHONY: stage2
stage2: setup  ## train, evaluate, report
	@$(BIN)/dualign stage2 $(RUN_ARGS)

.PHONY: evaluate
evaluate: setup  ## evaluate the trained policy of a run
	@$(BIN)/dualign evaluate $(RUN_ARGS)

.PHONY: report
report: setup  ## write the figures and the page of a run
	@$(BIN)/dualign report $(RUN_ARGS)

.PHONY: baselines
baselines: setup $(if $(findstring real_model,$(ARGS)),$(VENV)/.recipe-smollm2)  ## the experiments of the papers on the embedded world (ARGS="--only trade_off", ARGS=--quick)
	@$(BIN)/dualign baselines $(ARGS)

.PHONY: bench
bench: bench-stage1 bench-dual bench-stage2  ## the comparisons, but for the table of 100 million rows (dual_scale.py); needs `make stage1`

.PHONY: bench-stage1
bench-stage1: setup  ## sampling and scoring against bare vLLM and transformers; tables of ten million rows; needs `make stage1`
	@$(BIN)/python benchmarks/sampling_rate.py
	@$(BIN)/python benchmarks/scoring_rate.py
	@$(BIN)/python benchmarks/stage1_tables.py

.PHONY: bench-dual
bench-dual: setup  ## the dual against projected gradient, L-BFGS-B and cvxpy; its rates, bias and coverage
	@$(BIN)/python benchmarks/dual_solvers.py
	@$(BIN)/python benchmarks/dual_rate.py
	@$(BIN)/python benchmarks/finite_response_bias.py
	@$(BIN)/python benchmarks/coverage.py --processes 2

.PHONY: bench-stage2
bench-stage2: setup  ## training against TRL's DPOTrainer on the same scored data; needs `make stage1` (ARGS=--quick)
	@$(BIN)/python benchmarks/stage2_trl.py --config $(CONFIG) $(if $(RUN),--run $(RUN)) $(ARGS)

# The reference pages come from the code; tests/test_docs.py holds them to it.
.PHONY: reference
reference: setup  ## write docs/reference/ anew from the code
	@$(BIN)/python docs/make_reference.py

# The site needs neither torch nor .venv: an environment of its own, from a lock of its own.
DOCS_VENV := .venv-docs

$(DOCS_VENV)/.installed: requirements/docs.txt
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check --no-deps -r $<
	@touch $@

.PHONY: docs
docs: $(DOCS_VENV)/.installed  ## the pages of docs/ as a site in build/site; a link that leads nowhere ends it
	@$(DOCS_VENV)/bin/python docs/make_reference.py --check
# What failed is built anew the next time: Sphinx warns of a page only when it reads it.
	@$(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going -b html -d build/site-cache docs build/site \
	  || { rm -rf build/site-cache; exit 1; }
	@echo "build/site/index.html"

.PHONY: check
check: setup  ## ruff, mypy, import-linter, the reference pages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/make_reference.py --check

.PHONY: test
test: setup  ## the test suite, with one real end-to-end run (ARGS= goes to pytest)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: test-fast
test-fast: setup  ## the tests that take under a minute in all: modules not marked `slow` (ARGS= goes to pytest)
	@$(BIN)/python -m pytest -m "not slow and not end_to_end" $(ARGS)

# The locks come from pyproject.toml. PIP_FIND_LINKS or pip's configuration may point at local wheels; uv reads neither,
# so they are handed over. The CUDA lock is resolved without them, or the CPU build of torch would be taken.
LOCAL_WHEELS = $(shell $(BIN)/pip config get global.find-links 2>/dev/null || echo $(CPU_WHEELS)/torch/)
DOCS_COMPILE := $(BIN)/uv pip compile -q --no-header --no-emit-find-links --python-platform x86_64-manylinux_2_28 \
  --python-version 3.11 pyproject.toml --extra docs
COMPILE := $(BIN)/uv pip compile -q --no-header --no-emit-find-links --python-platform x86_64-manylinux_2_28 \
  --python-version 3.11 pyproject.toml --extra train --extra ray --extra dev

.PHONY: lock
lock: setup  ## resolve the version locks anew
	@$(COMPILE) --upgrade --extra sample-cpu --overrides requirements/cpu-overrides.txt \
	  --find-links "$(LOCAL_WHEELS)" -o requirements/cpu.txt
	@$(COMPILE) --upgrade --extra sample -o requirements/cuda.txt
	@$(DOCS_COMPILE) --upgrade -o requirements/docs.txt

# The page's libraries, as npm publishes them: pinned by version here and by content in SHA256SUMS.
PAGE_LIBRARIES = d3@7.9.0:dist/d3.min.js:d3 @observablehq/plot@0.6.17:dist/plot.umd.min.js:plot

.PHONY: vendor
vendor:  ## fetch the page's libraries anew from npm, at the pinned versions, and compare their hashes
	@cd pipeline/report/vendor && for library in $(PAGE_LIBRARIES); do IFS=: read -r package file name <<< "$$library"; \
	  archive=$$(npm pack --silent --pack-destination "$${TMPDIR:-/tmp}" "$$package"); archive="$${TMPDIR:-/tmp}/$$archive"; \
	  tar -xzOf "$$archive" "package/$$file" > "$$(basename "$$file")"; \
	  tar -xzOf "$$archive" package/LICENSE > "$$name.LICENSE"; rm "$$archive"; done; sha256sum --check --quiet SHA256SUMS

.PHONY: clean
clean:  ## remove caches and builds (runs, models and .venv stay)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(DOCS_VENV)/*' -prune -exec rm -rf {} +
