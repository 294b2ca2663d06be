# `make demo` and `make test` set up by themselves; `make setup` does only that.
PYTHON ?= python3
UV_VERSION := 0.13.9
# A GPU that answers decides which vLLM is installed; `make setup EXTRA=cpu` overrules it.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := .venv/.prefloop-$(EXTRA)
BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest --durations=10
# pip and uv look for wheels on disk under different names.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: setup serve demo test test-slow test-avx2 lint unit e2e families stubs docs requirements audit clean

setup: $(STAMP)

# Bytecode at once: starting an engine imports half of these packages in three processes, one after the other.
$(STAMP): pyproject.toml requirements/$(EXTRA).txt | $(BIN)/uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[$(EXTRA)]' --group dev --constraint requirements/$(EXTRA).txt
	@rm -f .venv/.prefloop-*
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "prefloop needs Python 3.11 to 3.14")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)

# A server, a page to chat and vote on, and a learner that waits for the page's button.
serve: setup
	$(BIN)/chat web --serve

demo: setup
	$(BIN)/python -m clients.demo

# A sample of everything: what CI runs.
test: lint unit e2e

# The whole: every parameter, and the end-to-end tests with the default model, too. Before a release.
test-slow: lint
	$(PYTEST) -m "not e2e"
	$(PYTEST) -m e2e

# On a newer processor, as on one that has AVX2 only.
test-avx2:
	PYTHONPATH=$(CURDIR)/tests/avx2 $(MAKE) test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

unit: setup
	$(PYTEST) -m "not e2e and not slow"

# On real engines; separate from the unit tests so that a slip there fails in seconds.
e2e: setup
	$(PYTEST) -m "e2e and not slow"

# A tiny model of every family in the real engine, beside the trainer: docs/models.md. Half an hour.
families: setup
	$(BIN)/python -m tests.families.report

stubs: setup
	$(BIN)/python proto/generate.py
	$(BIN)/python clients/generate.py

docs: setup
	$(BIN)/python docs/setting_names.py
	$(BIN)/python docs/copies.py
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/languages.py
	$(BIN)/python docs/gateway.py
	$(BIN)/python docs/floors.py

# After a change of dependencies: one file for each extra and all Pythons that are supported. No index address may be in
# the output. Only PyPI is asked: its torch pins packages that the CPU's build leaves open. Markers that every package
# has are dropped, and those that only say where a constraint is of use; what differs between Pythons stays.
requirements: $(BIN)/uv
	for extra in cpu gpu; do \
	  UV_FIND_LINKS= $(BIN)/uv pip compile --quiet pyproject.toml --extra $$extra --group dev \
	    --universal --python-version 3.11 \
	    --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/$$extra.txt \
	  && sed -i -E -e "s/ and (\(|platform_|sys_platform|implementation_).*//" \
	    -e "s/( ;| and) python_full_version < '3.15'\$$//" requirements/$$extra.txt || exit 1; \
	done

# Known vulnerabilities of what is pinned; asks PyPI's advisories, so it needs the network.
audit: $(BIN)/uv
	for extra in cpu gpu; do $(BIN)/uv tool run pip-audit --requirement requirements/$$extra.txt --no-deps --disable-pip || exit 1; done

clean:
	rm -rf .venv
