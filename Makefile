.DEFAULT_GOAL := help
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BASE_PYTHON ?= python3
OLDEST := $(VENV)/transformers-5.17

.PHONY: help env demo test bench lint types check oldest fuzz races sanitize soak clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

env: $(STAMP)  ## create .venv with torch 2.13.0, build the C++ core, install the project there

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cc csrc/*.h)
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet torch==2.13.0 numpy "triton>=3.7" setuptools wheel pybind11
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev,eval]"
	$(PYTHON) -m pip install --quiet --no-deps pyctcdecode pygtrie  # an oracle of the tests; it asks for numpy below 2
	$(PYTHON) -m pip install --quiet --no-deps espnet  # another, of which only the search is imported
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
THREADED := build/threaded
HEADERS := $(wildcard csrc/*.h)
CORE := $(basename $(notdir $(filter-out csrc/bind_%.cc csrc/module.cc,$(wildcard csrc/*.cc))))
BINDINGS := $(basename $(notdir $(wildcard csrc/bind_*.cc) csrc/module.cc))
FUZZERS := $(basename $(notdir $(wildcard tests/native/fuzz*.cc)))
JOBS := $(shell nproc)
NATIVE_TESTS := tests/search/test_beam_state.py tests/search/test_beam_state_border.py \
	tests/search/test_beam_state_properties.py tests/search/test_beam_mirror.py tests/scorers/test_page_pool.py \
	tests/fusion/test_native_binding.py tests/fusion/test_native_step.py tests/ctc/test_search_border.py \
	tests/ctc/test_search_fuzz.py tests/ctc/test_prefix_scores.py tests/ctc/test_lexicon.py tests/ngrams/test_table.py \
	tests/ngrams/test_arpa.py tests/phrases/test_automaton.py tests/scorers/test_token_ranges.py \
	tests/scorers/test_row_rounding.py tests/scorers/test_tile_products.py tests/scorers/test_frame_attention.py tests/test_native_threads.py

COMPILE = $(CXX) -std=c++17 -g1 -fPIC -fno-omit-frame-pointer -fvisibility=hidden -ffp-contract=off -pthread \
	-D_GLIBCXX_ASSERTIONS -Icsrc -Itests/native
CHECKED := -fsanitize=address,undefined,float-cast-overflow
# At more checks or optimisation the templates of pybind11 take several times as long to compile.
LIGHTLY := $(CHECKED) -fno-sanitize=null,alignment,vptr,object-size,nonnull-attribute,returns-nonnull-attribute
UNDEFINED := UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

$(addprefix $(SANITIZED)/,$(addsuffix .o,$(CORE))): $(SANITIZED)/%.o: csrc/%.cc $(HEADERS)
	$(COMPILE) -O1 $(CHECKED) -c $< -o $@

$(addprefix $(SANITIZED)/,$(addsuffix .o,$(FUZZERS))): $(SANITIZED)/%.o: tests/native/%.cc tests/native/fuzz.h $(HEADERS)
	$(COMPILE) -O1 $(CHECKED) -c $< -o $@

$(addprefix $(SANITIZED)/,$(addsuffix .o,$(BINDINGS))): $(SANITIZED)/%.o: csrc/%.cc $(HEADERS)
	$(COMPILE) -O0 $(LIGHTLY) $$($(PYTHON) -m pybind11 --includes) -c $< -o $@

$(addprefix $(THREADED)/,$(addsuffix .o,$(CORE))): $(THREADED)/%.o: csrc/%.cc $(HEADERS)
	$(COMPILE) -O1 -fsanitize=thread -c $< -o $@

$(THREADED)/threads.o: tests/native/threads.cc $(HEADERS)
	$(COMPILE) -O1 -fsanitize=thread -c $< -o $@

$(SANITIZED)/fuzz: $(addprefix $(SANITIZED)/,$(addsuffix .o,$(CORE) $(FUZZERS)))
	$(CXX) $(CHECKED) -pthread $^ -o $@

$(THREADED)/threads: $(addprefix $(THREADED)/,$(addsuffix .o,$(CORE) threads))
	$(CXX) -fsanitize=thread -pthread $^ -o $@

$(SANITIZED)/_native.so: $(addprefix $(SANITIZED)/,$(addsuffix .o,$(CORE) $(BINDINGS)))
	$(CXX) -shared $(CHECKED) -pthread $^ -o $@

fuzz:  ## random calls of the C++ core under address and undefined-behaviour sanitizers
	mkdir -p $(SANITIZED)
	$(MAKE) --no-print-directory -s -j$(JOBS) $(SANITIZED)/fuzz
	$(UNDEFINED) $(SANITIZED)/fuzz

races:  ## calls of the C++ core by several threads at once under the thread sanitizer
	mkdir -p $(THREADED)
	$(MAKE) --no-print-directory -s -j$(JOBS) $(THREADED)/threads
	TSAN_OPTIONS=halt_on_error=1 $(THREADED)/threads

sanitize: env fuzz races  ## both, then the tests of the bindings on a core with the sanitizers
	$(MAKE) --no-print-directory -s -j$(JOBS) $(SANITIZED)/_native.so
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(UNDEFINED) OMP_NUM_THREADS=1 \
		$(PYTHON) -m tests.sanitized $(SANITIZED)/_native.so -x $(NATIVE_TESTS)

soak: env  ## sessions for some minutes: random searches, then threads that submit, cancel and close at once
	$(PYTHON) -m tests.session.soak 2000
	$(PYTHON) -m tests.session.thread_soak 60

bench: env  ## measure on this machine and append to bench/results
	$(PYTHON) -m bench.run --device cpu
	$(PYTHON) -m pytest bench --benchmark-only -o addopts=

clean:
	rm -rf build dist *.egg-info shallowfusion/_native*.so
