# Everything runs in a virtual environment. The README has the same commands without make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each test sets torch to one thread, so two processes keep two cores busy. Fixtures of a file are made once.
WORKERS := -n 2 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint examples slow chaos bench bench-distributed floor clean

demo: $(VENV)/examples.stamp  ## install, train a real model on real data, and say where to look
	$(BIN)/python examples/digits.py

test: $(VENV)/dev.stamp  ## run the fast tests, in a few minutes
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

slow: $(VENV)/dev.stamp  ## the tests that `make test` leaves out: examples at full length, packaging
	$(BIN)/python -m pytest -m slow

chaos: $(VENV)/dev.stamp  ## kill training processes at random and at every write, rename and event, and compare with runs that were not: hours; one kind with ARGS='-k bf16', fewer writes with CHAOS_WRITES=8
	CHAOS_KILLS=200 $(BIN)/python -m pytest -s tests/chaos $(ARGS)

lint: $(VENV)/dev.stamp  ## check style, types, and that generated files are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

examples: $(VENV)/examples.stamp  ## run every example at its full length
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example || exit 1; done

bench: $(VENV)/bench.stamp  ## measure the cost of a step beside the hand-written loop and other trainers; rewrites docs/performance.md
	for part in overhead dispatch memory imports checkpoint; do $(BIN)/python -m benchmarks.$$part --save || exit 1; done

bench-distributed: $(VENV)/bench.stamp  ## the same for two processes, five minutes, and their exchanges; rewrites docs/performance.md and docs/scaling.md
	for part in distributed scaling; do $(BIN)/python -m benchmarks.$$part --save || exit 1; done

floor: $(VENV)-floor/stamp  ## run the fast tests with the oldest versions that setup.cfg admits
	$(VENV)-floor/bin/python -m pytest -m "not slow" $(WORKERS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/examples.stamp: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP) install -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP) install -c constraints.txt -e ".[examples,test,dev]"
	touch $@

$(VENV)/bench.stamp: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP) install -c constraints.txt -e ".[bench]"
	touch $@

$(VENV)-floor/stamp: setup.cfg constraints-floor.txt
	$(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip --disable-pip-version-check -q install -c constraints-floor.txt -e ".[examples,test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
