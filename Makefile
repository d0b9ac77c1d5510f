# The commands of this project. Each sets up what it needs in .venv and runs from a fresh checkout;
# what is set up already is not set up again. How the extension is built: setup.py.
#
#   make demo      train a character-level language model with torch.nn, then with fusedrnn
#   make test      the test suite
#   make bench     fusedrnn against torch.nn and others, the quick suite: some three minutes
#   make lint      formatting, types and static checks
#   make sanitize  the test suite with AddressSanitizer and UBSan (gcc)
#   make clean     remove .venv and everything built

PYTHON ?= python3
TORCH  ?= torch==2.13.0

SHELL   := /bin/bash
PY      := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
# Build requirements, from the one place that names them.
REQUIRES = $$(sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP     := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES)) $(wildcard tests/*.h tests/cuda_on_cpu/*.[hc]*) \
           $(wildcard benchmarks/*.cu)

.PHONY: demo test bench lint sanitize clean

demo: .venv/bench.stamp
	$(PY) -m benchmarks.workloads.char_lm --cell LSTM

# Two processes of one thread each: half the time of one process. Of two threads each they wait for
# each other's: three times as long. Tests of threads ask for theirs. Files in their order: else those
# of few long tests come last, when the other process has none left.
test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: .venv/bench.stamp
	$(PY) -m benchmarks run --suite quick

# Left out of clang-tidy: two files that are the templates of the other ISAs once more, a third of
# the time.
lint: .venv/lint.stamp
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	.venv/bin/cmake -S csrc -B build/lint -DCMAKE_BUILD_TYPE=Release \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(CURDIR)/$(PY) >/dev/null
	sed -n 's/.*"file": "\(.*\.cpp\)".*/\1/p' build/lint/compile_commands.json | \
	  grep -v -e /isa_avx512.cpp -e /isa_amx_high.cpp | \
	  xargs -P 2 -n 1 .venv/bin/clang-tidy --quiet -p build/lint

# The whole suite but the build's own tests, under AddressSanitizer and UBSan. The extension is
# rebuilt in place, so the stamps go first: the next target builds the ordinary one again.
# SANITIZE adds arguments of pytest, as in: make sanitize SANITIZE='-k lstm'
sanitize: .venv/test.stamp
	rm -f .venv/test.stamp .venv/bench.stamp .venv/lint.stamp
	CXX=g++ CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -g' \
	  $(INSTALL) --no-build-isolation --editable '.[test]'
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(PY) -m pytest --capture=sys \
	  --ignore=tests/test_build.py $(SANITIZE)

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .*_cache fusedrnn/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/torch.stamp:
	$(PYTHON) -m venv .venv
	$(INSTALL) '$(TORCH)'
	touch $@

.venv/requires.stamp: .venv/torch.stamp pyproject.toml
	$(INSTALL) $(REQUIRES)
	touch $@

# One stamp per extra of pyproject.toml. Editable, so that an import from here finds the extension
# that was just built and a change of Python needs no install; without build isolation, so that
# objects are reused and compile_commands.json names headers that stay.
.venv/%.stamp: .venv/requires.stamp $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	touch $@
