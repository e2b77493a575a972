# Two commands: `make quickstart` runs the main job end to end, `make test` runs the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PLAIN := not gpu and not cluster and not soak
RUN := python
unexport PYTHONDONTWRITEBYTECODE# cached bytecode starts every Ray worker seconds faster

.PHONY: quickstart test test-runs test-rest test-fast coverage test-cluster machines machines-down lint typecheck docs format mutants constraints clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m pipelines quickstart $(QUICKSTART_ARGS)

# In two processes, one of them for whole runs, which wait more than they compute. Status 5: none was asked for.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs 2 --output-sync=none test-runs test-rest

test-runs test-rest: $(VENV)/.installed-dev
	$(BIN)/$(RUN) -m pytest -q --durations 12 -p no:cacheprovider -m "$(if $(filter test-rest,$@),not )(e2e or distributed) and $(PLAIN)" $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/yan_core -m "not ray and not distributed and not e2e and not gpu"

# Which branches the tests take: of yan_core's at least 95 %, of the rest's 85.
coverage: export PYTHONPATH := $(CURDIR)# the plugin, in every process
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(MAKE) --no-print-directory test RUN="coverage run"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --include 'yan_core/*' --skip-covered --fail-under 95
	$(BIN)/coverage report --omit 'yan_core/*' --skip-covered --fail-under 85

# Changes of what computes that no test notices. All of them take hours; MUTANTS="yan_core.path.*" picks some by name.
mutants: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[mutants]'
	$(BIN)/mutmut run $(MUTANTS)
	$(BIN)/mutmut results

# Clusters launched for real. The launched ones want root; what is left out for want of a program fails, and it says which.
test-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -rs --no-skips -p no:cacheprovider -m "cluster and not soak" tests/clusters tests/pipelines $(PYTEST_ARGS)

# Three machines of this one for `ray up`: see docs/OPERATIONS.md. What they share outlives `machines`, and ends with `machines-down`.
machines: $(VENV)/.installed
	$(BIN)/python -m tests.clusters.machines up

machines-down: $(VENV)/.installed
	$(BIN)/python -m tests.clusters.machines down

lint: typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev
	$(BIN)/pyright

# The pages that are made, not written.
docs: $(VENV)/.installed
	$(BIN)/python -m pipelines.reference docs
	$(BIN)/python -m pipelines.results docs/results/*.json --page docs/RESULTS.md --short README.md

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp names the folder: a moved environment is made anew, since its scripts hold absolute paths.
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(CURDIR))
$(VENV)/.installed: moved
endif
.PHONY: moved
moved:
$(VENV)/.installed: pyproject.toml constraints.txt
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ]; then rm -rf $(VENV); fi
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version 2>/dev/null || echo $(PYTHON)) does not run or is too old: install Python 3.11, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV) (about two minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[pipelines,serve]'
	@echo "$(CURDIR)" > $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[pipelines,serve,baselines,harness,cluster,dev]'
	@touch $@

constraints: $(VENV)/.installed-dev
	{ echo '# Exact versions of everything, for `pip install -c constraints.txt`. Made by `make constraints`.'; \
	  $(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//'; } > constraints.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
