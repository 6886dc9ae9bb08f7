# Two commands do all the set-up: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Tests in as many processes as there are cores, four at most: each takes a gigabyte.
TESTS := -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# The site of docs/, into site/: notebooks run anew where they or the library have changed. Anything doubtful ends it.
SITE := -m sphinx -b html -q -W --keep-going -n -d build/docs/doctrees docs site

.PHONY: demo test docs check clean
.SECONDARY:

demo: $(VENV)/.demo-installed
	$(BIN)/maskhooks demo --out demo

test: $(VENV)/.dev-installed
	$(BIN)/python $(TESTS)

docs: $(VENV)/.dev-installed
	$(BIN)/python $(SITE)

check: $(VENV)/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python $(SITE)
	$(BIN)/python $(TESTS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its version: that takes a build for the CPU where the index has one.
$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e .
	touch $@

$(VENV)/.dev-installed: $(VENV)/.demo-installed
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# A partner's tests, in an environment of its own: `make partner-nnsight`, `make partner-transformer-lens`.
partner-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest -q tests/partners/test_$(subst -,_,$*).py

$(VENV)-%/.installed: constraints-%.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install -q --no-compile -c $< torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(VENV)-$*/bin/python -m pip install -q --no-compile -c $< -e '.[test,$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* demo site jupyter_execute build/docs
