# Everything sets itself up: Python 3.11, git and make are enough.
#
#   make demo    the main job on real data: four modalities, MERA beside fine-tuning
#   make test    all tests
#   make check   lint, types and the fast tests

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
RUNS ?= runs/demo
BIN = $(VENV)/bin
MERA = $(BIN)/mera-ds
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: demo test check install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(MERA) pocket fetch
	for method in expert finetune mera; do \
		test -e $(RUNS)/$$method/config.yaml || \
			$(MERA) init $(RUNS)/$$method --profile pocket --method $$method || exit $$?; \
	done
	$(MERA) run $(RUNS)/expert $(RUNS)/finetune $(RUNS)/mera
	$(MERA) report $(RUNS)/expert $(RUNS)/finetune $(RUNS)/mera --out $(RUNS)/report

test: $(VENV)/installed-dev
	$(PYTEST)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV)
