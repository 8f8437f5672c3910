# `make quickstart` and `make test` set up everything that a fresh machine needs.
# To keep your own torch (GPU users):  make test CONSTRAINTS=
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_VENV ?= .venv-docs

.PHONY: quickstart test demo test-min test-latest lint docs slow dist mutants fuzz soak results paraphrases replication step-cost faults clean

quickstart: $(STAMP)
	$(BIN)/python -m eval.quickstart --out runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

# A page in the browser: the VL-JEPA that comes with the package, and two films of its world. No training.
demo: $(STAMP)
	$(BIN)/python -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[demo]"
	test -f runs/demo/stream_1.mp4 || $(BIN)/python -m llm_jepa.synthetic.shapestream --out runs/demo --streams 2
	$(BIN)/llm-jepa demo shapestream --example runs/demo/stream_0.mp4 --example runs/demo/stream_1.mp4

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow"

# Would a test fail if a line were wrong? Half an hour for the modules that compute losses, batches, scenes and checkpoints.
mutants: $(STAMP)
	$(BIN)/python -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev,mutants]"
	$(BIN)/python -m tests.mutants --out eval/results/faults/mutants.json

# Do any bytes make a reader or a grader fail? Ten minutes for each of seven targets.
fuzz: $(STAMP)
	$(BIN)/python -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev,fuzz]"
	$(BIN)/python -m pytest -q -m slow tests/fuzz

# Does a run of 10,000 steps grow, or leave anything behind? Ten minutes.
soak: $(STAMP)
	$(BIN)/python -m eval.faults.soak --out eval/results/faults/soak.json

# The same tests with the oldest versions that pyproject.toml allows, and with the newest that the package index has, each in
# an environment of its own. For the newest torch too:  make test-latest CONSTRAINTS=
test-min:
	$(MAKE) test VENV=.venv-min CONSTRAINTS=constraints-min.txt

test-latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest

# The source archive and the wheel, in dist/.
dist: $(STAMP)
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m eval.report --check

# The documentation as a site that needs no server: site/index.html. Its environment has neither torch nor this package,
# because docstrings are read from the source.
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# Repeat the committed NL-RX runs:  make results NL_RX=path/to/nl_rx
results: $(STAMP)
	$(if $(NL_RX),,$(error set NL_RX to the folder with synth_train.jsonl, synth_test.jsonl, turk_train.jsonl, turk_test.jsonl))
	$(BIN)/python -m eval.experiments.tiny_nl_rx --data $(NL_RX)
	$(BIN)/python -m eval.report

# The planned experiment on unlabelled paraphrases (an hour and a half on two cores) and the published comparison at the
# size of a CPU (about as long). You can stop and restart both:  make paraphrases NL_RX=path/to/nl_rx
paraphrases: $(STAMP)
	$(if $(NL_RX),,$(error set NL_RX to the folder with synth_train.jsonl, synth_test.jsonl, turk_train.jsonl, turk_test.jsonl))
	$(BIN)/python -m eval.experiments.paraphrases prepare --data $(NL_RX)
	$(BIN)/python -m eval.experiments.paraphrases confirm
	$(BIN)/python -m eval.experiments.paraphrases analyse

replication: $(STAMP)
	$(if $(NL_RX),,$(error set NL_RX to the folder with synth_train.jsonl, synth_test.jsonl, turk_train.jsonl, turk_test.jsonl))
	$(BIN)/python -m eval.experiments.replication compare --data $(NL_RX)
	$(BIN)/python -m eval.experiments.replication analyse

# The cost of a step compared with plain SFT: a minute on generated rows. With NL_RX it repeats the committed figures on
# the real rows (half an hour):  make step-cost NL_RX=path/to/nl_rx [SPIDER=path/to/spider]
step-cost: $(STAMP)
	$(BIN)/python -m eval.step_cost $(if $(NL_RX),--nl-rx $(NL_RX) $(if $(SPIDER),--spider $(SPIDER)) --out eval/results/step_cost/cpu.json --plot eval/results/step_cost/cpu.png,--quick)

# Every fault of docs/results/reliability.md: 20 minutes on two cores. You can stop and restart it.
faults: $(STAMP)
	$(BIN)/python -m eval.faults --out eval/results/faults/cpu.json
	$(BIN)/python -m eval.report

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("llm_jepa needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[dev]"
	touch $@

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/python -m pip install -q -r $(DOCS_VENV)/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) runs build site *.egg-info
