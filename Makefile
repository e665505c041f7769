# make demo   install, draw held-out scenes, evaluate the released weights, write pictures
# make app    install, open the web page (ARGS="--port 8000" and the like; --help lists them)
# make train  install, draw the dataset, train those weights from scratch on two CPU cores
# make test   install, run the tests; make test-lowest does so with the oldest packages allowed
# make lint   style, format and types         make venv    install only
# make clean  remove what these commands made
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RELEASE := weights/gella_tiny_shapes/config.yaml
FIRST := gella_tiny_all_tasks
FINISH := gella_tiny_finish
OUTPUT := output/$(FINISH)

.PHONY: help venv demo app train test test-lowest lint clean

help:
	@sed -n 's/^# //p' Makefile | head -6

venv: $(STAMP)

# The stamp is written last, so an interrupted or failed installation is taken up again.
# The two variables hold the build tools of source packages to the same versions.
$(STAMP): setup.py $(CONSTRAINTS) tools/setup_detectron2.py
	@rm -f $(STAMP)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else "error: $(PYTHON) is Python %d.%d, but 3.10 to 3.12 is needed: try make PYTHON=python3.11 $(MAKECMDGOALS)" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
		$(BIN)/python -m pip install -e ".[dev]"
	$(BIN)/python tools/setup_detectron2.py
	@touch $(STAMP)

# Both keep to this folder, wherever the user's own datasets are.
demo train: export DETECTRON2_DATASETS := datasets

demo: $(STAMP)
	$(BIN)/python datasets/prepare_shapes.py --train 0
	$(BIN)/python tools/train_net.py --config-file $(RELEASE) --eval-only OUTPUT_DIR output/demo
	$(BIN)/python tools/demo.py --config-file $(RELEASE) --input examples/shapes \
		--captions examples/shapes/captions.jsonl --output output/demo/pictures
	@echo
	@echo "Pictures:  output/demo/pictures, index.html shows them all"
	@echo "Figures:   output/demo/results.json"
	@echo "Your turn: make app, or $(BIN)/python tools/demo.py --help"

app: $(STAMP)
	$(BIN)/python tools/app.py $(ARGS)

train: $(STAMP)
	$(BIN)/python datasets/prepare_shapes.py
	$(BIN)/python tools/train_net.py --config-file configs/$(FIRST).yaml
	$(BIN)/python tools/train_net.py --config-file configs/$(FINISH).yaml
	$(BIN)/python tools/demo.py --config-file configs/$(FINISH).yaml --weights $(OUTPUT)/model_final.pth \
		--dataset gella_shapes_png_val --num 3 --output $(OUTPUT)/demo
	@echo
	@echo "Weights:   $(OUTPUT)/model_final.pth"
	@echo "Pictures:  $(OUTPUT)/demo"
	@echo "Figures:   $(OUTPUT)/results.json"

# One thread in each of two processes does more than two threads in one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy projects/gella

clean:
	rm -rf $(VENV) .venv-lowest $(OUTPUT) output/$(FIRST) output/demo datasets/shapes build \
		projects/*.egg-info projects/detectron2_core/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find projects tools tests datasets -name __pycache__ -type d -prune -exec rm -rf {} +
