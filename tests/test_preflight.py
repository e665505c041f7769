"""What a run lacks is told at once, before anything is built; with all of it the line trains."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from detectron2.modeling import build_model
from docs_sandbox import write_datasets
from tiny_weights import llava
from toy_run import CONFIG, ROOT, SMALL

from gella import load_config
from gella.commands import convert_weights
from gella.engine import preflight
from gella.engine.preflight import Run, missing_for, missing_text, untrained_parts
from gella.weights.mask2former import Mask2FormerUpstream

PAPER = ROOT / "configs" / "gella_swin_t.yaml"
FIRST, TOKENIZER = "weights/first/gella_swin_t", "weights/tokenizers/llava-v1.5-7b"
MASKS = "datasets/coco/entities/mask2former_swin_l_val2017.json"
# The paper's config at the sizes of the stand-ins.
SIZES = """
    MODEL.COLORMAP_ENCODER.ARCH lcnet_050 MODEL.IMAGE_ENCODER.IMAGE_SIZE 32
    MODEL.IMAGE_ENCODER.PATCH_SIZE 8 MODEL.IMAGE_ENCODER.WIDTH 32 MODEL.IMAGE_ENCODER.LAYERS 3
    MODEL.IMAGE_ENCODER.HEAD_WIDTH 16 MODEL.IMAGE_ENCODER.MLP_RATIO 2.0 MODEL.RESOBLEND.DIM 32
    MODEL.RESOBLEND.NUM_HEADS 4 MODEL.MASK_DECODER.NUM_QUERIES 12 MODEL.MASK_DECODER.HIDDEN_DIM 32
    MODEL.MASK_DECODER.MASK_DIM 32 MODEL.MASK_DECODER.NUM_HEADS 4
    MODEL.MASK_DECODER.ENCODER_LAYERS 1 MODEL.MASK_DECODER.ENCODER_FFN_DIM 64
    MODEL.MASK_DECODER.DECODER_LAYERS 1 MODEL.MASK_DECODER.DECODER_FFN_DIM 64
    MODEL.MASK_DECODER.TRAIN_NUM_POINTS 64 MODEL.LANGUAGE.VOCAB_SIZE 640
    MODEL.LANGUAGE.HIDDEN_SIZE 32 MODEL.LANGUAGE.INTERMEDIATE_SIZE 40 MODEL.LANGUAGE.NUM_LAYERS 2
    MODEL.LANGUAGE.NUM_HEADS 2 MODEL.LANGUAGE.NUM_KEY_VALUE_HEADS 1
    MODEL.LANGUAGE.MAX_NEW_TOKENS 8 INPUT.GELLA.COLORMAP_SIZE 96 SOLVER.IMS_PER_BATCH 4
    SOLVER.EPOCHS 0 SOLVER.MAX_ITER 2 SOLVER.WARMUP_ITERS 1 SOLVER.AMP.ENABLED False
    MODEL.DEVICE cpu DATALOADER.NUM_WORKERS 0
""".split()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A checkout without data and weights, whatever lies in this one."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "projects", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory, clone, small_shapes):
    """A checkout with small things in the places that the paper's config names."""
    folder = shutil.copytree(clone, tmp_path_factory.mktemp("ready") / "gella")
    write_datasets(folder, small_shapes)
    cfg = load_config(PAPER, SIZES)
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    parts = folder / "parts"
    llava(words=cfg.MODEL.LANGUAGE.VOCAB_SIZE - 1).save_pretrained(parts / "llava")
    torch.save(timm.create_model("lcnet_050").state_dict(), parts / "lcnet.pth")
    decoder = Mask2FormerUpstream.from_config(cfg).from_gella(state)
    arrays = {key: np.asarray(tensor) for key, tensor in decoder.items()}
    (parts / "m2f.pkl").write_bytes(pickle.dumps({"model": arrays}))
    (folder / FIRST).parent.mkdir()
    given = ["--llava", "llava", "--mask2former", "m2f.pkl", "--colormap-encoder", "lcnet.pth"]
    given[1::2] = [str(parts / name) for name in given[1::2]]
    arguments = ["--config-file", str(PAPER), *given, "--output", str(folder / FIRST), *SIZES]
    assert convert_weights.main(arguments) == 0
    return folder


