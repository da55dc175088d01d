PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CORPUS ?= corpus.txt
NAME ?= my-model
BIN := $(VENV)/bin

.PHONY: setup serve test lint check train bench lock clean
setup: $(VENV)/.installed
serve: setup ; $(BIN)/gru-serve serve
test: setup ; $(BIN)/pytest
lint: setup ; $(BIN)/ruff format . && $(BIN)/ruff check --fix .
check: setup ; $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
train: setup ; $(BIN)/gru-serve train --corpus $(CORPUS) --name $(NAME)
bench: setup ; for it in train decode http; do $(BIN)/python -m benchmarks.$$it || exit 1; done
lock: ; uv pip compile -q --universal --python-version 3.11 --extra dev --no-annotate --no-header --find-links $(TORCH_INDEX)/torch pyproject.toml -o constraints.txt
clean: ; rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone: only it is looked up on the CPU index, once, so an index that can't be reached costs a
# moment, and the wheel may then come from wherever pip is configured to look.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(shell uname -s),Linux)
	$(BIN)/pip install -q --retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX) --no-deps "$$(grep -o '^torch==[^ ;]*+cpu' constraints.txt)"
endif
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
