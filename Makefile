# `make help` lists the targets; each line of it stands above its target here, behind two hashes.
# Another interpreter: make demo PYTHON=python3.12        options for pip: PIP_OPTIONS="--index-url ..."
# A slow or busy machine: make demo DEMO_SECONDS=600, the budget of its training and of its scoring, each
PYTHON ?= python3
PIP_OPTIONS ?=
DEMO_SECONDS ?= 170
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO_DATA := $(PY) prepare_data.py --source stdlib --vocab-size 1024 --val-docs 150 --out data/demo

.PHONY: help venv demo test test-fast audit lint bench clean

## list the targets
help:
	@awk '/^## / { text = substr($$0, 4); next } /^[a-z][a-z-]*:/ && text { split($$0, target, ":"); \
		printf "make %-10s %s\n", target[1], text; text = "" }' $(firstword $(MAKEFILE_LIST))
	@echo "Another interpreter: PYTHON=python3.12; options for pip: PIP_OPTIONS=\"--index-url ...\""
	@echo "A slow or busy machine: make demo DEMO_SECONDS=600, so long for training and for scoring each"

## make the environment .venv, which the other targets make, too
venv: $(READY)

# TRELLIS=0: the cap would hold this model thirty times, so rounding costs nothing, and a CPU takes 5 s an attempt more.
# The second scoring runs in one thread, as recipes/scale_demo.env does: sums in another order may differ in the last digit.
## train, pack and score a tiny model on the CPU through every phase, about six minutes
demo: $(READY)
	$(DEMO_DATA)
	rm -rf runs/demo && mkdir -p runs/demo
	set -a; . recipes/best.env; . recipes/scale_demo.env; set +a; ATTN_WINDOW=64 TRELLIS=0 \
		MAX_WALLCLOCK_SECONDS=$(DEMO_SECONDS) GPTQ_RESERVE_SECONDS=$$(($(DEMO_SECONDS) / 10)) \
		ARTIFACT_DIR=runs/demo LEDGER_PATH=runs/demo/ledger.npy $(PY) train_gpt.py
	@echo; echo "The packed train_gpt.py and model.bin alone, in an empty folder and a clean process:"
	@alone=$$(mktemp -d) && trap 'rm -rf "$$alone"' EXIT && cp runs/demo/train_gpt.py runs/demo/model.bin "$$alone" && cd "$$alone" \
		&& env -i PATH="$$PATH" CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
			DATA_PATH="$(CURDIR)/data/demo" TOKENIZER_PATH="$(CURDIR)/data/demo/tokenizer.model" TTT_EVAL_ONLY=1 \
			"$(CURDIR)/$(PY)" train_gpt.py \
		&& cp eval_result.json "$(CURDIR)/runs/demo/"
	@echo
	$(PY) tools/report.py runs/demo --baselines data/demo --check
	@echo; echo "What the model makes of three beginnings:"; echo
	$(PY) tools/sample.py runs/demo --tokenizer data/demo/tokenizer.model --tokens 60 --prompt "Once upon a time" "def " "class "

## run all tests, some 26 minutes on two cores
test: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

# Without what tests/conftest.py calls slow.
## run the core of every section, about a minute
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

## audit the demo's artifact, which is made first where it is not there
audit: $(READY)
	test -f runs/demo/result.json -a -f data/demo/manifest.json || $(MAKE) demo
	$(PY) tools/audit.py runs/demo --data data/demo

# The limits stand in tools/shape.py.
## run ruff, its formatter's check, the type checker and the limits that train_gpt.py is held to
lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/shape.py --check *.py tools/*.py tools/*/*.py

# On a GPU at the settings of the environment, DATA_PATH among them; on a CPU at the demo's.
# The artifact of a demo, where there is one, goes through the coders.
## run the benchmarks that this machine can run
bench: $(READY)
	for name in caseops ngram; do $(PY) -m tools.bench $$name || exit 1; done
	if test -f runs/demo/model.bin; then $(PY) -m tools.bench codec --artifact runs/demo/model.bin; fi
	if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		names="attention optimizer train startup scaling"; \
		if $(PY) -c 'import sys, torch, train_gpt; sys.exit(not train_gpt.processors(torch.device("cuda"), 9))'; then \
			names="kernels $$names"; fi; \
	else \
		names="attention optimizer startup scaling"; \
		test -f data/demo/manifest.json || $(DEMO_DATA) || exit 1; \
		set -a; . recipes/best.env; . recipes/scale_demo.env; set +a; \
	fi; \
	for name in $$names; do $(PY) -m tools.bench $$name || exit 1; done

## remove the environment, the demo's data and run, and caches
clean:
	rm -rf $(VENV) data/demo runs/demo .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A system Python without ensurepip (Debian's without python3-venv) still has pip, which fills the environment from outside.
# On Linux, plain pip may bring torch's CUDA build, which runs on a CPU as well; PIP_OPTIONS names another index.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }
	$(PY) -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r requirements.txt
	touch $@
