"""Where the documentation's commands run: the repository, and small files for large ones.

Whatever a page names and no test can have stands here under the same name and in the same format:
COCO with its narratives, RefCOCO and EntitySeg are a few synthetic scenes, LLaVA-1.5, Mask2Former
and SAM are random models of some thousand weights, `configs/gella_swin_t.yaml` fits them. Commands
run as a page has them, but for `CHANGES`.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from caption_server import save_tiny_llava
from detectron2.modeling import build_model
from tiny_clip import save_clip
from tiny_segmenters import save_mask2former, save_sam, save_toy
from tiny_weights import fill_hub, llava

from gella.config import load_config
from gella.data.register import coco_panoptic_categories
from gella.weights.mask2former import Mask2FormerUpstream

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("docs", "examples", "projects", "tests", "tools", "benchmarks", "README.md")
LINKED += ("weights/gella_tiny_shapes",)
LINKED += ("constraints.txt", "pyproject.toml", "setup.py")
TOKENIZER = "weights/tokenizers/llava-v1.5-7b"
FIRST_WEIGHTS = "weights/first/gella_swin_t"
# The paper's config at the size of the tiny one, in what its public weights must fit.
PAPER_CONFIG = f"""
_BASE_: gella_tiny_shapes.yaml
MODEL:
  FROM_SCRATCH: False
  WEIGHTS: {FIRST_WEIGHTS}
  IMAGE_ENCODER:
    {{STEM: patch, QUICK_GELU: True, IMAGE_SIZE: 32, PATCH_SIZE: 8, WIDTH: 32, HEAD_WIDTH: 16,
    LAYERS: 3}}
  MASK_DECODER: {{QUERIES: learned, NUM_QUERIES: 12}}
  LANGUAGE:
    {{HIDDEN_SIZE: 32, INTERMEDIATE_SIZE: 40, NUM_LAYERS: 2, NUM_HEADS: 2, NUM_KEY_VALUE_HEADS: 1,
    TOKENIZER: {TOKENIZER}, TIE_EMBEDDINGS: False, IMAGE_TOKEN_STRIDE: 1, MAX_POSITIONS: 4096,
    MAX_NEW_TOKENS: 8}}
INPUT:
  GELLA:
    ENTITY_SOURCES:
      - ["gella_coco_*_val2017", "auto", "datasets/coco/entities/mask2former_swin_l_val2017.json"]
DATASETS:
  TRAIN: [gella_coco_png_train2017, gella_coco_panoptic_train2017, gella_entityseg_captions_train]
  TEST: ("gella_coco_png_val2017", "gella_coco_panoptic_val2017")
