# Everything sets up its own virtual environment; only Python 3.10+ and make are needed.
#   make quickstart   align and measure a draft for a real target (ten minutes)
#   make quickstart RECIPE=recipes/smollm2-135m/from-nothing.yaml   the same without a pre-trained draft
#   make demo         a prompt answered with and without the shipped draft, side by side
#   make engines      the shipped draft in vLLM, llama.cpp, OpenVINO and transformers, as a table
#   make outdated     which pinned versions have newer releases
#   make test         run the tests with the pinned versions
PYTHON ?= python3
VENV ?= .venv
VENV_LATEST ?= .venv-latest
RECIPE ?= recipes/smollm2-135m/quickstart.yaml
PYTEST_ARGS ?=
DEMO_ARGS ?=

PIP_FLAGS = --quiet --disable-pip-version-check
STAMPS = pyproject.toml constraints.txt

.PHONY: help quickstart demo engines outdated test test-slow test-latest lint docs bench clean

help:
	@sed -n '/^#/!q; s/^# *//p' Makefile
	@echo 'targets: quickstart demo engines outdated test test-slow test-latest lint docs bench clean'

# torch comes first and alone: the constraint picks the build, and a later package cannot widen it.
$(VENV)/.run: $(STAMPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed (make PYTHON=python3.11 ...)")'
	@echo 'setting up $(VENV) (two to three minutes, once)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[openvino]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[openvino,dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(VENV_LATEST)/.dev: pyproject.toml constraints-latest.txt
	@echo 'setting up $(VENV_LATEST) with the newest releases'
	$(PYTHON) -m venv $(VENV_LATEST)
	$(VENV_LATEST)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints-latest.txt torch
	$(VENV_LATEST)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints-latest.txt --editable '.[test]'
	@touch $@

quickstart: $(VENV)/.run
	$(VENV)/bin/fastdraft run $(RECIPE)

demo: $(VENV)/.run
	$(VENV)/bin/fastdraft demo $(DEMO_ARGS)

# llama.cpp is compiled at the first call: ten minutes.
engines: $(VENV)/.run
	$(VENV)/bin/python benchmarks/engines.py

# To be called now and then. After `make test-latest` has passed, raise the bounds in pyproject.toml.
outdated: $(VENV)/.run
	$(VENV)/bin/python -m pip --disable-pip-version-check list --outdated | \
		grep -iE "^(Package|$$(sed -n 's/==.*//p' constraints.txt | tr '-' '.' | paste -sd '|')) "

# Two processes, each with whole files, since fixtures of a module are dear.
PYTEST = -m pytest --numprocesses 2 --dist loadfile

test: $(VENV)/.dev
	$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

test-latest: $(VENV_LATEST)/.dev
	$(VENV_LATEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

bench: $(VENV)/.run
	$(VENV)/bin/python benchmarks/head.py

clean:
	rm -rf $(VENV) $(VENV_LATEST) site
