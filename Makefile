# Each target makes its own .venv on a machine that has only Python 3.11+ and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# Each worker begins with half of the tests in their order, so that a module's fixtures are made once.
PARALLEL := -n $(WORKERS) --dist worksteal
VERSIONS ?= oldest newest
ARGS ?=

.PHONY: demo test test-all test-versions test-engines zoo test-gpu check docs soak sanitize static format bench clean

demo: .venv/demo.installed
	$(BIN)/fqcompile demo $(ARGS)

# The quick tier: every kind of thing, five minutes on two cores.
test: .venv/dev.installed
	$(BIN)/pytest $(PARALLEL) $(ARGS)

test-all: .venv/dev.installed
	$(BIN)/pytest $(PARALLEL) --all $(ARGS)

# All tests on the oldest and on the newest versions that pyproject.toml allows, each in its own venv.
test-versions: $(foreach v,$(VERSIONS),.venv-$(v)/dev.installed)
	for v in $(VERSIONS); do .venv-$$v/bin/pytest $(PARALLEL) --all $(ARGS) || exit 1; done

.venv-%/dev.installed: pyproject.toml constraints-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e '.[dev]'
	touch $@

# vLLM, SGLang and llm-compressor, which pin other versions than ours: 5 GB in venvs of their own.
test-engines: .venv/dev.installed .venv-engines/engines.installed .venv-llmcompressor/engines.installed
	$(BIN)/pytest --all $(ARGS) tests/interop/test_engines.py tests/interop/test_engine_verdicts.py \
	tests/interop/test_llmcompressor.py tests/interop/test_sglang.py

.venv-engines/engines.installed: requirements-engines.txt
	test -x .venv-engines/bin/python || $(PYTHON) -m venv .venv-engines
	.venv-engines/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-engines.txt
	touch $@

.venv-llmcompressor/engines.installed: Makefile
	test -x .venv-llmcompressor/bin/python || $(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/pip install --quiet --disable-pip-version-check \
	llmcompressor==0.14.0.1 torch==2.13.0+cpu
	touch $@

# Architectures of other libraries, some of timm and diffusers where these are installed.
zoo: .venv/dev.installed
	$(BIN)/pytest -m zoo tests/zoo $(ARGS)

test-gpu: .venv/dev.installed
	$(BIN)/pytest -m gpu $(ARGS)

check: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_house.py

# The site, in build/site; a link that leads nowhere fails. The pages stay where they are, and are
# linked from one folder, so that relative links hold in the repository and on the site.
PAGES := README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs bench
docs: .venv/docs.installed
	mkdir -p build/pages
	for page in $(PAGES); do ln -sfn ../../$$page build/pages/$$page; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict --quiet)

# 20,000 calls, 300 models, and ten minutes of threads, writes and forks; ARGS="--minutes 1" for less.
soak: .venv/dev.installed
	FQCOMPILE_CACHE_SIZE=0 $(BIN)/python -m tests.soak $(ARGS)

# The C++ for x86 under the address and undefined-behavior sanitizers, every path that is here. What
# they find ends pytest, and would be lost with its captured output.
sanitize: .venv/dev.installed
	FQTEST_SANITIZE=1 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 $(BIN)/pytest -s $(ARGS) \
	tests/kernels/cpu/test_stream.py tests/kernels/cpu/test_stream_experts.py \
	tests/kernels/cpu/test_stream_bounds.py tests/kernels/cpu/test_attention.py \
	tests/native/test_operator.py tests/quant/test_native_quantizer.py

static: .venv/dev.installed
	$(BIN)/python -m bench static --check $(ARGS)

format: .venv/dev.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/bench.installed
	$(BIN)/python -m bench $(or $(ARGS),short)

.venv/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info
