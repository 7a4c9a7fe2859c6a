# make book [TIER=auto|phantom|released] [CHAPTER=name] [CONFIG=file] [PROFILE=local|slurm] [TORCH=cpu|cuda]
# make test   make clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TIER ?= auto
TORCH ?= cpu
PROFILE ?= local
# A configuration names its own tier, unless TIER is given too.
SET = $(strip $(if $(and $(CONFIG),$(filter file,$(origin TIER))),,tier=$(TIER)) $(if $(CHAPTER),chapter=$(CHAPTER)))
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/ready-$(TORCH)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0
RADIOMICS_VERSION := 3.0.1

.PHONY: book test notebooks phantoms clean

book: $(READY)
	@echo "Executing and rendering the book. Without CONFIG: about 15 minutes on 2 cores with the released"
	@echo "data, 4 minutes on phantoms, seconds if nothing changed; 300 MB in _build, _runs and results."
	@PATH="$(BIN):$$PATH" snakemake --snakefile book/Snakefile \
	  --profile book/profiles/$(PROFILE) $(if $(CONFIG),--configfile $(CONFIG)) $(if $(SET),--config $(SET))
	@echo "The book is at _build/html/index.html"

test: $(READY)
	@echo "Testing: about 12 minutes on 2 cores; the slowest part builds a book on phantoms."
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 COVIDMTL_RESULTS=$$(mktemp -d) PATH="$(BIN):$$PATH" \
	  $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder \
	  tests/notebooks tests covidmtl_core --nbval-lax --nbval-current-env book

# Execute the chapters at their smoke sizes and keep the outputs that the tests check.
notebooks: $(READY)
	PATH="$(BIN):$$PATH" $(BIN)/python tests/notebooks/refresh.py

# Measure the phantom cohort's features again, after the generator or the segmentation changed.
phantoms: $(READY)
	@echo "Scanning and measuring 304 phantoms, 12 of them five times more: about 25 minutes on 2 cores."
	OMP_NUM_THREADS=1 $(BIN)/python -c "from covidmtl_core import phantom_cohort as p; p.write_table()"
	OMP_NUM_THREADS=1 $(BIN)/python -c "from covidmtl_core.radiomics import stability as s; s.write_table()"

clean:
	@echo "Removing what was built (seconds); $(VENV) and fetched data stay."
	rm -rf _build _runs results .snakemake

# Python 3.11 gets the exact versions of requirements.lock; another Python the newest allowed.
# pyradiomics builds only with numpy at hand and only up to Python 3.11; nothing breaks without it.
$(READY): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): 2 to 5 minutes and 2.5 GB (TORCH=cuda: 8 GB)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -e $(VENV)/ready-$(if $(filter cuda,$(TORCH)),cpu,cuda) ]; then \
	  $(BIN)/pip uninstall --quiet --yes torch; \
	fi
	@if [ "$(TORCH)" = cuda ]; then \
	  $(BIN)/pip install --quiet torch==$(TORCH_VERSION); \
	else \
	  $(BIN)/pip install --quiet torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	  || $(BIN)/pip install --quiet torch==$(TORCH_VERSION) --index-url $(CPU_WHEELS); \
	fi
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  $(BIN)/pip install --quiet --requirement requirements.lock; \
	  $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .; \
	else \
	  $(BIN)/pip install --quiet --editable ".[chapters,volumes,book,test]"; \
	fi
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation pyradiomics==$(RADIOMICS_VERSION) \
	  || echo "pyradiomics could not be built; only the reference feature extraction needs it."
	@rm -f $(VENV)/ready-*; touch $@
