# `make demo` and `make test` each do all their own set-up; they need Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WHEEL := build/wheel

.PHONY: demo test daemons lint wheel-test check clean

# The main job on the embedded default: scikit-learn's digits, from the teacher to the report.
demo: $(INSTALLED)
	cd examples/digits && ../../$(BIN)/edgekd run

test: $(INSTALLED)
	$(BIN)/python -m pytest -rs --numprocesses 2 --dist loadfile

# What devices and history are tested against, on Debian and Ubuntu; without them those tests are skipped, aloud.
DAEMONS := openssh-server adb chromium iproute2 postgresql
daemons:
	packages="$(DAEMONS) $$(command -v npm > /dev/null || echo npm)"; dpkg --status $$packages > /dev/null 2>&1 || \
	{ apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $$packages; }

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Tests once more against the built wheel, from another directory: what is not packaged shows only there. Those of numbers
# alone (operators, losses, converters) are left out: that every folder of code is packaged is a test of its own.
WHEEL_TESTS := packaging plugins cli docs pipeline report profiles origins agent gate history exporter_onnx \
	device_fake device_host device_browser device_ssh
wheel-test: $(INSTALLED)
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/elsewhere
	$(BIN)/python -m build --outdir $(WHEEL) . > $(WHEEL)/build.log || { cat $(WHEEL)/build.log; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --target $(WHEEL)/site $(WHEEL)/edgekd-*.whl
	cd $(WHEEL)/elsewhere && export PYTHONPATH=$(abspath $(WHEEL)/site) && \
	$(abspath $(BIN))/python -P -c "import edgekd.exporters.onnx as m; assert '$(WHEEL)/site' in m.__file__, m.__file__" && \
	$(abspath $(BIN))/python -P -m pytest -rs --numprocesses 2 --dist loadfile -p no:cacheprovider -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) \
	$(WHEEL_TESTS:%=$(CURDIR)/tests/test_%.py)

check: lint test wheel-test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import ensurepip, venv" || { apt-get update && apt-get install --yes python3-venv; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $(INSTALLED)

clean:
	rm -rf .venv build dist *.egg-info
