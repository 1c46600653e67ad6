# `make serve` and `make test` set themselves up on a fresh machine: a Python from 3.11 and make are enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
# What releases are made with, in an environment of its own.
TOOLS    := $(VENV)/tools
PINNED   := uv==0.13.9 cyclonedx-bom==7.5.0 pip-audit==2.10.1
COMPILE   = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
            --custom-compile-command "make constraints"
IMAGE_EXTRAS := fp8 otel postgres s3
BUILDER  ?= docker
TAG      ?= srpo
SOURCE   ?=
VERSION   = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# A file of tests is one process's; tests/conftest.py says how many processes there are.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help faults fuzz soak replicas ray operate serve test test-long cuda-dry test-offline browser clients lint docs bench bench-gpu constraints audit sbom dist image image-test clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: $(VENV)/.serve  ## set up, then serve on 127.0.0.1:8000 (options: make serve ARGS="--port 9000")
	@exec $(BIN)/srpo serve $(ARGS)

test: $(VENV)/.test  ## set up, then run the suite (style is a test too): seven to fifteen minutes
	$(PYTEST) $(ARGS)

test-long: $(VENV)/.test  ## the tests that take longest: trainings, compilations, every command of the pages
	$(PYTEST) -m long $(ARGS)

cuda-dry: $(VENV)/.test  ## the engine on a CUDA card that is not there, in FLUX.1's shapes (a part of both suites)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/test_cuda_dry.py $(ARGS)

faults: $(VENV)/.test  ## kill the server ten times among 50 jobs; then a table of what good clients notice of faults (ten minutes of saturation: SATURATION=600)
	FAULTS=50x10 $(BIN)/python -m pytest -m long tests/test_jobs.py -k killed -rP
	OMP_NUM_THREADS=1 $(BIN)/python tests/fault_table.py

fuzz: $(VENV)/.test  ## 100,000 wrong and nearly right requests over raw sockets (fewer: FUZZ=1000), by hand
	$(BIN)/python tests/fuzz_table.py

soak: $(VENV)/.test  ## half an hour of mixed requests, and what grows meanwhile (ten minutes: SOAK=600), by hand
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_table.py

replicas: $(VENV)/.test  ## three servers behind nginx, over one Postgres and one bucket; then a table of what faults cost
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_contract.py --replicas -rs
	OMP_NUM_THREADS=1 $(BIN)/python tests/replica_table.py

ray: $(VENV)/.ray  ## a cluster of Ray Serve on this machine; then a table of what faults cost (more of them: ARGS=--all)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster_table.py $(ARGS)

operate: $(VENV)/.test  ## a real Prometheus beside the server, Caddy and nginx before it (apt-get install them); then twenty sleeps
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m operate -rs $(ARGS)

# What tests install with npm goes into npm's cache before, and is taken from there without asking.
test-offline: $(VENV)/.test  ## both suites where there is no network (Linux, where user namespaces are permitted)
	@! command -v npm >/dev/null || { folder="$$(mktemp -d)" && cp tests/node/package*.json "$$folder" && \
	  npm install --prefix "$$folder" --ignore-scripts --no-audit --no-fund --loglevel=error \
	    @iconify-json/fluent-emoji-flat && rm -rf "$$folder"; }
	NPM_CONFIG_PREFER_OFFLINE=true unshare -rn $(BIN)/python tests/support/loopback_only.py $(BIN)/python -m pytest \
	  -m 'not browser and not image and not operate' $(ARGS)

browser: $(VENV)/.browser  ## set up, then try the pages in Chromium (Debian: sudo apt-get install chromium)
	$(BIN)/python -m pytest -m browser -rs $(ARGS)

clients: $(VENV)/.test  ## install real clients, each on its own, and see which work (a few of them: ARGS=--light)
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients $(ARGS)

lint: $(VENV)/.test  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.serve  ## write the generated tables of docs/ anew
	$(BIN)/python -m docs.tables

bench: $(VENV)/.test  ## our own part of a request's time, beside the bare pipeline's
	$(BIN)/srpo bench load

bench-gpu: $(VENV)/.test  ## all that is to be measured on a GPU, in half an hour; stopped, it goes on where it was
	$(BIN)/python -m bench.gpu $(ARGS)

constraints: $(VENV)/.tools  ## pin what pyproject.toml names, keeping the versions there are (newer ones: ARGS=--upgrade)
	$(COMPILE) --all-extras pyproject.toml --output-file constraints.txt $(ARGS)
	@echo "torch ; sys_platform == 'never'" | $(COMPILE) --generate-hashes --constraint constraints.txt \
	  $(addprefix --extra ,$(IMAGE_EXTRAS)) --override /dev/stdin pyproject.toml --output-file hashes.txt

audit: $(VENV)/.tools  ## ask PyPI for known vulnerabilities of the pinned versions (another service: ARGS="-s osv")
	@report="$$($(TOOLS)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip \
	  --progress-spinner off $(ARGS) 2>&1)"; status=$$?; echo "$$report" | tail -n 60; \
	case "$$status:$$report" in 0:*) ;; *"known vulnerabilit"*) exit 1;; \
	*) echo "Nothing was audited: the service of vulnerabilities cannot be reached, or does not know a package."; exit 1;; esac

sbom: $(VENV)/.serve $(VENV)/.tools  ## write dist/srpo.cdx.json: what is installed in .venv, with versions and licences
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file dist/srpo.cdx.json $(ARGS) $(BIN)/python

dist: $(VENV)/.test  ## write the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation $(ARGS)

image:  ## build the container image with its labels (another builder: BUILDER=buildah; where the source is: SOURCE=...)
	$(BUILDER) build --tag $(TAG) --build-arg VERSION="$(VERSION)" --build-arg SOURCE="$(SOURCE)" \
	  --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null)" --build-arg CREATED="$$(date -u +%Y-%m-%dT%H:%M:%SZ)" $(ARGS) .

image-test: $(VENV)/.test  ## build the Dockerfile, try the server in it (root; apt-get install buildah mmdebstrap)
	$(BIN)/python -m pytest -m image -rs $(ARGS)

clean:  ## remove the environment and caches; models and images stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# The stamps are newer than what they were made from, so a second run installs nothing.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing the server into $(VENV) (torch is large: minutes the first time) ..."
	$(BIN)/pip install --progress-bar on -c constraints.txt -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.serve
	@echo "Installing what the tests need ..."
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.ray: pyproject.toml constraints.txt $(VENV)/.test
	@echo "Installing Ray ..."
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[ray]'
	@touch $@

$(VENV)/.browser: pyproject.toml constraints.txt $(VENV)/.test
	@echo "Installing what the tests in a browser need ..."
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[browser]'
	@touch $@

$(VENV)/.tools: Makefile | $(BIN)/pip
	@$(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip install --quiet $(PINNED)
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; $(PYTHON) is not. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo; \
	  echo "Python's venv module is missing. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
