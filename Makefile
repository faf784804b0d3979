.DEFAULT_GOAL := help
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BASE_PYTHON ?= python3
OLDEST := $(VENV)/transformers-5.17

.PHONY: help env demo test bench lint types check oldest fuzz sanitize clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

env: $(STAMP)  ## create .venv with torch 2.13.0, build the C++ core, install the project there

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cc csrc/*.h)
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet torch==2.13.0 numpy "triton>=3.7" setuptools wheel pybind11
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev,eval]"
	$(PYTHON) -m pip install --quiet --no-deps pyctcdecode pygtrie  # an oracle of the tests; it asks for numpy below 2
	touch $(STAMP)

demo: env  ## transcribe the shipped clips alone and fused, with word error rates
	$(VENV)/bin/shallowfusion demo

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: env
	$(VENV)/bin/mypy

test: lint types  ## format, lint, types, import directions and all tests
	$(PYTHON) -m pytest
	$(MAKE) oldest

oldest: env
	test -d $(OLDEST)/transformers || $(PYTHON) -m pip install --quiet --no-deps --target $(OLDEST) \
		transformers==5.17.0 "huggingface-hub<2" httpx httpcore
	PYTHONPATH=$(OLDEST) $(PYTHON) -m pytest tests/scorers tests/search/test_generate_parity.py tests/search/test_loop.py

check: test

SANITIZED := build/sanitized
NATIVE_TESTS := tests/search/test_beam_state.py tests/search/test_beam_state_border.py \
	tests/search/test_beam_state_properties.py tests/scorers/test_page_pool.py tests/fusion/test_native_binding.py \
	tests/fusion/test_native_step.py tests/ctc/test_search_border.py tests/ctc/test_search_fuzz.py tests/ctc/test_prefix_scores.py \
	tests/ctc/test_lexicon.py tests/ngrams/test_table.py tests/ngrams/test_arpa.py tests/phrases/test_automaton.py \
	tests/scorers/test_token_ranges.py

SANITIZE := -fsanitize=address,undefined -fno-omit-frame-pointer -g

fuzz:  ## random calls of the C++ page pool and beam state under address and undefined-behaviour sanitizers
	mkdir -p build
	$(CXX) -std=c++17 -O1 $(SANITIZE) -Icsrc tests/native/fuzz.cc csrc/page_pool.cc csrc/beam_state.cc csrc/node_arena.cc \
		-o build/fuzz
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 build/fuzz

sanitize: env fuzz  ## the same for all of the C++ core, by the tests of its bindings; takes long to build
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(PYTHON) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(PYTHON) -m tests.sanitized $(SANITIZED)/shallowfusion/_native*.so -x $(NATIVE_TESTS)

bench: env  ## measure on this machine and append to bench/results
	$(PYTHON) -m bench.run --device cpu
	$(PYTHON) -m pytest bench --benchmark-only -o addopts=

clean:
	rm -rf build dist *.egg-info shallowfusion/_native*.so
