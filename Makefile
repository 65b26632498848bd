# make serve   install everything and start the server with the playground on 127.0.0.1:8000
# make triton  install everything and start tritonserver with the model repository on its usual ports of 127.0.0.1
# make test    install everything and run the tests, in TEST_PROCESSES processes, then those of a real tritonserver
# make mutants change the code of training/methods in small ways and count the changes that its tests notice, in less than an hour
# make check   check format, lint, types and import contracts
# make gpu     run the tests and measurements that need a GPU, in 12 minutes; results are in build/gpu
# make format  format the code and fix what ruff can fix
# make protos  generate the modules of serving/rpc/protos again, after a change of its .proto files
# make clean   delete the environment and build files
#
# If the package index serves PyTorch with CUDA and you want the CPU build, pass PyTorch's CPU index:
#   make serve TORCH_INDEX_URL=...

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX_URL ?=
SERVE_ARGS ?=
TDM_CHECKPOINT ?=
TRITON_ARGS ?=
TRITON := build/triton
KSERVE := build/kserve
MUTMUT := build/mutmut
TEST_PROCESSES ?= 3
TEST_ARGS ?=
# Python compiles what it imports, a small part of these packages.
PIP_OPTIONS := --quiet --disable-pip-version-check --no-compile
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: serve triton test mutants check gpu format protos clean

serve: $(VENV)/.installed
	$(BIN)/tdm-serve $(SERVE_ARGS)

triton: $(TRITON)/.installed
	$(BIN)/tdm-export $(TDM_CHECKPOINT)
	TDM_CHECKPOINT=$(TDM_CHECKPOINT) $(TRITON)/bin/python deploy/triton/start.py $(TRITON_ARGS)

test: $(VENV)/.installed-dev $(TRITON)/.installed-dev $(KSERVE)/.installed
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)
	$(TRITON)/bin/python -m pytest tests/model_repository

mutants: $(MUTMUT)/.installed
	$(MUTMUT)/bin/python tests/mutants/run.py --processes $(TEST_PROCESSES)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=model_repository/tdm/1 $(BIN)/mypy model_repository/tdm/1/*.py
	$(BIN)/lint-imports

gpu: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_run --output build/gpu

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. serving/rpc/protos/*.proto

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	$(BIN)/pip install $(PIP_OPTIONS) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install $(PIP_OPTIONS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install $(PIP_OPTIONS) --editable '.[dev]'
	touch $(VENV)/.installed $@  # it has the project, too

# Lets an environment find the project's packages after its own.
define find_project_after
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tdm.pth
endef

# tritonserver and its clients want older packages than the project, which this environment finds after its own.
$(TRITON)/.installed: $(VENV)/.installed deploy/triton/requirements.txt
	$(BIN)/python -m venv $(TRITON)
	$(TRITON)/bin/pip install $(PIP_OPTIONS) --requirement deploy/triton/requirements.txt
	$(call find_project_after,$(TRITON))
	touch $@

$(TRITON)/.installed-dev: $(TRITON)/.installed $(VENV)/.installed-dev
	touch $@

# An environment whose packages come before the project's. pip installs only those that differ.
define install_before_project
	$(BIN)/python -m venv --without-pip $(1)
	$(call find_project_after,$(1))
	$(1)/bin/python -m pip install $(PIP_OPTIONS) --no-warn-conflicts --requirement $(2)
	touch $(1)/.installed
endef

# KServe's client wants older packages than the project, too.
$(KSERVE)/.installed: $(VENV)/.installed-dev deploy/kserve/requirements.txt
	$(call install_before_project,$(KSERVE),deploy/kserve/requirements.txt)

# The test runner of `make mutants` and what it brings along.
$(MUTMUT)/.installed: $(VENV)/.installed-dev tests/mutants/requirements.txt
	$(call install_before_project,$(MUTMUT),tests/mutants/requirements.txt)

clean:
	rm -rf $(VENV) build *.egg-info
