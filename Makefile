# Needs Python 3.11 or newer with its venv module, and installs the rest.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: quickstart test test-slow test-reference test-long lint format clean

# One stamp per set of extras; a changed setup.cfg reinstalls.
$(VENV)/.base: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) \
	  else f"mtv_jax needs Python >= 3.11, this is {sys.version}")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev,hub,buckets,emulators]'
	touch $@

$(VENV)/.reference: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev,reference,parquet,onnx,preflight,tfds,trackers]'
	touch $@

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

test: $(VENV)/.dev
	$(PYTEST) -m 'not slow and not reference and not long'

test-slow: $(VENV)/.slow
	$(PYTEST) -m 'slow and not reference and not long'

test-reference: $(VENV)/.reference
	$(PYTEST) -m 'reference and not long'

# Kills, hostile cases and old runs by the dozen: outside CI.
test-long: $(VENV)/.slow
	$(PYTEST) -m 'long'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* build dist *.egg-info .pytest_cache .ruff_cache \
	  .import_linter_cache
