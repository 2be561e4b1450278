# `make demo` and `make test` set up everything they need in .venv; nothing else has to be installed but Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# One BLAS thread for each test process: threads of two processes on the same cores slow each other down. A file stays with
# one process, so that what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

AUDITED := clipscore pickscore hpsv2 aesthetic

.PHONY: demo test test-slow test-app lint docs bench bench-trl paper playground-tables parity clean help

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: .venv/installed  ## Tune the playground pipeline on the CPU; leaves a before/after picture in runs/demo
	$(BIN)/rewardtune demo --overwrite

test: .venv/installed  ## The quick tests
	$(PYTEST) -m "not slow"

test-slow: .venv/docs  ## The long checks: training over several seeds, full grids, the documentation site
	$(PYTEST) -m slow

test-app: build/app/installed  ## The page of `rewardtune app` with gradio, in an environment of its own: gradio wants an older Pillow
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 build/app/venv/bin/python -m pytest tests/test_app.py

build/app/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/app/venv
	grep -v '^pillow==' constraints.txt > build/app/constraints.txt
	build/app/venv/bin/python -m pip install -q -c build/app/constraints.txt torch
	build/app/venv/bin/python -m pip install -q -c build/app/constraints.txt -e '.[dev,demo]'
	touch $@

lint: .venv/installed  ## Format, lint and type check
	$(BIN)/ruff format --check src tests benchmarks examples parity mkdocs_hooks.py
	$(BIN)/ruff check src tests benchmarks examples parity mkdocs_hooks.py
	$(BIN)/mypy

docs: .venv/docs  ## The documentation site, in build/site; a dead link or an address of another server is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	NO_MKDOCS_2_WARNING=1 $(PYTEST) -n 0 tests/test_site.py

bench: .venv/installed  ## Speed over the floor, memory against K, two processes against one; the rewards' scales, loopholes and JPEG; an hour of tuned seeds
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/trials.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/reward_scales.py
	$(BIN)/python benchmarks/loopholes.py
	$(BIN)/python benchmarks/jpeg.py
	$(BIN)/python benchmarks/raise_rewards.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/reward_hacking.py
	$(BIN)/python benchmarks/regularisers.py
	$(BIN)/python benchmarks/sharing.py

bench-trl: .venv/installed build/trl/installed  ## The same updates by TRL 0.19's AlignPropTrainer, in an environment of its own
	$(BIN)/python benchmarks/against_trl.py

build/trl/installed: benchmarks/trl_requirements.txt
	$(PYTHON) -m venv build/trl/venv
	build/trl/venv/bin/python -m pip install -q -r benchmarks/trl_requirements.txt
	touch $@

playground-tables: .venv/installed  ## The playground measured: its quality, its world, its rewards and their taste
	$(BIN)/python -m rewardtune.playground.quality
	$(BIN)/python -m rewardtune.playground.world --prompts 48
	$(BIN)/python -m rewardtune.playground.reward_quality
	$(foreach name,$(AUDITED),$(BIN)/rewardtune audit $(name) -o model=playground --output docs/results/audit_$(name) &&) true

paper: .venv/installed  ## The paper's table and figures on the playground: what is missing of them (many CPU hours)
	for experiment in table1 fig4 fig5 fig6 fig7 fig8 fig9 spacing earlystop newer; do $(BIN)/rewardtune bench $$experiment || exit; done

parity: .venv/installed build/parity/installed  ## The rewards against the official packages, in an environment of their own
	build/parity/venv/bin/python parity/official.py
	$(BIN)/python parity/compare.py

build/parity/installed: parity/requirements.txt parity/official.txt
	$(PYTHON) -m venv build/parity/venv
	build/parity/venv/bin/python -m pip install -q -r parity/requirements.txt
	build/parity/venv/bin/python -m pip install -q --no-deps -r parity/official.txt
	touch $@

clean:  ## Remove the environment
	rm -rf .venv

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rewardtune needs Python >= 3.11: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
