# make demo   the main job on a real model, from nothing
# make test   all tests
# make test-cpp   the C++ tests, also under sanitizers and on a second llama.cpp; minutes, cached
# make lint   ruff, mypy, clang-format
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-cpp lint format reference bench clean

demo: $(VENV)/.user
	$(BIN)/longrope-export demo

# in the order of the files, tests/integration with its long ones first: a worker's last file is then a short one
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cpp: $(VENV)/.dev
	$(BIN)/python scripts/test_cpp.py $(TEST_CPP)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@files=$$(find cpp_patch -name '*.h' -o -name '*.cpp'); \
	  if [ -n "$$files" ]; then $(BIN)/clang-format --dry-run --Werror $$files; fi

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.dev
	$(BIN)/python scripts/update_reference.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/gguf_export.py --workdir bench

# what a user needs, with plots and cmake
$(VENV)/.user: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plots,build]'
	touch $@

# plus what the tests and checks need, at the versions they were last seen to pass with
$(VENV)/.dev: pyproject.toml requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt -e '.[plots,build,hub,onnx]'
	touch $@ $(VENV)/.user

clean:
	rm -rf $(VENV) longrope-demo bench dist .mypy_cache .ruff_cache .pytest_cache
