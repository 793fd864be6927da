# Every target does its own set-up: python3 (>= 3.10, with venv) and a C++ compiler are all it takes.
#   make demo      calibrate, generate and report on the bundled checkpoint; ends in build/demo/report/
#   make test      all tests that this machine can run            (ARGS="-k merge" to choose)
#   make test-hf   the tests around transformers with another version of it (TRANSFORMERS=5.17.0), beside the environment's
#   make test-gpu  the GPU tests, with the python3 and PyTorch of the machine, no set-up
#   make bench     speed of this machine: on a GPU every suite, with the machine's python3 (ARGS="--suite decode"); else the CPU
#   make lint      formatters, linters, types
#   make clean     forget everything that was built

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TRANSFORMERS ?= 5.17.0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

SOURCES := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu') \
           quant/codecs.def setup.py tools/source_hash.py
CPP := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
MODEL := examples/tiny_lm/model
DEMO := build/demo

.PHONY: demo test test-hf test-gpu bench bench-cpu lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/foldkv calibrate $(MODEL) --out $(DEMO)/kv_cache --overwrite
	$(BIN)/foldkv generate $(MODEL) --kv c16 --prompt "Once upon a time" --max-new-tokens 40
	$(BIN)/foldkv generate $(MODEL) --kv c4 --scales $(DEMO)/kv_cache --prompt "Once upon a time" --max-new-tokens 40
	$(BIN)/foldkv report $(MODEL) --kv c8,k8v4,c4 --scales $(DEMO)/kv_cache --out $(DEMO)/report

test: $(VENV)/built
	$(BIN)/python -m pytest $(ARGS)

test-hf: $(VENV)/built $(VENV)/transformers-$(TRANSFORMERS)
	PYTHONPATH=$(VENV)/transformers-$(TRANSFORMERS) $(BIN)/python -m pytest -p no:cacheprovider \
	    tests/test_hf_*.py tests/test_engine*.py tests/test_soak.py tests/test_loading.py $(ARGS)

# It and what it needs, in front of what is installed; PyTorch is the environment's.
$(VENV)/transformers-%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --target $@ transformers==$*

test-gpu:
	PYTHON=$(PYTHON) bash tests/gpu/run.sh $(ARGS)

# A GPU is measured with the machine's own PyTorch; the CPU with that of the environment.
bench:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then PYTHON=$(PYTHON) bash bench/run.sh $(ARGS); else $(MAKE) bench-cpu; fi

bench-cpu: $(VENV)/built
	$(BIN)/foldkv bench $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info quant/_C*.so $(VENV)

# PyTorch first, as the build needs it; then foldkv in place, which brings the rest and builds the extension.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "foldkv: expected Python 3.10 or newer, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch 'setuptools>=77' wheel ninja numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
