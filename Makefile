# `make demo` and `make test` set up everything they need in .venv; nothing else on the machine is
# touched. `make test-all` also wants Debian's Chromium, to try the page of `apollo serve` in.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all browser lint clean

demo: $(STAMP)
	$(BIN)/apollo demo --out runs/demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(STAMP) lint browser
	$(BIN)/python -m pytest

browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	  || echo "no Chromium could be installed: the tests of the page are skipped"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy apollo

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
