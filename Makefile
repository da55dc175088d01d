PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CORPUS ?= corpus.txt
NAME ?= my-model
BIN := $(VENV)/bin
KERNEL := setup.py $(wildcard service/engine/native/src/*)
ASAN := build/asan

.PHONY: setup serve test test-clients test-clients-all test-deploy lint check kernel-asan kernel-arm train bench lock clean
setup: $(VENV)/.installed
serve: $(VENV)/.server ; $(BIN)/gru-serve serve
test: setup ; $(BIN)/pytest -n auto
test-clients: setup ; TEST_CLIENTS=quick TORCH_INDEX=$(TORCH_INDEX) $(BIN)/pytest --durations=0 --durations-min=1 tests/ecosystem
test-clients-all: setup ; TEST_CLIENTS=all TORCH_INDEX=$(TORCH_INDEX) $(BIN)/pytest --durations=0 --durations-min=1 tests/ecosystem
test-deploy: setup ; TEST_DEPLOY=1 $(BIN)/pytest -s tests/deploy
lint: setup ; $(BIN)/ruff format . && $(BIN)/ruff check --fix .
check: setup ; $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
train: setup ; $(BIN)/gru-serve train --corpus $(CORPUS) --name $(NAME)
bench: setup ; $(BIN)/python -m benchmarks
lock: ; uv pip compile -q --universal --python-version 3.11 --extra dev --no-annotate --no-header --find-links $(TORCH_INDEX)/torch pyproject.toml -o constraints.txt
	for peer in onnxruntime tensorflow forms; do (cd benchmarks/peers && uv pip compile -q --universal --python-version 3.11 --no-annotate --no-header requirements-$$peer.in -o requirements-$$peer.txt) || exit 1; done
clean: ; rm -rf $(VENV) .clients build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Runs the kernel's tests on a build that aborts at the first memory error or undefined behaviour.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
PRELOAD = $(foreach name,libasan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(name)))
kernel-asan: setup
	rm -rf $(ASAN) && mkdir -p $(ASAN) && cp -r service tests model_store setup.py pyproject.toml README.md LICENSE $(ASAN)
	cd $(ASAN) && find . -name '*.so' -delete && CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(ASAN) && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest tests/engine/test_stepper.py tests/engine/test_native.py tests/engine/test_tiles.py::test_tiles__any_number_of_rows_gets_the_bits_of_the_portable_variant

# Runs the kernel's tests on a kernel for ARM64, under an emulator (Debian: g++-aarch64-linux-gnu, g++-s390x-linux-gnu, qemu-user).
# Variants for tests alone, which compute in plain C++, are the same on every processor.
kernel-arm: setup ; TEST_EMULATED=aarch64 $(BIN)/pytest tests/engine/test_stepper.py tests/engine/test_native.py tests/engine/test_emulated.py -k "not reference"

# What the server needs: its libraries and the kernel. Only where the kernel can't be compiled, torch is installed too.
$(VENV)/.server: pyproject.toml constraints.txt $(KERNEL)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("gru-serve needs Python 3.11 or later, and $(PYTHON) is %d.%d: choose another one, such as make PYTHON=python3.12" % v[:2] if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	@if $(BIN)/python -c 'import sys; from service.engine.native.binding import why_not_compiled as why; from service.engine.native.native_stepper import variants; print("kernel:", ", ".join(variants()) or why() or "none"); sys.exit(not variants())'; then :; \
	else echo "There is no kernel that works here. torch is installed instead, which is several times slower."; $(call install,torch); fi
	touch $@

# What training, tests and benchmarks need beyond that.
$(VENV)/.installed: $(VENV)/.server
	$(call install,torch train otel dev)
	touch $@

# Installs extras of pyproject.toml, but not this package again. torch is installed first and alone, so that pip queries the
# CPU index only once and only for torch. If that index can't be reached, this fails quickly, and pip takes the wheel from
# the index that it is configured with.
ifeq ($(shell uname -s),Linux)
TORCH = $(BIN)/pip install -q --retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX) --no-deps "$$(grep -o '^torch==[^ ;]*+cpu' constraints.txt)" &&
endif
EXTRAS = import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*(each for name in sys.argv[1:] for each in extras[name] if not each.startswith("gru-serve")), sep="\n")
install = $(TORCH) $(BIN)/python -c '$(EXTRAS)' $(1) > $(VENV)/extras.txt && $(BIN)/pip install -q -c constraints.txt -r $(VENV)/extras.txt
