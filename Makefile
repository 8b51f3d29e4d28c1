# `make try` and `make test` work on a fresh machine with Python 3.11: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: try test test-slow check style

try: .venv/try.done  ## draw a picture and ask about it, with the embedded checkpoint
	$(BIN)/hydra generate "a cat" --out cat.png
	$(BIN)/hydra ask cat.png "what is in the picture?" | tee answer.txt

test: .venv/test.done
	$(BIN)/pytest

test-slow: .venv/test.done
	$(BIN)/pytest -m slow

check: .venv/test.done  ## lint and format
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks

style: .venv/test.done
	$(BIN)/ruff check --fix src tests examples benchmarks
	$(BIN)/ruff format src tests examples benchmarks

.venv/try.done: setup.cfg
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q -e . && touch $@

.venv/test.done: setup.cfg
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q -e ".[test,quality]" && touch $@ .venv/try.done
