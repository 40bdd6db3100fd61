# `make run` and `make test` are all a newcomer needs: both set up first.
SHELL := bash
GALDIST := .venv/bin/galdist

.PHONY: run test setup lint slow slurm-test docs benchmarks clean

run: setup  ## set up, then run the quickstart
	$(GALDIST) run quickstart

test: setup lint  ## set up, then test: two files at a time, those that start ranks first
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: setup  ## the tests that take minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow

slurm-test: setup  ## the tests that need Slurm, with a real one on this machine while they run
	OMP_NUM_THREADS=1 slurm/dev/with .venv/bin/python -m pytest -m "slow or not slow" tests/slurm

setup:  ## build .venv (nothing to do when it is up to date)
	@./install.sh .venv

lint: setup  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: setup  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

benchmarks: setup  ## measure, and write docs/benchmarks.md
	OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/run.py

clean:  ## remove what was built here (runs/ stays)
	rm -rf .venv site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
