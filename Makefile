# `make demo` and `make test` work in a fresh clone: they make .venv themselves, from the locked versions.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
LOCK := requirements/lock.txt
# a pip index that has torch's CPU builds, for machines without a GPU; empty: the one pip is set to
TORCH_INDEX ?=
UV_VERSION := 0.13.9
export PATH := $(abspath $(VENV)/bin):$(PATH)
export TOKENIZERS_PARALLELISM := false

DEMO := runs/demo
# the world the demo reports on; never used to choose anything
DEMO_SEED := 20261
# the world that the policy's threshold is fitted to
HELD_OUT_SEED := 20260
POLICY := $(DEMO)/policy.yaml
# the world that an attacker fits a universal picture on
FIT_SEED := 20262
# tests run in so many processes of one thread, a file in one of them
TEST_WORKERS ?= 2
BENCH ?= runs/bench
GPU_PYTHON ?= python3

.PHONY: help demo ablation test lint bench gpu compare profile clean
help:
	@echo "make demo   base model, both stages, a calibrated policy, evaluation: runs/demo/report.html (15 to 22 minutes on 2 CPU cores)"
	@echo "make test   lint, types, import rule and tests"
	@echo "make test-newest, test-oldest   the tests with the newest and the oldest versions that pyproject.toml allows"
	@echo "make lock   remake requirements/*.txt from pyproject.toml and requirements/lock.in"
	@echo "make fuzz   thousands of mutated inputs, kills and damaged files: runs/fuzz (about 15 minutes on 2 CPU cores)"
	@echo "make robustness   after the demo: changed pictures, words around the question, further pictures, a cloak: runs/demo/robustness"
	@echo "make robust   after the demo: attacks on pixels, a tower made robust, the same attacks on it: runs/demo/pixels, runs/robust"
	@echo "make ablation   after the demo: the paper's query, which never sees the text, beside ours"
	@echo "make bench  the fused ops beside what they replace: runs/bench/bench.md (about 10 minutes on 2 CPU cores)"
	@echo "make gpu    gpu tests, the same benchmarks and the step at 7B on a CUDA device: runs/bench (GPU_PYTHON=python to use)"
	@echo "make gpu-step   the last of them, part by part (GPU_STEP_PARTS=\"stage1 stage2 guard\", or fp8)"
	@echo "make compare   the training step beside the official one and stock LLaVA fine-tuning: runs/compare.json (about 9 minutes)"
	@echo "make profile   where the step's time goes, part by part: runs/profile-stage1.json, runs/profile-stage2.json"
	@echo "make guard-cost   what the guard adds to an answer, and a verdict beside a generative guard: runs/guard-cost.json"
	@echo "make pictures   after the demo: the README's two pictures, docs/assets/sandbox.png and docs/assets/speed.png"
	@echo "make clean  remove runs/ (the virtual environment and the sandbox cache stay)"

.PHONY: prerequisites
prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "psa-fast needs python >= 3.10 (set PYTHON=/path/to/python)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "psa-fast needs python >= 3.10; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/a/newer/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module (on Debian: apt-get install python3-venv)"; exit 1; }
	@command -v g++ >/dev/null || { echo "psa-fast needs g++: DeepSpeed compiles a small CPU operator at first use (on Debian: apt-get install g++)"; exit 1; }

# install FOLDER VERSIONS: torch comes first and alone, so that a machine without a GPU can be given the CPU build;
# without build isolation the editable install is built by the pinned setuptools, not by the newest
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint $(2) setuptools wheel
	@if ! command -v nvidia-smi >/dev/null; then echo "no NVIDIA GPU found: installing $(call version,torch,$(2)) first"; \
		$(1)/bin/pip install --quiet --constraint $(2) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch; fi
	$(1)/bin/pip install --quiet --constraint $(2) --no-build-isolation --editable '.[test]'
endef
version = $(shell sed -n 's/^\($(1)==[^ ;]*\).*/\1/p' $(2))

$(STAMP): setup.py pyproject.toml $(LOCK) | prerequisites
	$(call install,$(VENV),$(LOCK))
	@touch $@

