# Run `make` to see what there is. Every target uses the virtual environment in .venv and makes it
# first where it is missing; it is made again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.run-$(LOCK)
DEV_STAMP := $(VENV)/.dev-$(LOCK)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CODE := dreamer replay_service actors learner deploy benchmarks examples tests
TEST_ARGS ?=
PRESET ?= v3-cartpole
COMPOSE ?= docker compose
SCALE ?= 1
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test lint type test-fast test-faults bench secrets images images-without-docker up down logs rehearse dashboards dashboards-preview links clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV_STAMP) ## install everything for development into .venv

# A development installation can train too; anything less installs only what a run needs.
train: $(if $(wildcard $(DEV_STAMP)),$(DEV_STAMP),$(RUN_STAMP)) ## train DreamerV3 on CartPole (PRESET=… ARGS="--steps 5000" to change it)
	$(BIN)/dreamfleet train --preset $(PRESET) $(ARGS)

test: setup lint type ## everything that CI runs: lint, types, all tests
	$(BIN)/python -m pytest -m "not exhaustive" $(TEST_ARGS)

lint: $(DEV_STAMP) ## style and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

type: $(DEV_STAMP) ## static types
	$(BIN)/mypy

test-fast: $(DEV_STAMP) ## the tests that need neither other processes nor long training
	$(BIN)/python -m pytest -m "not integration and not learning and not faults and not slow" $(TEST_ARGS)

test-faults: $(DEV_STAMP) ## kill, stop, cut off and fill up everything; prints how long recovery takes
	$(BIN)/python -m pytest -m faults $(TEST_ARGS)

bench: $(DEV_STAMP) ## measure learner, replay, actors and the whole pipeline (ARGS="learner --json out.json")
	$(BIN)/dreamfleet bench $(or $(ARGS),all)

secrets: $(if $(wildcard $(DEV_STAMP)),$(DEV_STAMP),$(RUN_STAMP)) ## passwords, settings and data directories for docker compose (ARGS=--rotate replaces passwords)
	deploy/docker/prepare.sh $(BIN)/dreamfleet $(ARGS)

images: ## build the images that docker compose runs
	$(COMPOSE) build $(ARGS)

images-without-docker: ## build the CPU image with Buildah, as root, and run doctor in it (ARGS for `buildah bud`)
	deploy/docker/buildah.sh $(ARGS)

up: secrets ## start everything with docker compose (SCALE=3 for three nodes of actors)
	$(COMPOSE) up --detach --wait --scale actors=$(SCALE)

down: ## stop it; the data stays
	$(COMPOSE) down

logs: ## follow what it says (ARGS=learner for one service)
	$(COMPOSE) logs --follow --tail 100 $(ARGS)

rehearse: $(DEV_STAMP) ## start everything in docker-compose.yml without Docker, kill each part once, take it down
	$(BIN)/python -m deploy.rehearse $(ARGS)

dashboards: $(DEV_STAMP) ## write the Grafana dashboards again from deploy/dashboards.py
	$(BIN)/python -m deploy.dashboards

dashboards-preview: $(DEV_STAMP) ## draw them from a live Prometheus into dashboards.html (ARGS="--prometheus http://host:9090 --minutes 10")
	$(BIN)/python -m deploy.preview $(ARGS)

links: $(DEV_STAMP) ## write the line numbers of links from the documentation into code again
	$(BIN)/python tests/links.py

clean: ## remove the virtual environment and all caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dreamfleet needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): | $(BIN)/python
	$(PIP) -e .
	@rm -f $(VENV)/.run-* && touch $@

$(DEV_STAMP): | $(BIN)/python
	$(PIP) -e '.[cluster,atari,dmc,crafter,minigrid,onnx,dev]'
	@rm -f $(VENV)/.dev-* $(VENV)/.run-* && touch $@ $(RUN_STAMP)
