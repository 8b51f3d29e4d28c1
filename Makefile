# `make try` and `make test` work on a fresh machine with Python 3.11: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip --disable-pip-version-check
TESTS ?= tests
OLDEST = sed -nE 's/^ *(transformers|diffusers)>=([^,]+),.*/\1==\2/p' setup.cfg

.PHONY: try test test-slow test-gpu test-upstream test-oldest test-latest check style docs

try: .venv/try.done  ## draw a picture and ask about it with the embedded checkpoint
	$(BIN)/hydra generate "a cat" --out cat.png
	$(BIN)/hydra ask cat.png "what is in the picture?" | tee answer.txt
	@echo "Left here: cat.png (the picture), answer.txt (the answer), .venv (the installed package; delete it to start anew)"

test: .venv/test.done
	$(BIN)/pytest -n 2 --dist loadfile $(TESTS)

test-slow: .venv/test.done
	$(BIN)/pytest -m slow

test-oldest: .venv-oldest/done  ## with the oldest transformers and diffusers that setup.cfg allows
	.venv-oldest/bin/python -m pytest $(TESTS)

test-latest: .venv-latest/done  ## with the newest of everything that setup.cfg allows
	.venv-latest/bin/python -m pytest $(TESTS)

test-upstream: .venv/test.done  ## transformers' and diffusers' own tests on our classes, from their source archives
	$(BIN)/python tests/upstream/fetch.py
	$(BIN)/pytest tests/upstream -rs

test-gpu: .venv/test.done  ## on a machine with a GPU: its tests, then its checks and measurements
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/gpu.py

check: .venv/test.done  ## lint and format
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs

style: .venv/test.done
	$(BIN)/ruff check --fix src tests examples benchmarks docs
	$(BIN)/ruff format src tests examples benchmarks docs

docs: .venv/docs.done  ## the documentation, in site/, in which a warning is an error; its notebooks run
	$(BIN)/pytest -m slow -k notebook tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/try.done: setup.cfg constraints.txt
	@echo "Installing into .venv; PyTorch alone is several gigabytes, so this takes minutes."
	$(PYTHON) -m venv .venv && $(PIP) install -qq -c constraints.txt -e . && touch $@

.venv/test.done: setup.cfg constraints.txt
	@echo "Installing into .venv; PyTorch alone is several gigabytes, so this takes minutes."
	$(PYTHON) -m venv .venv && $(PIP) install -qq -c constraints.txt -e ".[test,quality]" && touch $@ .venv/try.done

.venv/docs.done: .venv/test.done
	$(PIP) install -qq -c constraints.txt -e ".[docs]" && touch $@

.venv-oldest/done: .venv/test.done
	$(call venv_on_top,.venv-oldest)
	$(PIP) --python .venv-oldest/bin/python install -qq -e ".[test]" $$($(OLDEST))
	touch $@

.venv-latest/done: .venv/test.done
	$(call venv_on_top,.venv-latest)
	$(BIN)/pip freeze | grep -E "^torch(vision)?==" > .venv-latest/torch.txt
	$(PIP) --python .venv-latest/bin/python install -qq -U --upgrade-strategy eager -c .venv-latest/torch.txt -e ".[test]"
	touch $@

# A venv that takes from .venv what it has not installed itself, so that torch is on the disk once.
define venv_on_top
$(PYTHON) -m venv --clear --without-pip $(1)
$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
endef
