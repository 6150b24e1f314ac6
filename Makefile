# Everything runs in .venv. Set-up happens on the first use and again only where what it depends on has changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PYTEST := $(PY) -m pytest -q

.PHONY: help demo test bench lint format asan wheel docs fuzz clean

help:
	@echo 'make demo    find the face on a photograph, run both models, write pictures and tables;'
	@echo '             then train small ones on SYNTHETIC faces, which takes minutes'
	@echo 'make test    every test, the slow ones too (pytest -q leaves those out)'
	@echo 'make bench   time every operator against the reference and the strongest peers'
	@echo 'make lint    ruff and clang-format; make format applies them'
	@echo 'make asan    the operator tests with address and undefined-behaviour sanitizers (.ci/run: a quick choice)'
	@echo 'make wheel   a wheel for any Python, checked and tested, in dist/'
	@echo 'make docs    the site, in build/docs/html; warnings are errors, every example on a page runs'
	@echo 'make fuzz    random operator calls and mutated files for longer; FUZZ=10000 is how many of each'
	@echo 'make clean   remove what was built, but not $(VENV)'
	@echo
	@echo 'PYTHON=python3.12 chooses the interpreter. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu'
	@echo 'gets the small torch without CUDA. build_kernels.py lists the variables of the build.'

# --- set-up -------------------------------------------------------------------------------------------------------

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'aufast needs Python 3.10 or later; name one with make PYTHON=python3.12'; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@echo '[1/4] torch'
	$(PIP) install -c constraints.txt torch numpy
	@touch $@

# The longest step. dlib comes as source only; its build brings its own cmake from PyPI and pip keeps the result.
$(VENV)/.dlib: $(VENV)/.torch
	@echo '[2/4] dlib: compiling it takes about six minutes on two cores, the first time'
	$(PIP) install -c constraints.txt dlib
	@touch $@

# Compiles nothing yet: pip would hide it.
$(VENV)/.installed: $(VENV)/.dlib pyproject.toml setup.py build_kernels.py
	@echo '[3/4] aufast and its tools'
	AUFAST_SKIP_EXT=1 $(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(wildcard csrc/*/*)
	@echo '[4/4] the compiled part'
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# --- use ----------------------------------------------------------------------------------------------------------

demo: $(VENV)/.built
	$(VENV)/bin/aufast demo
	$(VENV)/bin/aufast demo --train --out demo/training

test: $(VENV)/.built
	$(PYTEST) -m ''

bench: $(VENV)/.built
	@mkdir -p build
	$(PYTEST) benchmarks --benchmark-only --benchmark-quiet --benchmark-json=build/bench.json
	$(PY) -m benchmarks.table build/bench.json --save benchmarks/results/local/$$(date +%Y%m%d-%H%M%S).json

lint: $(VENV)/.installed
	$(VENV)/bin/pre-commit run --all-files

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(wildcard csrc/*/*)

asan: $(VENV)/.installed
	PYTHON=$(PY) .ci/asan

wheel: $(VENV)/.installed
	rm -rf build/wheel
	$(PIP) wheel --no-deps -w build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' -w build/wheel/out build/wheel/*.whl
	AUFAST_TEST_WHEEL=$$(echo build/wheel/out/*.whl) $(PYTEST) -m '' tests/packaging/test_wheel.py
	@mkdir -p dist
	cp build/wheel/out/*.whl dist/

docs: $(VENV)/.built
	$(PY) -m sphinx -b html -W --keep-going -q -c docs . build/docs/html
	$(PY) -m sphinx -b doctest -W --keep-going -q -c docs . build/docs/doctest
	@echo 'open build/docs/html/index.html'

fuzz: $(VENV)/.built
	AUFAST_FUZZ=$(or $(FUZZ),2000) $(PYTEST) -m fuzz

clean:
	rm -rf build dist aufast.egg-info aufast/_build.json aufast/*.so $(VENV)/.built
