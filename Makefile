# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out/quickstart

.PHONY: install quickstart test lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskmill needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

quickstart: install
	rm -rf $(OUT)
	$(BIN)/maskmill pack configs/quickstart_pack.yaml output.uri=$(OUT)/shards
	$(BIN)/maskmill label configs/quickstart.yaml source.uri=$(OUT)/shards output.uri=$(OUT)/labels
	$(BIN)/maskmill preview $(OUT)/labels --n 16 --out $(OUT)/preview.png
	$(BIN)/maskmill status $(OUT)/labels
	$(BIN)/maskmill report $(OUT)/labels

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python tests/benchmarks/efficiency.py

clean:
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
