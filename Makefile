# The whole workflow. `make` alone lists the targets; each may be run on a fresh clone with nothing but Python 3.10+ and git.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
EXTRAS := server,plots,methods,dev
STAMP := $(VENV)/.installed
# Passed to every pip install: a proxy, an index of CPU-only torch wheels, ...
PIP_ARGS ?=
# What `make serve` hands to `patchbay serve`, and `make test` to pytest.
ARGS ?=

# The interpreter: PYTHON=... or the first of these that runs and is new enough (3.11 is the one CI uses).
find_python = for p in $(PYTHON) python3.11 python3.12 python3.13 python3.10 python3 python; do \
	if "$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null; then echo "$$p"; exit 0; fi; done; \
	echo "patchbay needs Python 3.10 or newer; none found. Install one, or say make PYTHON=/path/to/python" >&2; exit 1

# The oldest toolchain whose output every supported protobuf and grpcio accept: docs/decisions/0001-gencode-toolchain.md
PROTO_VENV := .venv-proto
PROTO_STAMP := $(PROTO_VENV)/.installed-1.66.2
PROTO_TOOLS := grpcio-tools==1.66.2 grpcio==1.66.2 protobuf==5.29.6 setuptools==75.8.0
GENCODE := client/patchbay/v1

# What the lock must obey. torch has no local part (+cpu), so that both the plain registry's wheel and a CPU-only one fit.
LOCK_VENV := .venv-lock
LOCK_PINS := torch==2.13.0

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## make .venv with everything, from constraints.txt (once; again when they change)
	@:

$(STAMP): pyproject.toml constraints.txt
	@python=$$($(find_python)); \
	if ! $(PY) -c 'import pip' 2>/dev/null; then \
	  "$$python" -m venv --clear $(VENV) || { echo "could not make $(VENV) (on Debian: apt install python3-venv)" >&2; exit 1; }; \
	fi; \
	echo "installing into $(VENV) with $$($(PY) --version) (once; 1 to 3 minutes, log in $(VENV)/install.log)"; \
	start=$$SECONDS; \
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[$(EXTRAS)]' >$(VENV)/install.log 2>&1 \
	  || { tail -n 25 $(VENV)/install.log >&2; echo "the install failed; all of it is in $(VENV)/install.log" >&2; exit 1; }; \
	if [ -f tests/chart/install-tools.sh ]; then \
	  bash tests/chart/install-tools.sh >>$(VENV)/install.log 2>&1 \
	    || echo "note: the chart's tools could not be fetched (end of $(VENV)/install.log); its tests will say so"; \
	fi; \
	echo "installed in $$((SECONDS - start)) s"; \
	touch $@

.PHONY: demo
demo: $(STAMP) ## start the service, run the demo from a separate client, write demo-report.html, stop it all
	@$(PY) -m patchbay_server.demo

.PHONY: test
test: $(STAMP) ## the whole test suite (ARGS="-k name" for a part)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(ARGS)

.PHONY: lint
lint: $(STAMP) $(PROTO_STAMP) ## every static check: ruff, mypy, import contracts, buf, spelling, gencode up to date
	@$(MAKE) -k ruff types contracts proto-lint breaking spelling gencode-check

# Each part of lint by itself; lint goes on after a failure, so that one run shows everything.
.PHONY: ruff types contracts proto-lint spelling
ruff: $(STAMP)
	@status=0; $(VENV)/bin/ruff check . || status=1; $(VENV)/bin/ruff format --check . || status=1; exit $$status
types: $(STAMP)
	$(PY) -m mypy
contracts: $(STAMP)
	$(VENV)/bin/lint-imports --no-cache
proto-lint: $(STAMP)
	$(VENV)/bin/buf lint proto
spelling: $(STAMP)
	$(VENV)/bin/codespell

.PHONY: format
format: $(STAMP) ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The wire contract may only grow: it is compared with the last release's, once there is one.
.PHONY: breaking
breaking: $(STAMP)
	@tag=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null || true); \
	if [ -n "$$tag" ]; then \
	  echo "buf breaking proto, against $$tag"; \
	  $(VENV)/bin/buf breaking proto --against ".git#tag=$$tag,subdir=proto"; \
	else echo "buf breaking: no release tag yet, nothing to compare with"; fi

$(PROTO_STAMP):
	@python=$$($(find_python)); echo "making $(PROTO_VENV) (the oldest supported protobuf toolchain)"; \
	"$$python" -m venv --clear $(PROTO_VENV); \
	$(PROTO_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) $(PROTO_TOOLS) >$(PROTO_VENV)/install.log 2>&1 \
	  || { tail -n 25 $(PROTO_VENV)/install.log >&2; exit 1; }; \
	touch $@

# $(1): the folder that stands for client/
protoc = $(PROTO_VENV)/bin/python -W ignore::UserWarning -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $$(find proto -name '*.proto' | LC_ALL=C sort)

