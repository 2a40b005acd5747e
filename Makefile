# Every target is one command of the console script or of a developer tool, run in .venv, which is made once.
#
# Options are set on the command line only (an exported RUN or NODES of another program has no effect):
#   RECIPE=name|path  NODES=n  RUN=name  ARGS="--set key=value …"     for pretrain
#   RUN=name  ARGS="--set key=value …"                                for posttrain: the run whose export it starts from
#   REPEAT=n          how often test-cluster runs its tests; it stops at the first failure
#   VENV=path         use that environment as it is: nothing is made or installed (GPU machines with a torch of their own)
RECIPE = $(if $(NODES),smollm3-3b,tiny)
NODES =
RUN =
ARGS =
VENV =
REPEAT = 1

# One word of the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
METRICS = runs/$(or $(RUN),latest-export)/metrics.jsonl
PRETRAIN_OPTIONS = $(if $(NODES),--nodes $(call quoted,$(NODES))) $(if $(RUN),--run $(call quoted,$(RUN))) $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

ifneq ($(VENV),)
BIN := $(call quoted,$(VENV)/bin)
PYTHON := env PYTHONPATH=$(call quoted,$(CURDIR)) $(BIN)/python
CLI := $(PYTHON) -P -c 'from launch.cli.main import main; main()'
READY :=
READY_DEV :=
else
BIN := .venv/bin
PYTHON := $(BIN)/python
CLI := $(BIN)/nanotron-recipes
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
endif

PIP_INSTALL = .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
PIP_POSTTRAINING = .venv-posttraining/bin/python -m pip install -qq --disable-pip-version-check --no-input \
    -c posttraining/constraints.txt

.PHONY: help pretrain posttrain test test-tiny test-long test-gpu test-cluster test-posttraining cluster-tools lint \
    bench-train bench-checkpoint bench-loader bench-tokenize eval-env docs docs-images

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-19s%s\n", $$1, $$2}' Makefile

pretrain: $(READY)  ## text → tokens → training → a Hugging Face folder   [RECIPE=] [NODES=] [RUN=] [ARGS=]
	@$(CLI) pretrain $(call quoted,$(RECIPE)) $(PRETRAIN_OPTIONS)

posttrain: .venv-posttraining/.ready  ## an export → an assistant, with a report (under eight minutes)   [RUN=] [ARGS=]
	@name=$(call quoted,$(or $(RUN),latest-export)); \
	if ! [ -d "runs/$$name/export" ]; then \
	    echo "error: runs/$$name has no export; run make pretrain first, or name another run with RUN=" >&2; exit 2; \
	fi; \
	run=runs/$$(basename "$$(readlink -f "runs/$$name")"); \
	.venv-posttraining/bin/posttraining pipeline tiny \
	    --set "model=$$run/export" --set "output_dir=$$run/posttraining" $(ARGS)

test: $(READY_DEV)  ## every unit and property test, one case of every distributed behaviour (ten to twenty minutes)
	@$(PYTHON) -m pytest $(ARGS)

test-tiny: $(READY_DEV)  ## the first command of the README, whole, and what it must reach (four minutes)
	@$(PYTHON) -m pytest -m tiny tests/launch/test_tiny.py $(ARGS)

test-long: $(READY_DEV)  ## the whole matrices, torture and the real 3B
	@$(PYTHON) -m pytest -m long --timeout 7200 $(ARGS)

test-gpu: $(READY_DEV)  ## the same engine on CUDA; with VENV= it needs no network
	@$(PYTHON) -m pytest -m gpu --timeout 1800 $(ARGS)

test-cluster: cluster-tools $(READY_DEV)  ## on a real Slurm of three nodes on this machine, as root (twelve minutes)   [REPEAT=]
	@case $(call quoted,$(REPEAT)) in ''|0*|*[!0-9]*) echo 'REPEAT: a whole number above 0 is needed' >&2; exit 2;; esac; \
	passed=0; while [ $$passed -lt $(REPEAT) ]; do \
	    $(PYTHON) -m pytest -m cluster --timeout 900 $(ARGS) || { \
	        code=$$?; echo "test-cluster: round $$((passed + 1)) of $(REPEAT) failed, $$passed passed" >&2; exit $$code; }; \
	    passed=$$((passed + 1)); \
	done; echo "test-cluster: $$passed of $(REPEAT) rounds passed"

test-posttraining: .venv-posttraining/.ready-dev  ## the other distribution, in its own environment (under 15 minutes)
	@cd posttraining && ../.venv-posttraining/bin/python -m pytest -m 'chain or not chain' $(ARGS)

