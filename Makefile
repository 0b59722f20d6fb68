# Needs Python 3.11 (or newer), pip and make; everything else is installed into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INTEGRATIONS := .venv-integrations
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test fuzz test-integrations lint smoke clean

demo: $(VENV)/.ready ## the main job on real data that comes with the install; writes report.html into runs/demo, runs/demo-numbers and runs/demo-pairs
	$(BIN)/hardmix demo

test: $(VENV)/.ready ## all tests
	$(BIN)/python -m pytest -q

fuzz: $(VENV)/.ready ## the tests that draw their cases, with new cases in every run
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=default

test-integrations: $(INTEGRATIONS)/.ready ## the adapters beside the real open_clip, timm and torchvision; the GPU's kernels in Triton's interpreter
	$(INTEGRATIONS)/bin/python -m pytest -q tests/integrations

lint: $(VENV)/.ready ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

smoke: $(VENV)/.ready ## every shipped recipe that needs no further data, shortened
	$(BIN)/python tools/smoke_recipes.py

# torch comes first and alone: the constraints file then keeps every later package from pulling another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[train,text,volumes,lora,dev]'
	touch $@

# Both constraints files on every line: without the pins open_clip, timm and torchvision replace torch by another build.
$(INTEGRATIONS)/.ready: pyproject.toml constraints.txt constraints-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install -q -c constraints.txt -c constraints-integrations.txt torch
	$(INTEGRATIONS)/bin/python -m pip install -q -c constraints.txt -c constraints-integrations.txt -e '.[train,dev,open-clip,timm,torchvision]' 'triton; sys_platform == "linux"'
	touch $@

clean: ## remove the environment and caches, keep runs
	rm -rf $(VENV) $(INTEGRATIONS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
