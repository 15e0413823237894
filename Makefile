# make setup | demo | test | lint | bench | gpu | gpu-static | gpusim | fuzz | clean
# (`make test ARGS="-k cache"` passes arguments to pytest)

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.setup-done
ARGS   ?=

# PyTorch goes first and is then held: asked for by range, pip prefers a CPU build where one is on offer (a local
# version sorts above the plain one), and torchvision must fit it, not replace it. For a CUDA build:
# make setup TORCH=torch
TORCH  ?= torch>=2.11,<2.14

.PHONY: setup demo test lint bench gpu gpu-static gpusim fuzz clean
setup: $(STAMP)

$(STAMP): Makefile pyproject.toml setup.py tools/torchvision_cpu.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip list --format=freeze | grep '^torch==' > $(VENV)/held.txt
	$(PY) -m pip install --quiet --editable '.[dev]' --constraint $(VENV)/held.txt
	$(PY) tools/torchvision_cpu.py
	touch $@

# Several thread pools share the cores (torch's, the kernels', two test workers): waiting threads must sleep, not spin.
demo: setup
	OMP_WAIT_POLICY=passive $(PY) examples/demo.py

test: setup
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal -q $(ARGS)
	$(PY) tests/wheel_check.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/typecheck.py

# about twenty minutes on two cores: bench/results/*/*.json, docs/performance*.md and their pictures
# (`make bench ARGS="test_models"`: whole models beside timm's and torchvision's alone; `python docs/make_models.py` shows them)
bench: setup
	$(PY) -m bench $(ARGS)

# on a GPU, made to end within eight minutes (not timed yet): every library pattern's correctness, then its speed beside its peers;
# bench/results/gpu-*.json and docs/performance-gpu-*.md. Status 2 and one line where there is no GPU
gpu: setup
	$(PY) -m bench.gpu $(ARGS)

# random programs on every backend against the float64 meaning; what is found wrong becomes a test (tests/fuzzed)
MINUTES ?= 10
fuzz: setup
	OMP_WAIT_POLICY=passive $(PY) tests/fuzz.py --minutes $(MINUTES)

# the library's kernels compiled for named GPUs and read as machine code: docs/gpu-static.json, and docs/gpu-static.md from it.
# What is there and has not changed is kept; from nothing it is about an hour of two cores. ARGS="--page" writes the page alone
gpu-static: setup
	$(PY) -W ignore docs/make_gpu_static.py $(ARGS)

# every library pattern, forward and backward, float16 and bfloat16, as compiled PTX in the simulator; a JSON line a case, errors in
# units of the budget. SIM: the simulator's folder
SIM ?= ../shared/tools/gpusim
gpusim: setup
	for arch in 80 90; do TRITON_INTERPRET=0 $(PY) -W ignore tests/triton_cases.py library --sim $(SIM) $$arch || exit 1; done

clean:
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
