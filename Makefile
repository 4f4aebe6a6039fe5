# Needs make and a Python of 3.11 or newer with pip and venv; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
COMPAT ?= .venv-compat
OLD := $(COMPAT)/bin/python
WORKERS ?= 2
MEMBER ?= cogvideox
unexport PYTHONDONTWRITEBYTECODE # hundreds of processes would compile every module anew
PROMPT ?= a red ball bouncing fast over a gray striped background

.DEFAULT_GOAL := help
.PHONY: help install demo studio docs test types tests test-slow test-wheel test-compat format train-demo evaluate-demo train-zoo bench bench-compare clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("The pinned versions need Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(READY) ## create .venv with the pinned versions and unicp itself (the targets below do it too)

demo: $(READY) ## one accelerated video from the demo model beside its unaccelerated twin, in demo-out/
	@mkdir -p demo-out
	$(BIN)/unicp generate "$(PROMPT)" --compare -o demo-out/demo.mp4

studio: $(READY) ## the page: both videos in step, every decision
	$(BIN)/unicp studio

docs: $(READY) ## the documentation as a site, in site/; links, anchors, commands and examples are checked
	$(BIN)/python -m pytest -q tests/test_docs.py -m "not slow"
	$(BIN)/python -m mkdocs build --strict

test: $(READY) ## linter, formatter, type checker, tests and doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j2 types tests # beside each other: both begin with what keeps one core busy

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/python -m pytest -m "not slow and not wheel" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the tests that take long
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

test-wheel: $(READY) ## builds sdist and wheel, installs the wheel into a clean environment, tries the commands there
	$(BIN)/python -m pytest tests/test_wheel.py

# What is in constraints-oldest.txt counts; the rest is pinned as usual.
$(COMPAT)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	@$(OLD) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(COMPAT)
	awk -F == '/^#/ { next } NR == FNR { old[$$1]; print; next } !($$1 in old)' constraints-oldest.txt constraints.txt > $(COMPAT)/constraints.txt
	$(OLD) -m pip install --disable-pip-version-check -c $(COMPAT)/constraints.txt -e . pytest hypothesis
	@touch $@

test-compat: $(COMPAT)/.installed ## the tests of engine and models with the oldest diffusers that is claimed
	$(OLD) -m pytest -m "not slow" $(addprefix tests/test_,$(addsuffix .py,clock contract variants modular samplers session branches interruptions foreign_hooks lifecycle coverage unicp policies))

format: $(READY) ## format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

train-demo: $(READY) ## train the demo model and write it into src/unicp/demo/model (hours; resumes)
	$(BIN)/python -m training.vae
	$(BIN)/python -m training.latents
	$(BIN)/python -m training.transformer
	$(BIN)/python -m training.export

evaluate-demo: $(READY) ## judge the demo model's videos from their pixels, on captions it never saw
	$(BIN)/python -m training.evaluate

train-zoo: $(READY) ## train one member of the proving ground and write it into zoo/, e.g. MEMBER=latte (hours; resumes)
	$(BIN)/python -m training.zoo.data $(MEMBER)
	$(BIN)/python -m training.zoo $(MEMBER)
	$(BIN)/python -m training.zoo.export $(MEMBER)

bench: $(READY) ## measure on the demo model: wall-clock and quality (some five hours)
	$(BIN)/python -m benchmarks.adacache --prompts 16 --repeats 5 --moreg-scale 0.2028
	$(BIN)/python -m benchmarks.overhead --repeats 10
	$(BIN)/python -m benchmarks.unicp_ablation --prompts 4
	$(BIN)/python -m benchmarks.unicp_ablation --prompts 16 --only planned fewer 'the budget' TaylorSeer PAB 'EDCW online, forecast, delta'
	$(BIN)/python -m benchmarks.unicp_ablation --model cogvideox --prompts 8 --only planned fewer 'the budget' TaylorSeer PAB
	$(BIN)/python -m benchmarks.unicp_ablation --model hunyuan --prompts 8 --only planned fewer 'the budget' TaylorSeer PAB
	$(BIN)/python -m benchmarks.unicp_ablation --model latte --prompts 8 --only planned fewer 'the budget' TaylorSeer PAB
	$(BIN)/python -m benchmarks.unicp_ablation --model ltx --prompts 4
	$(BIN)/python -m benchmarks.unicp_ablation --model ltx --prompts 8 --only planned fewer 'the budget' TaylorSeer PAB
	$(BIN)/python -m benchmarks.unicp_ablation --model wan-large-frame --pixels 256 --prompts 2 --only 'fewer steps (30)' 'planned windows, forecast, 60' 'planned windows, reuse, 60' 'fixed windows, forecast, 60' 'fixed windows, reuse, 60' 'EDCW profiled, forecast, 60' 'EDCW profiled, reuse, 60' 'EDCW profiled, forecast, PCAS and DWS, 60' 'EDCW profiled, reuse, PCAS and DWS, 60' 'EDCW profiled, reuse, PCAS, no DWS, 60' 'EDCW online, forecast, delta=0.1' 'EDCW online, reuse, delta=0.1' PAB 'TaylorSeer of diffusers (cache_interval=2)'
	$(BIN)/python -m benchmarks.unicp_ablation --model wan-large-frame --pixels 320 --prompts 4 --only 'fewer steps (30)' 'the budget'"'"'s default plan, 60%' 'planned windows, forecast, 60%' 'self-attention alone, 1'
	$(BIN)/python -m benchmarks.unicp_ablation --time 3 --only 'planned windows, forecast, 5' 'the budget'"'"'s default plan, 5' 'fewer steps (25)' TaylorSeer
	$(BIN)/python -m benchmarks.unicp_ablation --model ltx --time 3 --only 'planned windows, forecast, 60' 'planned windows, reuse, 60' 'fixed windows, forecast, 60' 'EDCW profiled, forecast, 60' 'EDCW profiled, forecast, PCAS and DWS, 60' 'EDCW profiled, reuse, PCAS and DWS, 60' 'EDCW online, forecast, delta=0.1' 'fewer steps (30)' 'PAB of diffusers (range=2)' 'TaylorSeer of diffusers (cache_interval=2)'
	$(BIN)/python -m benchmarks.unicp_ablation --model wan-large-frame --pixels 320 --time 3 --only 'self-attention alone, 1/1.6'
	$(BIN)/python -m benchmarks.comfyui
	$(BIN)/python -m benchmarks.budget --prompts 32
	$(BIN)/python -m benchmarks.promise
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.plans --prompts 4 --part parts
	$(BIN)/python -m benchmarks.plans --prompts 4 --part override
	$(BIN)/python -m benchmarks.plans --prompts 4 --part transfer --tuned-on 4 16
	$(BIN)/python -m benchmarks.slicing --repeats 3
	$(BIN)/python -m benchmarks.slicing --member wan-large-frame --pixels 400
	$(BIN)/python -m benchmarks.zoo --steps 50 30
	$(BIN)/python -m benchmarks.first_steps
	$(BIN)/python -m benchmarks.few_steps
	$(BIN)/python -m benchmarks.long_runs
	$(BIN)/python -m benchmarks.levers
	$(BIN)/python -m benchmarks.timeline
	$(BIN)/python -m benchmarks.compiled
	$(BIN)/python -m benchmarks.batch --steps 10
	$(BIN)/python -m benchmarks.rehearsal
	$(BIN)/python -m benchmarks.rehearsal --docs
	$(BIN)/python -m benchmarks.readme

bench-compare: $(READY) ## measure every method and peer on the demo model, at 50 and 30 steps (hours; resumes)
	$(BIN)/python -m benchmarks.compare --steps 50
	$(BIN)/python -m benchmarks.compare --steps 30
	$(BIN)/python -m benchmarks.race
	$(BIN)/python -m benchmarks.studio
	$(BIN)/python -m benchmarks.readme

clean: ## remove .venv, caches and demo-out/ (training/runs stays)
	rm -rf $(VENV) $(COMPAT) demo-out site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests training benchmarks zoo -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
