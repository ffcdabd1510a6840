# Two commands do everything on a machine that has Python 3.10 or newer and a C compiler: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PEERS ?= .venv-peers
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.[ch] csrc/isa/* pyengine/_native/*.p[yx]* pyengine/_native/*.h)

.PHONY: demo test check wheel bench bench-peers bench-compare soak sanitize clean

demo: $(STAMP) ## install, and stream a text from the bundled model
	$(BIN)/pyengine generate "It was a dark and stormy night" --stats

test: $(STAMP)-test ## install with the test extra, and run the whole suite
	$(BIN)/python -m pytest

check: $(STAMP)-test ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(STAMP)-test ## a wheel in dist/ that needs no compiler; on Linux with its own OpenMP runtime inside
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel
ifeq ($(shell uname),Linux)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
else
	mkdir -p dist && cp build/wheel/*.whl dist
endif

bench: $(STAMP) ## prefill and decode of the bundled model beside the machine's limits
	$(BIN)/pyengine bench

# Heavy, and not part of make test: a venv with the engines of bench/peers.txt beside pyengine. llama.cpp is compiled for
# this CPU, which takes minutes. optimum-intel asks for torchvision, which breaks a torch of another build; nothing here
# needs it.
bench-peers: ## the engines that bench.compare compares with
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	CMAKE_ARGS="-DGGML_NATIVE=ON" CMAKE_BUILD_PARALLEL_LEVEL=2 nice $(PEERS)/bin/python -m pip install --requirement bench/peers.txt
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	$(PEERS)/bin/python -m pip install --quiet --editable ".[bench]"
	@echo "now: make bench-compare, or $(PEERS)/bin/python -m bench.compare --help"

bench-compare: ## the comparison with those engines, into build/bench/results; ARGS= for its arguments
	$(PEERS)/bin/python -m bench.compare $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(STAMP)-test: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(STAMP)

soak: $(STAMP) ## thousands of requests that are cancelled, dropped, refused: nothing is left of them; minutes
	$(BIN)/python -m bench.soak

# Heavy, and not part of make test: the suite under gcc's address and undefined behaviour sanitizers; Python 3.11 or newer.
sanitize:
	$(PYTHON) -m venv .venv-sanitize
	.venv-sanitize/bin/python -m pip install --quiet --upgrade pip
	PYENGINE_CFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover" \
		.venv-sanitize/bin/python -m pip install --quiet ".[test]"
	PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		.venv-sanitize/bin/pytest

clean:
	rm -rf $(VENV) $(PEERS) .venv-sanitize build dist *.egg-info pyengine/_native/*.so
