# Everything a fresh machine needs: Python 3.11 or newer with its venv module.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-reference lint format clean

# One stamp a set of extras: a changed setup.cfg installs again.
$(VENV)/.base: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) \
	  else f"mtv_jax needs Python >= 3.11, this is {sys.version}")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.reference: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev,reference,parquet,onnx,preflight]'
	touch $@

# Trains every objective on the built-in scenes, evaluates and exports it.
quickstart: $(VENV)/.base
	$(BIN)/python -m mtv_jax.main --config=configs/mtv_tiny.py \
	  --workdir=$(RUN)
	$(BIN)/python tools/convert.py to_hf $(RUN) $(RUN)/huggingface
	@echo
	@echo "Trained, evaluated and exported:"
	@echo "  $(RUN)/config.json      the resolved config"
	@echo "  $(RUN)/metrics.jsonl    losses and evaluations by step; beside it"
	@echo "                          the same for TensorBoard"
	@echo "  $(RUN)/evals            each evaluation with its protocol"
	@echo "  $(RUN)/checkpoints      to resume: run the same command again"
	@echo "  $(RUN)/huggingface      opens with transformers' AutoModel"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 -m 'not slow and not reference'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 -m 'slow and not reference'

test-reference: $(VENV)/.reference
	$(BIN)/python -m pytest -q -n 2 -m 'reference'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