def started(checkout, folder, *arguments):
    """The end of tools/train_net.py of a checkout, run in another folder, with its own .seconds
    of CPU and peak .kib. A process in between measures: what this one starts inherits its peak."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    unwanted = ("DETECTRON2_DATASETS", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    environment |= {"PYTHONPATH": str(checkout / "projects"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    script, config = checkout / "tools" / "train_net.py", checkout / "configs/gella_swin_t.yaml"
    measure = (
        "import resource, subprocess, sys; status = subprocess.call(sys.argv[2:]); "
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=open(sys.argv[1], 'w')); "
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", measure, folder / "usage.txt", sys.executable, script]
    ended = subprocess.run(
        [str(part) for part in [*command, "--config-file", config, *arguments]],
        **{"cwd": folder / "elsewhere", "env": environment, "capture_output": True, "text": True},
    )
    seconds, kib = map(float, (folder / "usage.txt").read_text().split())
    return SimpleNamespace(
        status=ended.returncode, out=ended.stdout, err=ended.stderr, seconds=seconds, kib=kib
    )


def test_a_clean_clone_is_told_all_that_is_missing_within_seconds(clone, tmp_path):
    ended = started(clone, tmp_path, "--num-gpus", 8)
    assert ended.status == 2 and not ended.out
    assert ended.seconds < 60  # it takes 13 s
    assert ended.kib < 2 * 2**20
    lines = ended.err[ended.err.index("error: ") :].splitlines()
    found = [line for line in lines if re.match(r" *\d+\. ", line)]
    assert lines[0].startswith(f"error: {len(found)} things are missing for ")
    datasets = [*load_config(PAPER).DATASETS.TRAIN, *load_config(PAPER).DATASETS.TEST]
    wanted = [*(f"dataset {name}: " for name in datasets), "entity masks ", "weights ", "tokenizer"]
    if importlib.util.find_spec("deepspeed") is None:
        wanted.insert(0, "DeepSpeed")
    for text, line in zip([*wanted, "no CUDA GPU is here"], found, strict=True):
        assert text in line
    assert str(clone / "datasets") not in ended.err  # which it does not have
    commands = [line.split("-> python ")[1].split()[0] for line in lines if "-> python " in line]
    assert len(commands) == 3
    for command in commands:  # as typed in that folder
        assert (tmp_path / "elsewhere" / command).resolve().parent == clone / "tools"
    assert not list((tmp_path / "elsewhere").iterdir())  # nothing was begun


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.skipif(0 < torch.cuda.device_count() < 2, reason="launch gives each process a GPU")
def test_with_stand_ins_the_line_trains_under_zero_and_evaluates(ready, tmp_path):
    """From another folder, in two processes; then the first weights alone are evaluated."""
    line = ("--num-gpus", 2, *SIZES)
    checked = started(ready, tmp_path, "--check", *line)
    assert checked.status == 0, checked.err
    assert checked.out.startswith("nothing is missing for ")
    assert not list((tmp_path / "elsewhere").iterdir())
    ended = started(ready, tmp_path, *line)
    assert ended.status == 0, ended.err[-3000:]
    output = tmp_path / "elsewhere" / "output" / "gella_swin_t"
    log = (output / "log.txt").read_text()
    assert "ZeRO stage 2, 2 process(es)" in log and "loading weights" in log
    results = json.loads((output / "results.json").read_text())
    assert {"png", "panoptic_seg"} <= set(results) and "untrained" not in results["run"]
    assert results["run"]["settings"]["entity_sources"][0][2] == str(ready / MASKS)
    following = ended.out.splitlines()[-1]
    script = re.search(r"Next: +python (\S+)", following)[1]
    assert (tmp_path / "elsewhere" / script).resolve() == ready / "tools" / "demo.py"

    first = started(ready, tmp_path, "--eval-only", *SIZES, "OUTPUT_DIR", "first")
    assert first.status == 0, first.err[-3000:]
    folder = tmp_path / "elsewhere" / "first"
    parts = json.loads((folder / "results.json").read_text())["run"]["untrained"]
    assert any(part.startswith("resoblend") for part in parts)
    assert parts == untrained_parts(ready / FIRST)
    warned = first.out.index("are first weights, untrained: ")
    assert warned < first.out.index("Start inference")
    assert "(first weights, untrained: " in first.out.splitlines()[-3]
    assert (folder / "results.md").read_text().startswith("**First weights: ")


# -- item by item, in this process -----------------------------------------------------------------


@pytest.fixture
def look(ready, monkeypatch):
    """What is missing for a run with changes of the stand-ins' config, as texts."""
    monkeypatch.chdir(ready)
    datasets = load_config(PAPER).DATASETS
    names = [*datasets.TRAIN, *datasets.TEST]

    class Registered:
        @staticmethod
        def list():
            return names

    monkeypatch.setattr(preflight, "DatasetCatalog", Registered)

    def found(*changes, **run):
        cfg = load_config("configs/gella_swin_t.yaml", [*SIZES, *map(str, changes)])
        options = {"data": False, **run}
        return ["; ".join(item) for item in missing_for(cfg, Run("CONFIG", **options))]

    return found


