# make demo, make test: everything from a fresh machine with Python and make. PYTHON=… chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/attention
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-gpu test-quick lint format lock peers clean

$(READY): requirements.lock setup.py
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f'error: Python {v} given, 3.11 to 3.13 supported; use make PYTHON=…')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python experiments/ablate.py --table=attention --workdir=$(WORKDIR)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" tests

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu" tests

# On a machine with a Hopper GPU: what is interpreted and compiled elsewhere runs there.
test-gpu: $(READY)
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -n 4 -m gpu tests/kernels

test-quick: $(READY)
	$(BIN)/python -m pytest -n 2 -m "quick and not slow and not gpu" tests

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/basedpyright --level error

format: $(READY)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

# torch, transformers and tokamax: oracles and benchmark peers. torch comes by itself, without hashes (see BUILD.md). And
# the compilers for TPUs and GPUs, of jax's own version; the GPUs' in a folder of its own, where jax does not look for
# GPUs.
peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "jax[tpu]" \
	  "tokamax==0.0.12; python_version < '3.12'" "tokamax==0.0.17; python_version >= '3.12'"
	version=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('jax'))"); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/cuda \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==13.5.37

# Needs uv. Pins every dependency for Python 3.11 to 3.13, with hashes.
lock:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
	  --extra dev --extra notebooks --extra peers setup.py -o requirements.lock

clean:
	rm -rf $(VENV) .cache
