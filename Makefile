# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out/quickstart

.PHONY: install quickstart test test-long lint docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskmill needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

quickstart: install
	rm -rf $(OUT)
	$(BIN)/maskmill pack configs/quickstart_pack.yaml output.uri=$(OUT)/shards
	$(BIN)/maskmill train configs/train/quickstart.yaml output.uri=$(OUT)/model
	$(BIN)/maskmill label configs/quickstart.yaml source.uri=$(OUT)/shards models.0.weights=$(OUT)/model/checkpoint output.uri=$(OUT)/labels
	$(BIN)/maskmill preview $(OUT)/labels --n 16 --out $(OUT)/preview.png
	$(BIN)/maskmill status $(OUT)/labels
	$(BIN)/maskmill report $(OUT)/labels

# Three processes of tests share the cores (docs/decisions/0006), and Ray's workers would otherwise give way to them.
test test-long: export GOMP_SPINCOUNT ?= 3000
test test-long: export RAY_worker_niceness ?= 0
# Ray's tests wait half of the time, so others run beside them; what those behind the first print comes at the end.
APART := tests/models tests/report tests/training
test: install
	@mkdir -p out
	@$(BIN)/python -m pytest tests/ray > out/test-ray.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest $(APART) > out/test-apart.log 2>&1 & apart=$$!; \
	$(BIN)/python -m pytest $(addprefix --ignore=,tests/ray $(APART)); others=$$?; \
	wait $$ray; ray=$$?; wait $$apart; apart=$$?; cat out/test-apart.log out/test-ray.log; \
	exit $$((ray + apart + others))

# Deaths, full disks, failing storage and submitted jobs: each starts several clusters or drivers.
test-long: install
	$(BIN)/python -m pytest tests/ray -m long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install
	$(BIN)/maskmill bench

clean:
	rm -rf out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
