# Each target makes and fills .venv by itself on first use.
PYTHON ?= python3
BIN := .venv/bin

# One thread for each worker of the tests: they share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-app test-kernels test-cell-eval test-fuzzer test-slow torture fuzz lint types docs bench
.DEFAULT_GOAL := demo

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/demo.py

# Which tests: the quick ones, or as pytest selects them (make test TESTS=).
TESTS ?= -m "not slow"

test: .venv/.installed
	$(PYTEST) $(TESTS)

# The kernels for a GPU, in Triton's interpreter. Triton comes with torch for GPUs, and is not part of the environment here.
test-kernels: .venv/.installed
	test -d build/triton || $(BIN)/python -m pip install --quiet --no-deps --target build/triton 'triton>=3.9'
	PYTHONPATH=build/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/losses/test_energy_kernels.py tests/losses/test_sinkhorn_kernels.py

# The metrics of cell-eval. The package brings much along, and is not part of the environment here.
build/cell-eval: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/cell-eval \
		'cell-eval>=0.8.2' pdex polars polars-runtime-32 numba-mwu igraph texttable
	touch $@

test-cell-eval: build/cell-eval
	PYTHONPATH=build/cell-eval OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m cell_eval tests/evaluation

# The fuzzer itself finds a fault that is planted.
test-fuzzer: build/atheris
	PYTHONPATH=build/atheris OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_fuzzer.py -m guided

# The page of the app in a browser, and the program of a Space. Gradio has an environment of its own, on top of .venv.
build/gradio: .venv/.installed
	$(PYTHON) -m venv build/gradio
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(build/gradio/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	build/gradio/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[app]' || { rm -r build/gradio; exit 1; }
	touch build/gradio

test-app: build/gradio
	OMP_NUM_THREADS=1 build/gradio/bin/python -m pytest -q tests/app

test-slow: .venv/.installed
	$(PYTEST) -m slow

# Kills of every command that writes, at random moments; the table goes into docs/reliability.md.
TRIALS ?= 300

torture: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --trials $(TRIALS) --write docs/reliability.md

# Damaged files of every kind, read for so many seconds; findings go to build/fuzz. KINDS names readers for the
# fuzzer that is guided by coverage; by default it takes all. Atheris is no part of the environment.
SECONDS ?= 180

build/atheris: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target build/atheris 'atheris>=3'
	touch $@

fuzz: build/atheris
	PYTHONPATH=build/atheris OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) --kinds $(KINDS)

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	mkdir -p build/typed && ln -sfn ../.. build/typed/pertstate
	$(BIN)/mypy

# Each tutorial is executed anew where it or the package has changed since.
TUTORIALS := $(patsubst docs/tutorials/%.py,build/tutorials/%.md,$(wildcard docs/tutorials/*.py))

build/tutorials/%.md: docs/tutorials/%.py docs/tutorial.py $(wildcard *.py */*.py families/*/*.py evaluation/page/*) .venv/.installed
	$(BIN)/python docs/tutorial.py $< build/tutorials

docs: .venv/.installed $(TUTORIALS)
	$(BIN)/python docs/build_site.py

bench: build/cell-eval
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/end_to_end.py
	PYTHONPATH=build/cell-eval $(BIN)/python benchmarks/evaluate.py
