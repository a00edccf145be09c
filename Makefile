# Every command works on a fresh clone: it makes .venv first where it needs one.

PYTHON ?= python3
EXTRAS ?= test,bench
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
OUT ?= out/gpu
GPU_ARGS ?=

# One worker a core, one thread a worker: the interpreter that runs the kernels on a CPU is Python code, so
# PyTorch's own threads would only take cores from the other workers. Beyond 8 workers the imports dominate.
TEST_WORKERS ?= auto
TEST_THREADS ?= 1

# As pyproject.toml has it.
OLDEST_TRITON := 3.6.0

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST := $(VENV)/triton-$(OLDEST_TRITON)
# A GPU machine often has PyTorch already: without .venv the system's Python is used, from the checkout.
GPU_PYTHON ?= $(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(PYTHON))
VERSION_CHECK := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install lint format test oldest demo bench gpu wheel clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON (3.10 to 3.13), EXTRAS, DEMO_ARGS, BENCH_ARGS, PYTEST_ARGS, TEST_WORKERS, OUT, GPU_ARGS, GPU_PYTHON"

install: $(STAMP)  ## make .venv and install the package in it, editable, with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(VERSION_CHECK)' || { \
	    echo "fastattn needs Python 3.10 to 3.13 and '$(PYTHON)' is not one: try make PYTHON=python3.11 ..." >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

lint: $(STAMP)  ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

format: $(STAMP)  ## let ruff mend what it can
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

test: lint  ## lint, then every test that this machine can run
	OMP_NUM_THREADS=$(TEST_THREADS) $(VENV_PYTHON) -m pytest \
	    -n $(TEST_WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON)
	@touch $@

oldest: $(OLDEST)/.installed  ## every kernel compiled for sm_90, and launches compared, by the oldest Triton that is supported
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(VENV_PYTHON) -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)"'
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(VENV_PYTHON) -m benchmarks inspect --arch sm_90 --quiet
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(VENV_PYTHON) -m tests.kernels.launch_twice
	PYTHONPATH="$(CURDIR)/$(OLDEST)" OMP_NUM_THREADS=$(TEST_THREADS) $(VENV_PYTHON) -m pytest -n $(TEST_WORKERS) \
	    --maxprocesses 8 --dist worksteal tests/kernels/*_warp_groups_code.py \
	    tests/kernels/test_machine_code.py::test_the_compiler_is_that_of_the_tests $(PYTEST_ARGS)

demo: $(STAMP)  ## train a GPT on real text with every implementation and write the report
	$(VENV_PYTHON) -m benchmarks demo $(DEMO_ARGS)

bench: $(STAMP)  ## the benchmarks of benchmarks/bench_*.py on this machine
	$(VENV_PYTHON) -m pytest benchmarks $(BENCH_ARGS)

gpu:  ## the tests marked gpu and the benchmarks into OUT; runs from the checkout where there is no .venv
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m benchmarks gpu --out "$(OUT)" $(GPU_ARGS)

wheel: $(STAMP)  ## the wheel, into dist/
	rm -rf build  # setuptools would pack what an earlier build left there
	$(VENV_PYTHON) -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean:  ## remove what the other targets made, except .venv and OUT
	rm -rf build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find benchmarks fastattn kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
