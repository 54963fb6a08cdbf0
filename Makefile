# Everything runs in $(VENV), which is built on first use. To use an interpreter that has what is needed instead:
#   make parity PY=python3       (or SKIP_ENV=1 for $(PYTHON))
PYTHON ?= python3.12
VENV ?= .venv
ARGS ?=

ifdef SKIP_ENV
PY ?= $(PYTHON)
endif
ifdef PY
STAMP :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/configs$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
endif

# Without a GPU JAX's CPU build is enough; the compile gates bring the CUDA compiler through the dev extra.
JAX_EXTRA = $(if $(shell command -v nvidia-smi),jax-cuda13,jax)
# Interpreters on both sides, also where there is a GPU.
CPU_ONLY = JAX_PLATFORMS=cpu TRITON_INTERPRET=1

.DEFAULT_GOAL := help
.PHONY: help parity test gates test-gpu test-browser lint wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[$(JAX_EXTRA),torch,bench,dev]'
	touch $@

parity: $(STAMP) ## the parity report, on the GPU or else through the interpreters; ARGS="--html FILE"
	$(PY) -m parity_tests $(ARGS)

test: $(STAMP) ## the tests that need no GPU
	$(CPU_ONLY) $(PY) -m pytest -m "not gpu and not gates and not browser" -n 2 $(ARGS)

gates: $(STAMP) ## every table row compiles for its device (long)
	$(PY) -m pytest -m gates $(ARGS)

test-gpu: $(STAMP) ## the tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

test-browser: $(STAMP) ## the report page in Chromium
	$(PY) -m pip install playwright
	$(CPU_ONLY) $(PY) -m pytest -m browser $(ARGS)

lint: $(STAMP) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

wheel: $(STAMP) ## dist/*.whl
	$(PY) -m build --wheel --no-isolation

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
