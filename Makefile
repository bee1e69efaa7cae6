# Everything from a bare Debian 12 or Ubuntu 24.04 on: each target prepares what it needs, and a second call does not again.
PYTHON ?= python3
.PHONY: help setup image demo test lint

help:
	@echo 'make demo    the whole pipeline on a small problem set, with a small model: runs/demo/report/index.html'
	@echo 'make test    the everyday tests that this machine can run'
	@echo 'make lint    ruff, mypy --strict and shellcheck'
	@echo 'make setup   Python packages into .venv, and a Docker engine'
	@echo 'make image   the sandbox image'

setup:
	@command -v $(PYTHON) > /dev/null || { echo 'setup: there is no $(PYTHON). Install Python 3.11 or newer.' >&2; exit 3; }
	@$(PYTHON) -m fractal.install.setup

image: setup
	@.venv/bin/python -m fractal.images.build

demo: setup
	@.venv/bin/invoke demo

test: image
	@.venv/bin/invoke test

lint: setup
	@.venv/bin/invoke lint