OUTPUT_DIR: output/gella_swin_t
"""
SHORT = "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, WARMUP_ITERS: 1}\nDATALOADER: {NUM_WORKERS: 0}\n"
VISIT = "python tests/docs_warm.py visit tools/app.py"  # nobody else would stop it
M2F, TOY = (
    "transformers:facebook/mask2former-swin-large-coco",
    "setup=tiny_segmenters:add_toy_config",
)
SURE = "pred_iou_thresh=-100 {0} stability_score_thresh=0 {0} points_per_side=4"  # a random SAM
TINY = "configs/gella_tiny_shapes.yaml"
FIRST = "tools/convert_weights.py --config-file configs/gella_swin_t.yaml --from-hub"
WEIGHTS = "output/gella_swin_t/model_final.pth"
# page, or "*" for all of them -> what stands in its commands: what is run in its place. Each stands
# for what a test has not: GPUs (tests/test_launching.py starts several processes in every way), the
# network (a random model of the same kind), a key or a server, the reader's own files, and hours.
CHANGES: dict[str, dict[str, str]] = {
    "*": {
        " --num-gpus 8": "",
        "sam:facebook/sam-vit-huge": "sam:models/sam",
        f"{M2F}-panoptic": "transformers:models/mask2former",
        f"{M2F}-instance": "transformers:models/mask2former",
        # the stand-in lies there
        "--output datasets/coco/entities/mask2former_swin_l_val2017.json": "--output made.json",
        "https://host/v1": "@CHAT@",
        "GELLA_API_KEY=...": "GELLA_API_KEY=none",
        "python tools/app.py": VISIT,
        # LLaVA from a cache of the hub; the tiny Mask2Former has another format than the hub's
        f"python {FIRST}": f"HF_HOME=hub {sys.executable} {FIRST} --output gella_first"
        " --mask2former model_final_9fd0ae.pkl --colormap-encoder lcnet.pth"
        " MODEL.HUB.LLAVA tiny/llava",
    },
    "Makefile": {
        "python tools/app.py": VISIT,
        "--train 0\n": "--train 0 --val 4\n",
        "prepare_shapes.py\n": "prepare_shapes.py --train 6 --val 4\n",
        "$(FIRST).yaml\n": "$(FIRST).yaml SOLVER.MAX_ITER 2\n",
        "$(FINISH).yaml\n": "$(FINISH).yaml SOLVER.MAX_ITER 2\n",
        "-n 2 tests": "tests/test_setup_detectron2.py",
    },
    "README.md": {
        "prepare_shapes.py\n": "prepare_shapes.py --train 6 --val 4\n",
        "SOLVER.MAX_ITER 3000": "SOLVER.MAX_ITER 3",
    },
    "docs/ANALYSIS.md": {
        "benchmark.py eval": "benchmark.py eval --images 2 --size 96x64 --recall-nouns 100"
        " --repeat 1",
    },
    "docs/CAPTIONS.md": {  # random weights describe nothing
        "--device cuda --dtype float16 \\\n    --input images --output captions.jsonl": (
            "--max-tokens 4 --answer-attempts 1 --limit 1 --input images --output none.jsonl"
            " || test $? -eq 1"
        ),
    },
    "docs/APP.md": {
        "--weights model_final.pth --device cuda": f"--weights {WEIGHTS} --device cpu",
        "sam:facebook/sam-vit-base": "sam:models/sam",
    },
    "docs/DEMO.md": {
        "--min-area 100": "--min-area 1 --segmenter-option " + SURE.format("--segmenter-option"),
        # The later segmenter counts: the random Mask2Former finds nothing in some pictures.
        "output/zero_shot": "output/zero_shot --segmenter sam:models/sam --segmenter-option "
        + SURE.format("--segmenter-option")
        + " --opts MODEL.CLIP.NAME models/clip",
    },
    "docs/ENTITY_MASKS.md": {  # a Detectron2 model that finds red and blue
        "setup=mask2former:add_maskformer2_config"
        " --option MODEL.MASK_FORMER.TEST.INSTANCE_ON=True": TOY,
        "--min-area 100": "--min-area 1 --option " + SURE.format("--option"),
        "tue-mps/coco_panoptic_eomt_large_640": "models/mask2former",
        "--nnodes 2 --nproc-per-node 8": "--nproc-per-node 2",
        "10.0.0.1:29500": "127.0.0.1:@PORT@",
        '"A man leads two dogs."': '"A man leads two dogs." --nouns "A man,two dogs"',
        "CONFIG": "configs/gella_swin_t.yaml",
        "PTH": WEIGHTS,
        'device="cuda"': 'device="cpu"',
    },
    "docs/EVALUATION.md": {
        "CONFIG": TINY,
        "FILE": "output/gella_tiny_shapes/model_final.pth",
        "OUTPUT_DIR": "output/gella_tiny_shapes",
        "NAME": "gella_shapes_png_train",
    },
    "docs/FINETUNING.md": {
        "--min-area 100": "--min-area 1 --option " + SURE.format("--option"),
        "--train 40 --val 40": "--train 4 --val 2",
        "--val 60": "--val 2",
        "SOLVER.MAX_ITER 20": "SOLVER.MAX_ITER 2",
        "SOLVER.MAX_ITER 150 TEST.EVAL_PERIOD 50": "SOLVER.MAX_ITER 2 TEST.EVAL_PERIOD 1",
        "SOLVER.IMS_PER_BATCH 8": "SOLVER.IMS_PER_BATCH 2",
    },
    "docs/OPTIONS.md": {"SOLVER.MAX_ITER 400": "SOLVER.MAX_ITER 2"},
    "docs/RESULTS.md": {
        "--moved 7": "--moved 1 --iterations 2",
        " MODEL.DEVICE cuda": " MODEL.DEVICE cpu",
        # DeepSpeed compiles an op for a minute; tests/test_zero.py trains under it
        " SOLVER.ZERO.CONFIG configs/zero/stage2.json": "",
        "AMP.ENABLED True": "AMP.ENABLED False",
        "SOLVER.MAX_ITER 200": "SOLVER.MAX_ITER 2",
        "HIDDEN_SIZE 2048": "HIDDEN_SIZE 128",
        "INTERMEDIATE_SIZE 5504": "INTERMEDIATE_SIZE 160",
        "NUM_LAYERS 20": "NUM_LAYERS 1",
    },
    "docs/TRAINING.md": {
        " --num-machines 2 --machine-rank 0": "",
        "tcp://10.0.0.1:29500": "tcp://127.0.0.1:@PORT@",
        "--nnodes 2 --nproc-per-node 8": "--nproc-per-node 2",
        "--nnodes $SLURM_NNODES --nproc-per-node 8": "--nproc-per-node 2",
        "--rdzv-id $SLURM_JOB_ID --rdzv-endpoint $SLURMD_NODENAME:29500": (
            "--rdzv-endpoint 127.0.0.1:@PORT@"
        ),
        "10.0.0.1:29500": "127.0.0.1:@PORT@",
        "TEST.EVAL_PERIOD 2000": "TEST.EVAL_PERIOD 1",
    },
    "docs/WEIGHTS.md": {  # the tiny model's colormap encoder is no Swin and has a file of its own
        "--mask2former model_final_9fd0ae.pkl": "--mask2former model_final_9fd0ae.pkl"
        " --colormap-encoder lcnet.pth",
        "iter_0008391": "iter_0000001",
    },
    "configs/README.md": {
        "CONFIG.yaml": "models/toy/toy.yaml",
        "WEIGHTS.pth": "models/toy/toy.pth",
        "setup=PROJECT:ADD_CONFIG": TOY,
    },
    "datasets/README.md": {
        "datasets/prepare_shapes.py ": "datasets/prepare_shapes.py --train 4 --val 2 "
    },
}


def changed(text: str, page: str) -> str:
    """The commands of a page, or the Makefile, after `CHANGES`."""
    everywhere = {} if page == "Makefile" else CHANGES["*"]
    for old, new in {**everywhere, **CHANGES.get(page, {})}.items():
        text = text.replace(old, new)
    return text


def build_sandbox(folder: Path, scenes: Path) -> None:
    """Write everything that does not depend on a page into a new folder, of prepared `scenes`."""
    folder.mkdir(parents=True)
    (folder / "weights").mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "Makefile").write_text(changed(ROOT.joinpath("Makefile").read_text(), "Makefile"))
    configs = folder / "configs"
    shutil.copytree(ROOT / "configs", configs)
    (configs / "gella_swin_t.yaml").write_text(PAPER_CONFIG)
    tiny = configs / "gella_tiny_shapes.yaml"
    tiny.rename(configs / "tiny_in_full.yaml")
    tiny.write_text(f"_BASE_: tiny_in_full.yaml\n{SHORT}")
    write_datasets(folder, scenes)
    _write_own_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # paths of configs count from the current folder
        _write_weights()
        _write_models(Path("models"))


def copy_sandbox(base: Path, folder: Path, socket: Path) -> dict[str, str]:
    """Copy what `build_sandbox` wrote to a new folder for one page.

    Returns the environment for `bash`: in PATH first a `python` that is the warm one at `socket`.
    """
    shutil.copytree(base, folder, symlinks=True)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    warm = f'exec "{sys.executable}" -S -E "{ROOT}/tests/docs_warm.py" run "{socket}"'
    step = "SLURM_JOB_ID=77 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0"  # as srun starts its one task
    for name, text in {
        "python": warm,
        "torchrun": f"{warm} -m torch.distributed.run",
        "srun": f'while [ "${{1#--}}" != "$1" ]; do shift; done; {step} exec',
    }.items():
        (binaries / name).write_text(f'#!/bin/sh\n{text} "$@"\n')
        (binaries / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    unwanted = ("DETECTRON2_DATASETS", "GELLA_API_URL", "GELLA_API_MODEL", "GELLA_API_KEY")
    unwanted += ("MAKEFLAGS",)  # with the folder of `make test-lowest`
    kept = {k: v for k, v in os.environ.items() if k not in unwanted and not k.startswith("PYTEST")}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    kept |= {"GLOO_SOCKET_IFNAME": "lo", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    return {**kept, "PYTHONPATH": os.pathsep.join([f"{ROOT}/projects", f"{ROOT}/tests"])}


def write_datasets(folder: Path, scenes: Path) -> None:
    """COCO with narratives, RefCOCO, EntitySeg, masks and a tokenizer, of prepared `scenes`."""
    data = folder / "datasets"
    data.mkdir()
    for path in (ROOT / "datasets").iterdir():
        if path.is_file():
            (data / path.name).symlink_to(path)
    shapes = shutil.copytree(scenes, data / "shapes")
    shutil.copytree(shapes / "tokenizer", folder / TOKENIZER)
    for split in ("train", "val"):
        _write_coco(shapes, data / "coco", split)
    # RefCOCO's files over the scenes that stand for COCO train2017
    refs = pickle.loads((shapes / "refcoco" / "refs(unc).p").read_bytes())
    train = {int(path.stem) for path in (data / "coco" / "train2017").iterdir()}
    instances = json.loads((shapes / "refcoco" / "instances.json").read_text())
    instances["images"] = [i for i in instances["images"] if i["id"] in train]
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] in train]
    for name, maker in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        (data / name).mkdir()
        (data / name / "instances.json").write_text(json.dumps(instances))
        kept = [ref for ref in refs if ref["image_id"] in train]
        (data / name / f"refs({maker}).p").write_bytes(pickle.dumps(kept, protocol=2))
    entityseg = data / "entityseg" / "annotations" / "entity_segmentation"
    entityseg.mkdir(parents=True)
    for split in ("train", "val"):  # one annotation has the scenes of both
        shutil.copytree(shapes / split, data / "entityseg" / "images" / split)
    name = "entityv2_010203_entity_train.json"
    shutil.copy(shapes / "refcoco" / "instances.json", entityseg / name)
    shutil.copy(shapes / "annotations" / "captions_train.jsonl", entityseg.parent)
    for name in ("entities/coco_entity_swin_l_val2017", "coco/entities/mask2former_swin_l_val2017"):
        masks = data / f"{name}.json"
        masks.parent.mkdir()
        shutil.copy(shapes / "annotations" / "predicted_val.json", masks)


def _write_coco(shapes: Path, coco: Path, split: str) -> None:
    """The scenes as COCO panoptic and PNG of 2017, with COCO's own categories."""
    notes, year = coco / "annotations", f"{split}2017"
    shutil.copytree(shapes / split, coco / year)
    shutil.copytree(shapes / "annotations" / f"panoptic_{split}", notes / f"panoptic_{year}")
    content = json.loads((shapes / "annotations" / f"panoptic_{split}.json").read_text())
    categories = coco_panoptic_categories()
    ids = {kind: [c["id"] for c in categories if c["isthing"] == kind] for kind in (0, 1)}
    new = {c["id"]: ids[c["isthing"]][i] for i, c in enumerate(content["categories"])}
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = new[segment["category_id"]]
    content["categories"] = categories
    (notes / f"panoptic_{year}.json").write_text(json.dumps(content))
    narratives = shapes / "annotations" / f"png_shapes_{split}.json"
    shutil.copy(narratives, notes / f"png_coco_{year}.json")


