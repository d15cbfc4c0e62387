# make bench | bench-layers | bench-step | accuracy | test | simulated-gpu | static | fuzz | sanitize | demo |
# gpu-report | lint | docs | hub | wheel | matrix: each first creates .venv.
#
#   TORCH=torch==2.13.0   the torch to install
#   PY=python3            an existing environment instead of .venv: nothing is downloaded, missing rivals are skipped
#   DATA=path             for accuracy: a folder of images, or a zip file of one, with train/CLASS and test/CLASS
#   OUT=folder            where gpu-report makes a folder for the machine, instead of benchmarks/results

TORCH ?= torch
VENV ?= .venv
ifdef PY
INSTALLED := build/installed-in-$(subst /,_,$(PY))
PYTEST = $(PY) -m pytest
TOOLS :=
INSTALL = $(PY) -m pip install --no-build-isolation --no-deps -e .
else
PY := $(VENV)/bin/python
# Two processes, whose OpenMP threads sleep while they wait: spinning would take CPU time from the other process.
PASSIVE = OMP_WAIT_POLICY=passive
PARALLEL = -n 2 --dist worksteal
PYTEST = $(PASSIVE) $(PY) -m pytest $(PARALLEL)
INSTALLED := $(VENV)/installed
TOOLS := $(INSTALLED)
# torch first, so that the library is built against it, not against a second one in pip's build environment.
INSTALL = $(PY) -m pip install -q "$(TORCH)" && $(PY) -m pip install -q "$(TORCH)" -e ".[test,libraries,bench,lint,docs,release]"
$(INSTALLED): $(VENV)/bin/python
endif
# Editable, because the repository's root shadows an installed package; reinstalled when one of these changes.
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
MINUTES ?= 5
EXAMPLES ?= 1000000

.PHONY: bench bench-layers bench-step accuracy test simulated-gpu static fuzz sanitize demo gpu-report lint docs hub wheel matrix format clean

bench: $(INSTALLED)
	$(PY) -m benchmarks.align

bench-layers: $(INSTALLED)
	$(PY) -m benchmarks.conv_layers

bench-step: $(INSTALLED)
	$(PY) -m benchmarks.step

# Trains a part of benchmarks/accuracy again, within an hour on two cores, and compares it with the records.
accuracy: $(INSTALLED)
	$(PY) -m benchmarks.accuracy repeat --data "$(DATA)"

test: $(INSTALLED)
	$(PYTEST)

# Without a GPU: what runs on CUDA devices, on two simulated ones (tests/simcuda). Of that, what is about devices on one
# alone, and what is about values where the host cannot read a device's memory.
SIMULATED = $(PASSIVE) $(PY) tests/simcuda/simcuda.py
simulated-gpu: $(INSTALLED)
	$(SIMULATED) --devices 2 python -m pytest $(PARALLEL)
	$(SIMULATED) --devices 1 python -m pytest $(PARALLEL) tests/test_cuda.py tests/test_backend.py
	$(SIMULATED) --devices 2 --strict python -m pytest $(PARALLEL) $(addprefix tests/test_,cuda.py several_devices.py \
	    align.py prepare.py)

# Registers, spills and sizes of the compiled CUDA kernels, for every architecture in the library.
static: $(INSTALLED)
	$(PY) -m benchmarks.machine_code --static

# The Hypothesis tests on random examples: on every backend, then on the CPU's other sets of instructions, each for
# MINUTES or until each test has had EXAMPLES. What failed before (.hypothesis) comes first. `make fuzz SEED=...` repeats a
# run, the blob that a failure prints (for @reproduce_failure) a single example.
FUZZ = WEIGHTALIGN_FUZZ_EXAMPLES=$(EXAMPLES) WEIGHTALIGN_FUZZ_MINUTES=$(MINUTES) $(PYTEST) -m hypothesis \
    --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)
OTHERS = ['baseline', 'avx2', 'avx512'][:{'AVX2': 1, 'AVX512': 3}.get(torch.backends.cpu.get_cpu_capability(), 0)]
fuzz: $(INSTALLED)
	$(FUZZ)
	for set in $$($(PY) -c "import torch; print(*$(OTHERS))"); do WEIGHTALIGN_CPU=$$set $(FUZZ) -k cpu || exit 1; done

# Tests on a library compiled with g++'s sanitizers: addresses and undefined behaviour, then races (tests/sanitize.py).
sanitize: $(INSTALLED)
	$(PASSIVE) $(PY) tests/sanitize.py address,undefined
	$(PASSIVE) $(PY) tests/sanitize.py thread

demo: $(INSTALLED)
	$(PY) -m benchmarks.demo

# On a GPU, in ten minutes: builds for it alone, tests, measures, judges. With PY nothing is installed, pip not needed.
gpu-report: $(TOOLS)
	$(PY) -m benchmarks.gpu_report $(if $(OUT),--out "$(OUT)")

# With PY nothing is installed, as above.
CLANG_FORMAT = $(dir $(shell command -v $(PY)))clang-format
lint: $(TOOLS)
	@$(PY) -c "import mypy, ruff, torch" 2>/dev/null && test -x $(CLANG_FORMAT) || \
	    { echo "make lint needs torch, ruff, mypy and clang-format in the environment of $(PY)"; exit 1; }
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

# The documentation, in build/site. Nothing is fetched; a broken link or anchor is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f docs/mkdocs.yml

# The sources as Hugging Face's kernel-builder wants them, in build/hub.
hub: $(TOOLS)
	$(PY) csrc/hub/layout.py

# The wheel of a release, for other machines, in build/wheel.
wheel: $(TOOLS)
	.ci/wheel $(PY)

# The tests of one wheel on many versions of Python and torch, then those of the CPU kernels by other compilers, and on
# aarch64: hours. MATRIX=3.13t:2.15.0 is one of the former alone.
matrix: $(INSTALLED)
	.ci/matrix $(MATRIX)
	$(if $(MATRIX),,.ci/compilers && .ci/aarch64)

format: $(TOOLS)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(CLANG_FORMAT) -i $(CPP)

clean:
	rm -rf build out $(VENV)

$(VENV)/bin/python:
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip

$(INSTALLED): $(SOURCES)
	$(INSTALL)
	mkdir -p $(@D)
	touch $@
