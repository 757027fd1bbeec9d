# Every target makes its own environment in .venv when needed; no activated environment, no C++ compiler.
#   PYTHON=python3.12   the interpreter that .venv is made with (3.11 or newer)
#   DEMO_ARGS='…'       overrides for the demo, for example DEMO_ARGS='run.overwrite=true method.r=32'
#   PYTEST_ARGS='…'     more for pytest, for example PYTEST_ARGS='-k resume -x'
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
PEERS := .venv/.peers
GPU_PEERS := .venv/.gpu-peers
# What comes with a CUDA build of torch.
CUDA := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
# Seconds that `make gpu` may take.
GPU_BUDGET ?= 3600
# Child processes (ninja, torchrun, afina) are looked up on PATH even when nobody activated .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests run tiny models, several processes at a time: threads would only wait for each other. Demo and benchmarks keep
# torch's own choice.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false WANDB_MODE=offline

.DEFAULT_GOAL := help
.PHONY: help demo test check lint audit lock format bench gpu clean distclean packages

help:
	@echo "make demo    a real fine-tune of the embedded model on real headlines, with the score before and after"
	@echo "make test    everything: lint, types, unit, distributed, end-to-end and Slurm tests (25 to 45 minutes on 2 cores)"
	@echo "make check   lint, types, known vulnerabilities of what is installed, and unit tests (3 to 4 minutes)"
	@echo "make format  let ruff fix what it can"
	@echo "make bench   the benchmarks, with the peers they compare with"
	@echo "make gpu     on a machine with an NVIDIA card: its tests and measurements, into benchmarks/gpu.md (up to an hour)"
	@echo "make clean   caches and build outputs; never runs/. make distclean: .venv too"

# Every file that pip fetches must have a hash of requirements.lock; torch comes by its version alone, because the index
# decides between its CPU and CUDA builds.
$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11 or missing: say make PYTHON=python3.11 (or newer)"; exit 1; }
	@echo "environment: installing into .venv (a few minutes the first time)"
	@test -x $(PY) || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "$(PYTHON) -m venv failed: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@$(PY) -m pip install -qq --no-deps --require-hashes -r requirements.lock
	@$(PY) -m pip install -qq -c constraints.txt torch
	@$(PY) -m pip install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(PEERS): $(INSTALLED)
	@echo "environment: adding the peers that the benchmarks compare with"
	@$(PY) -m pip install -qq -c constraints.txt -e '.[dev,peers]'
	@touch $@

$(GPU_PEERS): $(PEERS)
	@$(PY) -m pip install -qq -c constraints.txt -e '.[dev,peers,gpu]'
	@touch $@

demo: $(INSTALLED)
	.venv/bin/afina train experiment=demo $(DEMO_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Online services say what is known; where none is reached, so does this, and nothing fails.
audit: $(INSTALLED)
	@found=$$(timeout 120 $(PY) -m pip_audit -r requirements.lock --no-deps --disable-pip --progress-spinner off -f json 2>&1); \
	count=$$(grep -o '"vulns"' <<<"$$found" | wc -l); \
	if grep -q '"fix_versions"' <<<"$$found"; then \
	  $(PY) -m pip_audit -r requirements.lock --no-deps --disable-pip --progress-spinner off; exit 1; \
	elif [ "$$count" = 0 ]; then echo "audit: no service that knows vulnerabilities is reached from here"; \
	else echo "audit: $$count packages of requirements.lock, no known vulnerability"; fi

# After a change of pyproject.toml or constraints.txt. Only what torch alone needs is left out, with it.
lock: $(INSTALLED)
	$(PY) -m pip install -qq uv
	$(PY) -m uv pip compile pyproject.toml --extra dev -c constraints.txt --universal --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" -q $(addprefix --no-emit-package ,$(CUDA)) -o requirements.lock

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

check: lint audit
	$(TEST_ENV) $(PY) -m pytest tests/unit -n 2 --dist worksteal -m "not slow and not slurm and not gpu" $(PYTEST_ARGS)

# One pytest run, and nothing after it: its summary line is the last thing said. Two processes: one starts with the tests
# of several ranks, the other with the commands, since most of what these wait for is one core's.
test: lint packages
	$(TEST_ENV) $(PY) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What tests need beside Python: a Slurm to be requeued by, a browser to look at pages with. Quick when they are there.
packages:
	@missing=; has() { command -v "$$1" >/dev/null; }; \
	has slurmctld || missing="$$missing slurmctld"; has slurmd || missing="$$missing slurmd"; \
	has sbatch || missing="$$missing slurm-client"; has munged || missing="$$missing munge"; \
	has chromium || has chromium-browser || has google-chrome || missing="$$missing chromium"; \
	has zsh || missing="$$missing zsh"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && has apt-get; then \
	  echo "tests: installing$$missing"; apt-get update -qq >/dev/null 2>&1; \
	  for package in $$missing; do \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package >/dev/null 2>&1 || \
	      echo "tests: apt-get could not install $$package; the tests that need it will skip"; done; \
	else echo "tests: not on this machine:$$missing; the tests that need them will skip"; fi

bench: $(PEERS)
	@found=0; for script in benchmarks/[!_]*.py; do [ -e "$$script" ] || continue; found=1; \
	  echo "== $$script"; $(PY) "$$script" || exit 1; done; [ $$found = 1 ] || echo "benchmarks/ holds no script yet"

# The card is looked for first: without one nothing is installed. Wheels in .gpu/ mean a machine without a package index.
gpu:
	@command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || { \
	  echo "make gpu needs an NVIDIA card, and nvidia-smi finds none here; on a CPU, tiny shapes try the scripts:"; \
	  echo "  DRY=1 bash benchmarks/gpu/campaign.sh   (benchmarks/gpu/README.md)"; exit 1; }
	@if [ -d .gpu/wheels ]; then python=$(PYTHON); else \
	  $(MAKE) --no-print-directory $(GPU_PEERS) && bash benchmarks/gpu/prepare.sh tokenizer && python=$(PY) || exit 1; fi; \
	rm -f .gpu/out/report.md; \
	PYTHON=$$python BUDGET=$${BUDGET:-$(GPU_BUDGET)} OUT=.gpu/out bash benchmarks/gpu/campaign.sh; code=$$?; \
	if [ -s .gpu/out/report.md ]; then cp .gpu/out/report.md benchmarks/gpu.md; \
	  cp .gpu/out/results.json benchmarks/gpu.json; echo "written: benchmarks/gpu.md and gpu.json"; fi; \
	exit $$code

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf .venv