# the oldest versions are resolved, the newest are whatever the index has today
.PHONY: lock test-newest test-oldest
lock: | prerequisites
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv==$(UV_VERSION); }
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-lock/bin/uv pip compile --quiet pyproject.toml requirements/lock.in --extra test --extra bench \
		--universal --python-version 3.10 --annotation-style line --upgrade --output-file $(LOCK)
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv-lock/bin/uv pip compile --quiet pyproject.toml --extra test --resolution lowest-direct \
		--universal --python-version 3.10 --annotation-style line --upgrade --output-file requirements/oldest.txt

# a fresh environment each time: what is installed already would keep its versions
test-newest: | prerequisites
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip setuptools
	.venv-newest/bin/pip install --quiet --editable '.[test]'
	.venv-newest/bin/python -m psa_fast.models.versions
	PATH="$(CURDIR)/.venv-newest/bin:$$PATH" OMP_NUM_THREADS=2 .venv-newest/bin/python -m pytest -m "not gpu"

test-oldest: | prerequisites
	rm -rf .venv-oldest
	$(call install,.venv-oldest,requirements/oldest.txt)
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" OMP_NUM_THREADS=2 .venv-oldest/bin/python -m pytest -m "not gpu"

# glibc keeps what is freed, which saves a tenth of the time in page faults
demo: export MALLOC_MMAP_MAX_ = 0
demo: export MALLOC_TRIM_THRESHOLD_ = -1
demo: $(STAMP)
	deepspeed train.py --stage 1 --resume auto
	deepspeed train.py --stage 2 --resume auto
	test -f $(DEMO)/held-out/world.json || psa-fast sandbox data --seed $(HELD_OUT_SEED) --split dev --out $(DEMO)/held-out
	psa-fast calibrate --run $(DEMO) --data $(DEMO)/held-out --target over_refusal=0.015 --out $(POLICY) --batch_size 256 --overwrite
	test -f $(DEMO)/world/world.json || psa-fast sandbox data --seed $(DEMO_SEED) --split test --out $(DEMO)/world
	psa-fast evaluate --data $(DEMO)/world --run $(DEMO) --policy $(POLICY) --out $(DEMO) --batch_size 256 --overwrite
	@echo; echo "report: $(DEMO)/report.html"

# on top of the demo: what gets past its guard
.PHONY: robustness
robustness: $(STAMP)
	test -f $(DEMO)/fit-world/world.json || psa-fast sandbox data --seed $(FIT_SEED) --split test --out $(DEMO)/fit-world
	psa-fast robustness --data $(DEMO)/world --run $(DEMO) --policy $(POLICY) --out $(DEMO)/robustness --suite natural,text,pictures,cloak \
		--fit_data $(DEMO)/fit-world --limit 60

# attacks on pixels, then a tower made robust and the same attacks on that
.PHONY: robust
robust: $(STAMP)
	psa-fast robustness --data $(DEMO)/world --stage stage1=$(DEMO)/stage1 --out $(DEMO)/pixels --suite pixels
	deepspeed train.py --stage 0 --output_dir runs/robust --resume auto
	deepspeed train.py --stage 1 --deepspeed_config ds_configs/zero2.json --model_name_or_path runs/robust/stage0 --output_dir runs/robust \
		--adversarial_weight 1 --adversarial_start 0.6 --resume auto
	psa-fast robustness --data $(DEMO)/world --stage stage1=runs/robust/stage1 --out runs/robust/pixels --suite pixels

# the concept head alone, so the language model is not run
ablation: $(STAMP)
	deepspeed train.py --stage 1 --query first --stage1_objective concept --output_dir runs/query-first --resume auto
	psa-fast evaluate --data $(DEMO)/world --stage query_prompt=$(DEMO)/stage1 --stage query_first=runs/query-first/stage1 --out runs/query-first --overwrite

test: $(STAMP) lint
	PSA_FAST_LOCK=$(LOCK) OMP_NUM_THREADS=1 python -m pytest -m "not gpu" --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		--durations=15

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

