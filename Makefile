# make demo: a first look, `report: PATH` is its last line.  make test: the whole suite.  make check: before a commit.
# make docs: the site, in site/.  make wheel: builds it, and trains with it in an environment that has nothing else.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
APART := .venv/apart
DEMO := runs/demo
WHEEL := .venv/wheel
SITE = NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs --quiet build --strict

export OMP_NUM_THREADS ?= 1

.PHONY: demo test long check format docs wheel

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "scoreaction needs Python 3.10 or newer; make PYTHON=python3.11 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

# packages that the environment cannot hold: each list in a folder beside it, for one file of tests/apart
$(APART)/%: tests/apart/%.txt $(STAMP)
	rm -rf $@
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target $@ -r $<
	@touch $@

demo: $(STAMP)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "digits: training beside the mixture, log in $(DEMO)/digits.log"
	@$(PY) -m scoreaction train digits --output $(DEMO)/digits > $(DEMO)/digits.log 2>&1 & digits=$$!; \
	$(PY) -m scoreaction compare mixture --algorithms score_action,ddpo --output $(DEMO)/mixture || { kill $$digits; exit 1; }; \
	echo "digits: waiting for it to finish"; \
	wait $$digits || { cat $(DEMO)/digits.log; exit 1; }; \
	tail -n +1 $(DEMO)/digits.log
	@$(PY) -m scoreaction report $(DEMO)

test: $(STAMP)
	$(PY) -m pytest -n 2 --dist worksteal -m "not long"

# beside make test: four processes, faults between processes, networks that processes share, whatever else takes long, rewards
# whose packages the environment cannot hold, and the lines that tests reach
long: $(STAMP) $(APART)/open_clip $(APART)/image_reward $(APART)/bitsandbytes $(APART)/rapidocr
	$(PY) -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m codespell_lib
	$(SITE)
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not long"

format: $(STAMP)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: $(STAMP)
	$(SITE)

wheel: $(STAMP)
	rm -rf dist $(WHEEL) && $(PY) -m build
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt dist/*.whl
	cd $(WHEEL) && bin/scoreaction train mixture train.iterations=2 evaluation.n=256 --output run