# Debian's packages; root has them installed, others are told.
CLUSTER_PACKAGES = slurm-wlm munge iproute2 shellcheck

cluster-tools:
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; for tool in slurmctld slurmd srun munged ip shellcheck; do \
	    command -v $$tool >/dev/null || missing="$$missing $$tool"; \
	done; [ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "test-cluster needs$$missing. As root: apt-get install $(CLUSTER_PACKAGES)" >&2; exit 2; \
	fi; \
	echo 'Installing $(CLUSTER_PACKAGES) (half a minute, once) …'; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    $(CLUSTER_PACKAGES) >/dev/null

lint: $(READY_DEV)  ## ruff, mypy and the import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@bin=$(BIN); case $$bin in /*) ;; *) bin=$$PWD/$$bin ;; esac; cd posttraining && "$$bin/mypy"
	@PYTHONPATH=posttraining/src $(BIN)/lint-imports --no-cache

# Its peer, transformers, is what exported models are checked with and so in .venv already: no .venv-bench is needed.
bench-train: $(READY)  ## tokens/s of ours beside a bare loop over transformers; our optimizer beside nanotron's
	@$(PYTHON) benchmarks/train_step.py $(ARGS)
	@$(PYTHON) benchmarks/optimizer_step.py

bench-checkpoint: $(READY)  ## what a save costs a step and a run; saving, loading and resharding beside torch.save
	@$(PYTHON) benchmarks/checkpoint.py $(ARGS)

bench-loader: .venv-bench/.ready  ## tokens per CPU-second of ours beside datatrove, Megatron-core and LitData; a late start
	@.venv-bench/bin/python benchmarks/loader.py $(ARGS)
	@.venv-bench/bin/python benchmarks/published_plan.py

bench-tokenize: $(READY)  ## what tokenize costs above encode_batch alone; two workers on one file
	@$(PYTHON) benchmarks/tokenization.py $(ARGS)

eval-env: .venv-eval/.ready  ## lighteval, for `evaluate --benchmarks` and lighteval.tasks, in .venv-eval

docs: $(READY)  ## write the pages that are made from the code again
	@$(PYTHON) -m nanotron_recipes.key_reference
	@$(PYTHON) -m parallel.adaptations

docs-images: $(READY)  ## draw the README's picture from a complete run   [RUN=]
	@$(PYTHON) -m launch.train.loss_plot $(call quoted,$(METRICS)) docs/images/tiny-loss.png

.venv/.ready: setup.cfg pyproject.toml constraints.txt
	@set -e; for python in python3 python3.13 python3.12 python3.11 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	    if [ $$python = python ]; then echo 'Python 3.11 or newer is needed, and none was found.' >&2; exit 2; fi; \
	done; \
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $$python -m venv .venv
	@echo 'Installing nanotron-recipes and what it runs on into .venv (one to two minutes, once) …'
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.ready-dev: .venv/.ready
	@echo 'Installing the test and lint tools into .venv (a few seconds, once) …'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

.venv-bench/.ready: .venv/.ready benchmarks/loader-peers.txt
	@echo 'Installing what the benchmarks compare with into .venv-bench (two minutes, once) …'
	@.venv-bench/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e .
	@.venv-bench/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt \
	    --no-deps -r benchmarks/loader-peers.txt
	@touch $@

# Of its own: lighteval brings a hundred packages, and wants versions of some that ours must not have.
.venv-eval/.ready: .venv/.ready launch/evaluate/lighteval.txt
	@echo 'Installing lighteval into .venv-eval (a few minutes, once) …'
	@.venv-eval/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv .venv-eval
	@.venv-eval/bin/python -m pip install -qq --disable-pip-version-check --no-input -r launch/evaluate/lighteval.txt
	@touch $@

# The other distribution's: TRL and what it brings.
.venv-posttraining/.ready: posttraining/setup.cfg posttraining/pyproject.toml posttraining/constraints.txt
	@set -e; for python in python3 python3.13 python3.12 python3.11 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	    if [ $$python = python ]; then echo 'Python 3.11 or newer is needed, and none was found.' >&2; exit 2; fi; \
	done; \
	.venv-posttraining/bin/python -m pip --version >/dev/null 2>&1 || $$python -m venv .venv-posttraining
	@echo 'Installing post-training and what it runs on into .venv-posttraining (one to two minutes, once) …'
	@$(PIP_POSTTRAINING) -e posttraining
	@touch $@

.venv-posttraining/.ready-dev: .venv-posttraining/.ready
	@echo 'Installing the test tools into .venv-posttraining (a few seconds, once) …'
	@$(PIP_POSTTRAINING) -e 'posttraining[dev]'
	@touch $@