def test_nothing_is_missing_where_all_is_there(look):
    assert look() == [] == look(trains=False)


@pytest.mark.parametrize(
    ("changes", "run", "message"),
    [
        (["MODEL.WEIGHTS", ""], {}, "MODEL.WEIGHTS is empty.*MODEL.FROM_SCRATCH True"),
        (["MODEL.WEIGHTS", "", "MODEL.FROM_SCRATCH", True], {}, None),
        (["MODEL.WEIGHTS", "absent"], {}, "weights absent .*do not exist; python .*--from-hub"),
        (["MODEL.WEIGHTS", "o/model_final.pth"], {}, "weights o/model_final.*; train the"),
        (["MODEL.WEIGHTS", "absent"], {"trains": False}, "do not exist; check MODEL.WEIGHTS"),
        (["MODEL.LANGUAGE.TOKENIZER", "./absent"], {}, "no tokenizer can be read from './absent'"),
        (["MODEL.LANGUAGE.NUM_LAYERS", 3], {}, "weights/first.*missing: .*layers.2"),
        (["MODEL.RESOBLEND.DIM", 64], {}, "of another shape: .*in the file, .* in the model"),
        (["MODEL.LANGUAGE.VOCAB_SIZE", 600], {}, "tokenizer .* has 640 words .*VOCAB_SIZE is 600"),
        (["SOLVER.AMP.ENABLED", True], {}, "SOLVER.AMP.ENABLED needs a CUDA device"),
        (["SOLVER.IMS_PER_BATCH", 5], {"processes": 2}, "IMS_PER_BATCH is 5.*2 process"),
        (["SOLVER.ZERO.CONFIG", "absent.json"], {}, "SOLVER.ZERO.CONFIG.*absent.json"),
        (["MODEL.COLORMAP_ENCODER.ARCH", "typo"], {}, "typo.* is not a timm model"),
        (["DATASETS.TEST", "()"], {"trains": False, "data": True}, "DATASETS.TEST is empty"),
        (["DATASETS.TEST", "()"], {}, None),
        (["MODEL.DEVICE", "cuda"], {}, None),  # small enough for the CPU
    ],
)
def test_each_thing_is_told_with_what_to_do(look, monkeypatch, changes, run, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = look(*changes, **run)
    if message is None:
        assert found == []
    else:
        assert any(re.search(message, text) for text in found), found


def test_data_and_masks_are_looked_for(look, ready, monkeypatch):
    paths = {"json_file": "absent.json", "image_root": str(ready), "form": "png"}
    metadata = SimpleNamespace(as_dict=lambda: paths, get=lambda key, default=None: paths.get(key))
    catalog = SimpleNamespace(get=lambda name: metadata)
    monkeypatch.setattr(preflight, "MetadataCatalog", catalog)
    sources = "[['gella_coco_*_val2017', 'auto', 'no_masks.json']]"
    found = look(
        *("DATASETS.TRAIN", "('gella_no_such',)", "INPUT.GELLA.ENTITY_SOURCES", sources), data=True
    )
    assert len(found) == 4
    assert found[0].startswith("dataset gella_no_such is not registered")
    assert found[1].startswith("dataset gella_coco_png_val2017: absent.json: not there")
    assert re.search(
        "entity masks no_masks.json .*precompute_entities.py --dataset gella_c", found[3]
    )


def test_a_tokenizer_of_other_ids_is_refused(look, ready, tmp_path):
    """Beside the weights lies the one that they were trained with, or their config names it."""
    other = shutil.copytree(ready / TOKENIZER, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    one, two = sorted(words, key=words.get)[-2:]
    words[one], words[two] = words[two], words[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (found,) = look("MODEL.LANGUAGE.TOKENIZER", other)
    assert "2 words have other ids" in found and f"MODEL.LANGUAGE.TOKENIZER {TOKENIZER}" in found
    released = shutil.copytree(ready / FIRST, tmp_path / "released")
    (released / "config.yaml").unlink()
    assert look("MODEL.WEIGHTS", released, "MODEL.LANGUAGE.TOKENIZER", other) == []  # nobody knows
    shutil.copytree(ready / TOKENIZER, released / "tokenizer")
    (found,) = look("MODEL.WEIGHTS", released, "MODEL.LANGUAGE.TOKENIZER", other)
    assert "released" in found
    assert look("MODEL.WEIGHTS", released) == []


@pytest.mark.parametrize("gib", [80, 24, 0.01])
def test_gpus_are_compared_with_the_longest_prompt(look, monkeypatch, gib):
    card = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    found = look("MODEL.DEVICE", "cuda", processes=2, local=2)
    assert bool(found) == (gib < 1)
    if found:
        assert re.search(r"GPU memory: .* at the longest prompt, \d+ tokens, 2 image", found[0])
        assert found[0].endswith("use larger cards or more of them")


def test_the_host_has_to_hold_what_no_gpu_does(look, monkeypatch):
    monkeypatch.setattr(preflight, "_host_memory", lambda: 2**20)
    (found,) = look(processes=2, local=2)
    assert re.search("host memory: .* GiB are needed for 2 process.*, 0.0 GiB are there", found)


def test_checkpoints_count_before_weights(look, ready, tmp_path):
    cut = tmp_path / "checkpoints" / "iter_0000001"
    cut.mkdir(parents=True)
    assert "state.json is missing" in look("OUTPUT_DIR", tmp_path, resume=True)[0]
    assert "is not complete" in look("MODEL.WEIGHTS", cut)[0]
    assert look("OUTPUT_DIR", tmp_path) == []


def test_released_weights_are_ready():
    for config in (CONFIG, ROOT / "weights" / "gella_tiny_shapes" / "config.yaml"):
        cfg = load_config(config, SMALL if config == CONFIG else [])
        cfg.MODEL.LANGUAGE.TOKENIZER = str(ROOT / "weights" / "gella_tiny_shapes" / "tokenizer")
        assert missing_for(cfg, Run(str(config), data=False)) == []
    assert missing_text([preflight.Missing("a", "b")], "C") == "error: a; b"
