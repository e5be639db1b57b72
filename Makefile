# Each target is one line of the real tool. `make build` makes what the others start from.
PYTHON ?= python3
V := .venv/bin
# A GPU machine's own torch is used; elsewhere this pin is what arrives quickly.
TORCH ?= torch==2.13.0

.PHONY: demo test test-all lint docs bench resources prove gpu build clean

$(V)/.torch:
	$(PYTHON) -m venv $(shell $(PYTHON) -c "import torch; assert torch.version.cuda" 2>/dev/null && echo --system-site-packages) .venv
	$(V)/python -c "import torch" 2>/dev/null || $(V)/pip install --quiet "$(TORCH)"
	touch $@

$(V)/.built: $(V)/.torch setup.py pyproject.toml $(shell find csrc -type f)
	$(V)/pip install --quiet "setuptools>=70" wheel "pybind11>=2.12" ninja
	$(V)/pip install --quiet --no-build-isolation --editable ".[train]"
	touch $@

$(V)/.dev: $(V)/.built
	$(V)/pip install --quiet --no-build-isolation --editable ".[train,dev]"
	# With the torchvision of this torch: left to itself it brings another torch. Where there is none, its tests are skipped.
	-$(V)/pip install --quiet timm "torch==$$($(V)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	touch $@

build: $(V)/.built

demo: build
	$(V)/dino-train pretrain --preset demo --resume
	$(V)/dino-train evaluate baselines --checkpoint runs/demo
	$(V)/dino-train evaluate attention --checkpoint runs/demo
	$(V)/dino-train evaluate report --checkpoint runs/demo

# One file at a time on each core, quick files first. `make test-all` then runs the slow tests likewise.
PYTEST = OMP_NUM_THREADS=1 $(V)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(V)/.dev
	$(PYTEST)

test-all: test
	$(PYTEST) -m "slow and not prove"

lint: $(V)/.dev
	$(V)/python -m ruff check .
	$(V)/python -m ruff format --check .
	$(V)/python -m mypy
	$(V)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*') tests/helpers/*.cpp tests/gpu/*.cu tests/gpu/ptx/core/*

docs: $(V)/.dev
	NO_MKDOCS_2_WARNING=1 $(V)/mkdocs build

bench: $(V)/.dev
	$(V)/python -m pytest bench
	$(V)/python bench/bench_multicrop.py $(if $(PHOTOS),--photos "$(PHOTOS)")
	$(V)/python bench/bench_features.py $(if $(PHOTOS),--photos "$(PHOTOS)")
	$(V)/python bench/bench_step.py --arch vit_tiny --batch 4 --steps 12 --threads 2
	$(V)/python bench/bench_step.py --arch vit_small --batch 4 --steps 8 --threads 2

resources: $(V)/.dev
	$(V)/python bench/resources.py --output bench/results
	PYTHONPATH=$$($(V)/python bench/oldest_triton.py) $(V)/python bench/resources.py --output bench/results

# Compiled kernels on a PTX emulator, in full: about 20 minutes on two cores.
prove: $(V)/.dev
	$(V)/python tests/gpu/prove.py

# On a machine with a GPU, with the Python that has its torch: no .venv and no network.
OUT ?= gpu-results
gpu:
	$(PYTHON) bench/gpu/gpu.py --output "$(OUT)"

clean:
	rm -rf .venv build dist runs *.egg-info dino_kernels/*.so
