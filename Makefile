# Each command sets up what it needs on a fresh machine; begin with `make demo`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = src examples tests benchmarks reproduction docs .ci setup.py conftest.py

.PHONY: demo test docs notebook types check release figures test-oldest test-optional extras faults train-tiny \
    style quality bench clean page space pictures test-browser

# The environment, and an extra of setup.py in it, in the versions of constraints.txt; again when these files change
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.%: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

# A labelled grid of samples from the bundled checkpoint with their grain maps: demo.png
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output demo.png

# A page in the browser on which you draw, paint the map and edit: http://127.0.0.1:7860
page: $(VENV)/.demo
	$(BIN)/python examples/app.py

# All pages and the API as a site, build/site: a broken link or a public name without a docstring fails
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "next: $(BIN)/python -m http.server --directory build/site, then http://127.0.0.1:8000"

# docs/notebooks, run from the first cell to the last; it stays as it is, without outputs. What tests need is not here,
# so neither is their conftest.py
notebook: $(VENV)/.notebook
	$(BIN)/python -m pytest --noconftest --nbmake --nbmake-timeout=180 docs/notebooks

# What a Space on the Hub needs for the page of examples/app.py: examples/space
space: $(VENV)/.demo
	$(BIN)/python examples/make_space.py

# The tests, and the blocks of all pages. A worker a core; a file goes to one of them, as its tests share what takes
# long. One file alone needs none of this: pytest tests/test_grains.py
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What is compiled and exported, under the oldest torch that setup.py allows: the rest of the versions stay
OLDEST = $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' setup.py)
test-oldest: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	sed '/^torch==/d' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint $(VENV)-oldest/constraints.txt \
	    "torch~=$(OLDEST).0" --editable ".[dev]"
	$(VENV)-oldest/bin/python -m pytest tests/models tests/training/test_compiling.py

# What tests skip where these are not installed: integer weights and ONNX
test-optional: $(VENV)/.dev $(VENV)/.onnx $(VENV)/.quantization
	$(BIN)/python -m pytest -n logical --maxprocesses 2 --dist loadfile tests/models/test_quantized.py tests/models/test_export.py

# The page in a headless Chromium, of the system: `apt-get install chromium`, or CHROMIUM=/path/to/it. Without one only
# that is skipped. SCREENSHOTS=docs writes the pictures of docs/page.md
test-browser: $(VENV)/.dev $(VENV)/.browser
	$(BIN)/python -m pytest -s tests/examples/test_app.py tests/examples/test_app_in_a_browser.py \
	    tests/test_site_in_a_browser.py docs/page.md

# The tables of docs/ from reproduction/results and benchmarks/results
figures: $(VENV)/.dev
	$(BIN)/python docs/figures.py

# The pictures of README and docs/: the strip, badges, what pages save, the page in a browser. The plots of the study are
# those of docs/reproduction.md, docs/own_classes.jpg is of the commands of examples/README.md
pictures: $(VENV)/.dev $(VENV)/.docs
	mkdir -p build
	$(BIN)/python docs/badges.py
	$(BIN)/python -c "from skimage import data; from PIL import Image; \
	    [Image.fromarray(getattr(data, name)()).save(f'build/{name}.png') for name in ('astronaut', 'chelsea', 'coffee')]"
	$(BIN)/python examples/reconstruct.py --images build/astronaut.png build/chelsea.png build/coffee.png \
	    --fine_ratios 0.3 0.6 --output docs/budgets.jpg
	PICTURES=docs $(BIN)/python -m pytest docs/control.md
	SCREENSHOTS=docs $(MAKE) test-browser

# The long form of tests/faults: thousands of kills, failing calls, damaged and hostile files; ends with its table
faults: $(VENV)/.dev
	FAULTS=long $(BIN)/python -m pytest tests/faults -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# All three stages on crops of eight photographs, on a CPU in about ten minutes; ends with a picture of samples
TINY ?= runs/tiny
TWO_CORES = examples/configs/two-cores-64
train-tiny: $(VENV)/.dev
	@test ! -e $(TINY) || { echo "$(TINY) exists: remove it, or pass TINY=another-folder"; exit 1; }
	$(BIN)/python examples/photo_crops.py --output_dir $(TINY)/photos --resolution 64
	$(BIN)/python examples/train_dvae.py @$(TWO_CORES)/dvae.txt --max_train_steps 300 \
	    --train_data_dir $(TINY)/photos --output_dir $(TINY)/dvae
	$(BIN)/python examples/cache_latents.py --vae $(TINY)/dvae/vae --resolution 64 \
	    --train_data_dir $(TINY)/photos --output_dir $(TINY)/cache
	$(BIN)/python examples/train_grain.py @$(TWO_CORES)/grain.txt --max_train_steps 150 --train_batch_size 16 \
	    --vae $(TINY)/dvae/vae --latent_cache $(TINY)/cache --output_dir $(TINY)/grain
	$(BIN)/python examples/train_d2it.py @$(TWO_CORES)/content.txt --max_train_steps 400 --train_batch_size 16 \
	    --vae $(TINY)/dvae/vae --grain $(TINY)/grain --latent_cache $(TINY)/cache --output_dir $(TINY)/d2it
	$(BIN)/python examples/demo.py --checkpoint $(TINY)/d2it/pipeline --output $(TINY)/samples.png

style: $(VENV)/.quality
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: $(VENV)/.quality
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# What an editor knows of the public names
types: $(VENV)/.dev
	$(BIN)/python -m mypy

# What a change must pass
check: quality types docs test

# sdist and wheel in dist/: looked into, installed in an empty environment, tried
release: $(VENV)/.release
	$(BIN)/python .ci/release.py

# Each extra of setup.py can be installed with the versions of constraints.txt: they are looked up, not installed
EXTRAS = $(shell $(PYTHON) -c "import re; print(*re.findall(r'^    \"(\w+)\": \[', open('setup.py').read(), re.M))")
extras: $(VENV)/.quality
	@for extra in $(EXTRAS); do echo "$$extra"; \
	    $(BIN)/python -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt ".[$$extra]" || exit 1; \
	done

# Every goal of docs/performance.md: reached, not reached, or not measured. DEVICE=cuda takes the real sizes.
DEVICE ?= cpu
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py --device $(DEVICE)

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache
