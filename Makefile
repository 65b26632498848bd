# make serve   install everything and start the server with the playground on 127.0.0.1:8000
# make test    install everything and run the tests, in TEST_PROCESSES processes
# make check   check format, lint, types and import contracts
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
TEST_PROCESSES ?= 2
TEST_ARGS ?=
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: serve test check format protos clean

serve: $(VENV)/.installed
	$(BIN)/tdm-serve $(SERVE_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. serving/rpc/protos/*.proto

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
