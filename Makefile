# Everything a user or a contributor types. Needs Python 3.11 and make; each target makes .venv first if it has to.
.DEFAULT_GOAL := help
.PHONY: help install serve test check check-deploy container-test gpu-check bench soak lock clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# cuda when a GPU answers, else cpu. To choose by hand: make serve DEVICE=cpu
ifndef DEVICE
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
LOCK := requirements/$(DEVICE).lock
STAMP := .venv/.installed-$(DEVICE)
PIP_INSTALL := $(BIN)/pip install --no-deps --disable-pip-version-check

# Empty means the command's own default (`ultrafuser serve --help`). Plain `=`: some shells export HOST.
HOST =
PORT =
FUSION =
ARGS =
BENCHMARKS = decode_step metrics_cost gate_kinds prefill speculation placement serve_overhead fleet peers batch_invariance data_throughput report

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv from the lock file (DEVICE=cpu or cuda; default: what the machine has)

serve: $(STAMP) ## Serve a fused model: HOST=, PORT=, FUSION= (a preset or a file), ARGS= (any option of `ultrafuser serve`)
	@exec $(BIN)/ultrafuser serve $(FUSION) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(STAMP) ## Run the tests in two processes: ARGS= goes to pytest, e.g. ARGS="-n 0 -k gate" for one
	@exec $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

check: $(STAMP) ## Check format, style, the arrows between rooms, and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/mypy

check-deploy: $(STAMP) ## Check the files of deploy/ with the tools they are for, fetched once; says what could not be run
	@exec $(BIN)/python -m deploy.checks

container-test: $(STAMP) ## Build the image and run the deployment on a container engine (half an hour); ARGS= goes to pytest
	@exec $(BIN)/python -m pytest -n 0 -x -s -m container $(ARGS) tests/container

gpu-check: $(STAMP) ## On a machine with a GPU: is it exact, and what does fusing cost there? ARGS= e.g. ARGS="--quick"
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)
	@$(BIN)/python -m benchmarks.gpu_step $(ARGS)

bench: $(STAMP) ## Run the benchmarks: BENCHMARKS= names some of them, ARGS= goes to each
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

soak: $(STAMP) ## Send a server 20,000 requests, a fifth of whose clients leave; ARGS= e.g. ARGS="--quick"
	@exec $(BIN)/python -m benchmarks.soak $(ARGS)

lock: ## Compile requirements/*.lock again (needs uv, and torch's CPU builds: see requirements/compile)
	@sh requirements/compile

clean: ## Remove .venv, build output and tool caches (downloaded and prepared models stay in their cache)
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: it is the one package a plain index may lack, and this says so before the rest is downloaded.
define TORCH_HINT

torch could not be installed; pip's own message is above. If it was not found: the CPU build is on PyTorch's CPU
wheel index, not in the default one. Its address is on PyTorch's install page (choose "CPU"). Then:
    PIP_EXTRA_INDEX_URL=<address of the CPU wheel index> make $(MAKECMDGOALS)
endef
export TORCH_HINT

$(STAMP): $(LOCK) pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "UltraFuser needs Python 3.11 or newer. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Making .venv"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing $(LOCK) into .venv (the first time takes a few minutes)"
	@$(PIP_INSTALL) $$(grep '^torch==' $(LOCK)) || { test $(DEVICE) = cuda || echo "$$TORCH_HINT" >&2; exit 1; }
	@$(PIP_INSTALL) -r $(LOCK)
	@$(PIP_INSTALL) --quiet --no-build-isolation -e .
	@rm -f .venv/.installed-* && touch $@