# the whole of what `make test` runs a sample of; the figures in docs/reliability.md come from here
.PHONY: fuzz
fuzz: $(STAMP)
	mkdir -p runs/fuzz
	python tests/fuzz/run.py --records 4000 --pictures 3000 --policies 1500 --addons 120 --seed 7 --json runs/fuzz/inputs.json
	python tests/fuzz/damage.py --checkpoints 20 --caches 20 --json runs/fuzz/damage.json
	python tests/fuzz/kills.py --kills 40 --in_save 10 --seed 3 --json runs/fuzz/kills.json
	python tests/fuzz/bench_kills.py --kills 20 --seed 3

# as for the demo; otherwise every fresh gradient of 64 MB costs 25 ms of page faults, twelve times its writing
bench: export MALLOC_MMAP_MAX_ = 0
bench: export MALLOC_TRIM_THRESHOLD_ = -1
bench: $(STAMP)
	$(VENV)/bin/pip install --quiet --constraint $(LOCK) --no-build-isolation --editable '.[test,bench]'
	mkdir -p $(BENCH)
	python -m pytest benchmarks --benchmark-columns=median,min,rounds --benchmark-sort=name --benchmark-json $(BENCH)/bench.json
	python benchmarks/report.py $(BENCH)/bench.json

# offline, with whatever python has torch, triton, pytest and pytest-benchmark installed: GPU machines bring their own
gpu gpu-tests gpu-bench gpu-step: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
.PHONY: gpu-ready gpu-tests gpu-bench gpu-step
gpu:
	@$(MAKE) --no-print-directory --keep-going gpu-tests gpu-bench gpu-step

gpu-ready:
	@$(GPU_PYTHON) -c 'import torch, triton, pytest, pytest_benchmark' || { echo "make gpu: $(GPU_PYTHON) cannot import what is named above; set GPU_PYTHON to a python that can"; exit 1; }
	@$(GPU_PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "make gpu: torch of $(GPU_PYTHON) finds no CUDA device; 'make bench' runs on the CPU"; exit 1; }
	@mkdir -p $(BENCH)

# the kernels' and ops' tests all run there; of the rest only those that need a GPU
gpu-tests: gpu-ready
	$(GPU_PYTHON) -m pytest tests/kernels tests/ops --junitxml $(BENCH)/gpu-tests.xml
	@if $(GPU_PYTHON) -c 'import liger_kernel, psa_fast.training.recompute, psa_fast.models'; \
	then $(GPU_PYTHON) -m pytest -m gpu tests/training/test_language_model.py; \
	else echo "left out: tests/training/test_language_model.py, which needs what is named above"; fi

gpu-bench: gpu-ready
	rm -f $(BENCH)/gpu.json
	$(GPU_PYTHON) -m pytest benchmarks/test_ops.py --benchmark-json $(BENCH)/gpu.json; timed=$$?; \
	test -s $(BENCH)/gpu.json && $(GPU_PYTHON) benchmarks/report.py $(BENCH)/gpu.json && exit $$timed

# the step at 7B's dimensions, each part in a process of its own; a part with a result is skipped, so that it can go on
GPU_STEP_PARTS ?= stage1 stage2 guard
gpu-step: gpu-ready
	@failed=; for part in $(GPU_STEP_PARTS); do \
		timeout 540 $(GPU_PYTHON) benchmarks/gpu_step.py $$part --out $(BENCH) || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "make gpu-step: failed or took more than 9 minutes:$$failed"; exit 1; }

# ours beside the baselines, then the tables' arithmetic; the pages' tables: python benchmarks/speed_tables.py --write
compare: $(STAMP)
	mkdir -p runs
	python benchmarks/compare_step.py --json runs/compare.json

profile: $(STAMP)
	mkdir -p runs
	python benchmarks/profile_step.py --stage 1 --json runs/profile-stage1.json
	python benchmarks/profile_step.py --stage 2 --json runs/profile-stage2.json

# answers under guard beside plain ones, verdicts beside a generative guard
.PHONY: guard-cost
guard-cost: $(STAMP)
	mkdir -p runs
	python benchmarks/guard_cost.py --json runs/guard-cost.json

# what an evaluation kept, and the committed timings: no model is run, nothing is timed
.PHONY: pictures
pictures: $(STAMP)
	psa-fast sandbox picture --run $(DEMO) --data $(DEMO)/world --out docs/assets/sandbox.png
	python benchmarks/speed_plot.py --out docs/assets/speed.png

clean:
	rm -rf runs
