# Every target makes what it needs, down to the virtual environment. `make help` lists them.
SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
TINY_PHOTOS := data/tiny/photos
RUN := runs/tiny
# Two processes of one thread are faster than one of two: sums over small tensors do not share well.
PROCESSES ?= $(shell [ "$$(nproc 2>/dev/null || echo 1)" -ge 2 ] && echo 2 || echo 1)
QUESTIONS := data/tiny/questions
JUDGES := $(foreach judge,shape look,$(judge):resnet=tiny_world/weights/judges/$(judge))
# Further options of pbe_train.ablations: make ablations ABLATIONS=--quick
ABLATIONS ?=

# Nothing that is run from here phones home.
export RAY_USAGE_STATS_ENABLED := 0
export NO_ALBUMENTATIONS_UPDATE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup shards app verify train demo evaluate ablations test cluster-check lint format types docs weights clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed ## make .venv with everything in the pinned versions

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(TINY_PHOTOS)/class-descriptions-boxable.csv: | .venv/installed
	$(BIN)/python -m tiny_world.make_photos --out $(TINY_PHOTOS)

shards: .venv/installed $(TINY_PHOTOS)/class-descriptions-boxable.csv ## make the tiny world and build its shards (data/tiny/dataset)
	$(BIN)/python pipelines/build.py --config configs/tiny.yaml

app: .venv/installed ## edit photos in a browser (http://127.0.0.1:7860), and look into the tiny dataset, where it is built
	$(BIN)/pbe app --open $(addprefix --dataset ,$(wildcard data/tiny/dataset))

verify: shards ## read the tiny dataset from end to end: is it whole?
	$(BIN)/python pipelines/verify.py data/tiny/dataset

train: shards ## train the tiny preset on them (runs/tiny); goes on where it stopped
	$(BIN)/torchrun --nproc-per-node $(PROCESSES) pbe_train/train.py --config configs/tiny.yaml

demo: train ## all of it, ending with a picture: source, region, reference, result
	$(BIN)/python -m pbe_train.demo --model $(RUN) --dataset data/tiny/dataset --out $(RUN)/demo.png --guidance 2

evaluate: train ## how good is the model? scores with intervals, and a page (held-out scenes)
	$(BIN)/python -m pbe_train.evaluate --model $(RUN) --dataset data/tiny/dataset --out $(RUN)/evaluation --guidance 2

$(QUESTIONS)/pairs.csv: $(TINY_PHOTOS)/class-descriptions-boxable.csv
	$(BIN)/python -m tiny_world.make_questions --out $(QUESTIONS) --count 240 --seed 1

ablations: shards $(QUESTIONS)/pairs.csv ## the paper's ablations on the tiny world: 5 arms x 3 seeds (runs/ablations); goes on where it stopped
	$(BIN)/python -m pbe_train.ablations --config configs/tiny.yaml --pairs $(QUESTIONS) --judge $(JUDGES) --guidance 2 $(ABLATIONS)

test: .venv/installed ## run the tests, two files at a time (all but the long ones)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: .venv/installed ## run the long tests (12 minutes)
	$(BIN)/python -m pytest -m long

cluster-check: .venv/installed ## builds on real clusters of this machine (2 minutes; needs openssh-server and rsync)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cluster]'
	$(BIN)/python -m tests.cluster.check_cluster

lint: .venv/installed ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed ## mend style where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed ## check types (strict)
	$(BIN)/mypy

docs: .venv/installed ## write docs/data-format.md from the schemas
	$(BIN)/python -m schemas.document > docs/data-format.md

weights: $(TINY_PHOTOS)/class-descriptions-boxable.csv ## train the tiny VAE, encoder and judges anew and measure them (about an hour)
	$(BIN)/python -m tiny_world.train_vae --out tiny_world/weights/vae
	$(BIN)/python -m tiny_world.train_encoder --out tiny_world/weights/encoder
	$(BIN)/python -m tiny_world.train_judges shape --out tiny_world/weights/judges/shape
	$(BIN)/python -m tiny_world.train_judges look --out tiny_world/weights/judges/look
	$(BIN)/python -m tiny_world.measure

clean: ## remove what was made (data/tiny, runs/tiny, runs/ablations), but not .venv
	rm -rf data/tiny runs/tiny runs/ablations
