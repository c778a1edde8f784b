# Every target sets up what it needs in .venv, once; a stamp file remembers what is done.
# An install that was cut off goes on from where it stopped when the target is run again.

PYTHON     ?= python3
PYTHON_GPU ?= python3
VENV       ?= .venv
ARGS       ?=
JOBS       ?= 2
STAGE      ?= check
BUDGET     ?= 540
OUT        ?= benchmarks/results/h200

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-warn-conflicts
PINS := constraints.txt constraints-cpu.txt
# Two model zoos whose metadata would pull another build of torch; their light dependencies are installed by name.
ZOOS       := torchvision timm
ZOOS_NEEDS := pyyaml safetensors huggingface_hub
# CuTe's headers for the sm_90a convolution; its Python tools would pull six packages that nothing here needs.
HEADERS    := nvidia-cutlass
# One thread a process: the small shapes of the tests are slower on two.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: help bench test gate lint gpu native clean
.DEFAULT_GOAL := help

help:  ## show this text
	@echo "usage: make TARGET [ARGS='more arguments for the tool']"
	@awk -F':.*## *' '/^[a-z]+:.*##/ { printf "  %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bench: $(VENV)/.bench  ## time ResNet-50 and ResNet-18 on real photographs, beside the peers (6 minutes on 2 cores)
	$(BIN)/fused-resnet bench $(ARGS)

test: $(VENV)/.all  ## the tests of every room (12 minutes on 2 cores)
	$(PYTEST) -n $(JOBS) --dist worksteal tests --ignore=tests/gate --ignore=tests/gpu -m "not gate" $(ARGS)

gate: $(VENV)/.all  ## the compile gates and the larger sweeps (25 minutes on 2 cores)
	$(PYTEST) -n $(JOBS) --dist loadgroup tests --ignore=tests/gpu -m gate $(ARGS)

lint: $(VENV)/.all  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/mypy
	@sources=$$(find csrc tests/csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null); \
	if [ -n "$$sources" ]; then echo "clang-format --dry-run csrc tests/csrc"; $(BIN)/clang-format --dry-run --Werror $$sources; fi

gpu:  ## all that needs a GPU: STAGE=check|tune|bench|ground BUDGET=seconds OUT=folder; no set-up, no network
	@$(PYTHON_GPU) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || \
		{ echo "make gpu needs a Python with PyTorch: make gpu PYTHON_GPU=..." >&2; exit 2; }
	PYTHONPATH=. $(PYTHON_GPU) -u -m benchmarks.gpu --stage $(STAGE) --budget $(BUDGET) --out $(OUT) $(ARGS)

native: $(VENV)/.bench  ## the native library with its CUDA part, which takes nvcc but no GPU; setup.py says what it does
	FUSED_RESNET_CUDA=1 $(BIN)/python -m pip install --no-build-isolation --no-deps -v -e . 2>&1 | grep "fused_resnet: the"

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fused_resnet/_C_*.so fused_resnet/_native.json
	find fused_resnet tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, because what stands beside it depends on the build: a CPU build gets constraints-cpu.txt.
$(VENV)/.torch: $(PINS)
	@echo "set-up 1/3: torch in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt setuptools wheel ninja torch
	@if $(BIN)/python -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
		cat $(PINS) > $(VENV)/pins.txt; $(PIP) --no-deps -r constraints-cpu.txt; \
	else cp constraints.txt $(VENV)/pins.txt; fi
	@touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*/*)
	@echo "set-up 2/3: the package, its command line, the peers and two model zoos"
	@$(PIP) -c $(VENV)/pins.txt --no-deps $(HEADERS)
	@$(PIP) -c $(VENV)/pins.txt --no-build-isolation -e '.[cli,peers]' $(ZOOS_NEEDS)
	@$(PIP) -c $(VENV)/pins.txt --no-deps $(ZOOS)
	@touch $@

$(VENV)/.all: $(VENV)/.bench
	@echo "set-up 3/3: the tools for tests and linting"
	@$(PIP) -c $(VENV)/pins.txt --no-build-isolation -e '.[cli,peers,test,dev]'
	@touch $@