def _write_weights() -> None:
    """Random weights where a page takes those of a training, of LLaVA-1.5 and of Mask2Former."""
    for name in ("gella_tiny_shapes", "gella_swin_t"):
        torch.manual_seed(0)
        cfg = load_config(f"configs/{name}.yaml")
        model = build_model(cfg)
        Path("output", name).mkdir(parents=True)
        torch.save({"model": model.state_dict()}, f"output/{name}/model_final.pth")
    shutil.copytree(Path(WEIGHTS).parent, FIRST_WEIGHTS)
    llava(words=cfg.MODEL.LANGUAGE.VOCAB_SIZE - 1).save_pretrained("llava-1.5-7b-hf")
    fill_hub(Path("hub/hub"), {"llava": "llava-1.5-7b-hf"})
    torch.save(timm.create_model(cfg.MODEL.COLORMAP_ENCODER.ARCH).state_dict(), "lcnet.pth")
    m2f = Mask2FormerUpstream.from_config(cfg).from_gella(model.state_dict())
    arrays = {key: np.asarray(tensor) for key, tensor in m2f.items()}
    Path("model_final_9fd0ae.pkl").write_bytes(pickle.dumps({"model": arrays}))


def _write_models(folder: Path) -> None:
    """Segmenters, a CLIP, and a LLaVA for captions."""
    save_clip(folder / "clip")
    save_sam(folder / "sam")
    save_mask2former(folder / "mask2former")
    save_toy(folder / "toy")
    shutil.copy(folder / "toy" / "toy.yaml", "configs/entity_swin_l.yaml")
    shutil.copy(folder / "toy" / "toy.pth", "entity_swin_l.pth")
    save_tiny_llava(folder / "llava-1.5-7b-hf", Path("datasets/shapes/tokenizer"))


def _write_own_files(folder: Path) -> None:
    """Pictures and annotations under the names that pages give to the reader's own."""
    coco = folder / "datasets" / "coco"
    shutil.copytree(coco / "val2017", folder / "images")
    shutil.copytree(coco / "annotations" / "panoptic_val2017", folder / "panoptic_png")
    shutil.copy(coco / "annotations" / "panoptic_val2017.json", folder / "panoptic.json")
    shutil.copy(coco / "annotations" / "png_coco_val2017.json", folder / "narratives.json")
    shutil.copytree(folder / "images", folder / "photos")
    next((folder / "photos").iterdir()).rename(folder / "photos" / "street.jpg")
    shutil.copy(folder / "photos" / "street.jpg", folder)
    (folder / "my_dataset.py").write_text(
        "from gella.data.register import register_panoptic\n"
        'register_panoptic("my_pictures", "images", "panoptic_png", "panoptic.json")\n'
    )