.PHONY: proto
proto: $(PROTO_STAMP) ## regenerate client/patchbay/v1 from proto/
	@rm -f $(GENCODE)/*_pb2.py $(GENCODE)/*_pb2.pyi $(GENCODE)/*_pb2_grpc.py
	@$(call protoc,client)
	@echo "wrote $$(ls $(GENCODE)/*_pb2* | wc -l) files to $(GENCODE)"

.PHONY: gencode-check
gencode-check: $(PROTO_STAMP)
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; $(call protoc,"$$fresh"); \
	diff -r -x __pycache__ -x __init__.py "$$fresh/patchbay/v1" $(GENCODE) \
	  || { echo "$(GENCODE) is not what proto/ generates: run make proto and commit the result" >&2; exit 1; }; \
	echo "gencode is up to date"

.PHONY: serve
serve: $(STAMP) ## keep a service with the embedded model running (ARGS="--model ... --port ...")
	@$(VENV)/bin/patchbay serve $(ARGS)

.PHONY: docs
docs: $(STAMP) ## regenerate what is written from the code: pages, the editors' stub of pb.ops, the chart's schema
	@$(PY) -m patchbay_server.docs
	@$(PY) -m benchmarks --page
	@$(PY) -m patchbay.tracing.stubs client/patchbay
	@$(VENV)/bin/ruff format --quiet client/patchbay/ops.pyi client/patchbay/tracing/typed.pyi
	@$(PY) deploy/generate_chart.py

.PHONY: demo-model
demo-model: $(STAMP) ## train the embedded model again from its seed (under 20 minutes on 2 cores)
	@$(PY) -m patchbay_server.models.demo.train $(ARGS)

.PHONY: lock
lock: ## resolve constraints.txt anew, for every supported Python and platform
	@python=$$($(find_python)); [ -x $(LOCK_VENV)/bin/uv ] || { "$$python" -m venv $(LOCK_VENV); \
	  $(LOCK_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) uv; }
	@{ echo "# Exact versions of everything that \`make venv\` installs; every install in the Makefile obeys it."; \
	   echo "# Written by \`make lock\` (one resolution for all supported Pythons and platforms); do not edit."; \
	   echo "# Held back there: $(LOCK_PINS)."; } >constraints.txt.new
	@echo '$(LOCK_PINS)' | tr ' ' '\n' | $(LOCK_VENV)/bin/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.10 --upgrade \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --constraint - >>constraints.txt.new
	@mv constraints.txt.new constraints.txt; echo "constraints.txt: $$(grep -c == constraints.txt) pins"

# TransformerLens pins and brings much that nothing else needs: it gets an environment of its own.
TL_VENV := .venv-transformerlens
TL_STAMP := $(TL_VENV)/.installed-4.3.0

$(TL_STAMP): constraints.txt
	@python=$$($(find_python)); echo "making $(TL_VENV) (TransformerLens beside Patchbay; some minutes)"; \
	"$$python" -m venv --clear $(TL_VENV); \
	$(TL_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 transformer-lens==4.3.0 \
	  >$(TL_VENV)/install.log 2>&1 || { tail -n 25 $(TL_VENV)/install.log >&2; exit 1; }; \
	$(TL_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e . \
	  >>$(TL_VENV)/install.log 2>&1 || { tail -n 25 $(TL_VENV)/install.log >&2; exit 1; }; \
	touch $@

.PHONY: compare-transformerlens
compare-transformerlens: $(TL_STAMP) ## compare every site name shared with TransformerLens on the same weights
	@$(TL_VENV)/bin/python benchmarks/sites_against_transformerlens.py

# nnsight by itself, and the client by itself: their sizes are measured, so nothing else may lie beside them.
NN_VENV := .venv-nnsight
NN_STAMP := $(NN_VENV)/.installed-0.8.1
THIN_VENV := .venv-thin
THIN_STAMP := $(THIN_VENV)/.installed

$(NN_STAMP):
	@python=$$($(find_python)); echo "making $(NN_VENV) (nnsight; some minutes)"; \
	"$$python" -m venv --clear $(NN_VENV); \
	$(NN_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 nnsight==0.8.1 \
	  >$(NN_VENV)/install.log 2>&1 || { tail -n 25 $(NN_VENV)/install.log >&2; exit 1; }; \
	touch $@

$(THIN_STAMP): pyproject.toml constraints.txt
	@python=$$($(find_python)); echo "making $(THIN_VENV) (the client alone)"; \
	"$$python" -m venv --clear $(THIN_VENV); \
	$(THIN_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt . \
	  >$(THIN_VENV)/install.log 2>&1 || { tail -n 25 $(THIN_VENV)/install.log >&2; exit 1; }; \
	touch $@

.PHONY: bench
bench: $(STAMP) $(TL_STAMP) $(NN_STAMP) $(THIN_STAMP) ## measure every figure of docs/performance.md, peers beside (ARGS=--quick: under 5 minutes)
	@$(THIN_VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps --force-reinstall . \
	  >$(THIN_VENV)/install.log 2>&1 || { tail -n 25 $(THIN_VENV)/install.log >&2; exit 1; }
	@$(PY) -m benchmarks --place transformerlens=$(TL_VENV)/bin/python --place nnsight=$(NN_VENV)/bin/python \
	  --place client=$(THIN_VENV)/bin/python $(ARGS)

.PHONY: clean
clean: ## remove everything that make made here
	rm -rf $(VENV) $(PROTO_VENV) $(LOCK_VENV) $(TL_VENV) $(NN_VENV) $(THIN_VENV) .bench .tools build dist demo-report.html \
	  .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
