# Two commands do everything on a fresh machine (Debian, Python 3.11+, gcc and make):
#   make demo   sets up .venv, then optimizes, certifies and runs the embedded model
#   make test   sets up .venv, then runs the whole gate: format, lint, types, layers, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/halve/kernels/csrc/*)

.PHONY: demo test setup clean

demo: setup
	$(BIN)/halve demo

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

setup: $(VENV)/.installed

$(VENV)/.installed: $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "halve needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: install it with 'apt-get install python3-venv'" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,train,test]'
	@touch $@

clean:
	rm -rf $(VENV) build
