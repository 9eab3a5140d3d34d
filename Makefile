# make demo | make test | make check; each sets up .venv where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo's latency budget: by default the median of the donors' latencies on this machine.
BUDGET_MS ?=
MEDIAN := import json, statistics as s; \
  print(round(s.median(e["ms"] for e in json.load(open("out/latency.json"))["entries"] if e["kind"] == "donor"), 4))

.PHONY: demo test check bench clean

$(STAMP): pyproject.toml
	@echo "== installing derc into $(VENV) (torch is large: some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "derc needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@rm -rf out/demo
	@mkdir -p out
	@echo "== derc profile --zoo digits --data digits --target cpu -o out/latency.json"
	@$(BIN)/derc profile --zoo digits --data digits --target cpu -o out/latency.json > out/latency.txt
	@budget=$(BUDGET_MS); budget=$${budget:-$$($(BIN)/python -c '$(MEDIAN)')}; set -x; \
	  $(BIN)/derc compile --zoo digits --data digits --target cpu --latency-ms $$budget -o out/demo
	@echo "== open out/demo/report.html"

test: $(STAMP)
	@echo "== tests"
	@$(BIN)/python -m pytest

check: $(STAMP)
	@echo "== ruff, mypy --strict, import contracts"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/python benchmarks/compile.py

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis
