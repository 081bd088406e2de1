# Needs Python 3.11 or newer with its venv module, and installs the rest.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=25

.PHONY: quickstart environments test test-slow test-reference test-full \
  test-long lint format clean

# One stamp per set of extras; a changed setup.cfg reinstalls.
STAMPS := $(VENV)/.base $(VENV)/.dev $(VENV)/.all
$(STAMPS): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) \
	  else f"mtv_jax needs Python >= 3.11, this is {sys.version}")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	tools/install.sh $(BIN)/python $(EXTRAS)
	touch $@
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.all: $(VENV)/.dev
$(VENV)/.all: EXTRAS := dev,buckets,emulators,hub,onnx,parquet,preflight,$\
  reference,tfds,trackers

# Trains the paper's objectives on built-in scenes, evaluates and exports.
quickstart: $(VENV)/.base
	$(BIN)/mtv-jax train --workdir=$(RUN) \
	  --config=study:steps=1000,images=20000,cache=$(RUN)/scenes
	$(BIN)/mtv-jax convert to_hf $(RUN) $(RUN)/huggingface
	@echo
	@echo "Trained, evaluated and exported:"
	@echo "  $(RUN)/report.html      metrics with chance, curves, images"
	@echo "  $(RUN)/config.json      the resolved config"
	@echo "  $(RUN)/metrics.jsonl    losses and evaluations by step, with"
	@echo "                          TensorBoard files beside it"
	@echo "  $(RUN)/evals            each evaluation with its protocol"
	@echo "  $(RUN)/checkpoints      the same command resumes from here"
	@echo "  $(RUN)/huggingface      for transformers' AutoModel"

# Fast tests; `make test MORE=--jax` runs one case of each that depends on JAX.
test: $(VENV)/.dev
	$(PYTEST) -m 'not slow and not reference and not long' $(MORE)

test-slow: $(VENV)/.all
	$(PYTEST) -m 'slow and not reference and not long'

test-reference: $(VENV)/.all
	$(PYTEST) -m 'reference and not long'

# All of them in one run; MORE=--jaxtyping-packages= leaves out the checks of
# annotated shapes.
test-full: $(VENV)/.all
	$(PYTEST) -m 'not long' $(MORE)

# Kills, hostile cases and old runs by the dozen: outside CI.
test-long: $(VENV)/.all
	$(PYTEST) -m 'long'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/unused.py
	$(BIN)/python tools/ast_nodes.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache \
	  .import_linter_cache
