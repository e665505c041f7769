"""The folder in which the documentation's commands run: the repository, and small files for large.

Whatever a page names and no test can have stands here under the same name and in the same format:
COCO with its narratives, RefCOCO and EntitySeg are a few synthetic scenes, LLaVA-1.5, Mask2Former
and SAM are random models of some thousand weights, `configs/gella_swin_t.yaml` fits them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

from docs_replacements import replace

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("docs", "examples", "projects", "tests", "tools", "weights", "README.md", "setup.py")
LINKED += ("constraints.txt", "pyproject.toml")
TOKENIZER = "datasets/tokenizers/llava-v1.5-7b"
# The paper's config at the size of the tiny one, in what its public weights must fit.
PAPER_CONFIG = f"""
_BASE_: gella_tiny_shapes.yaml
MODEL:
  IMAGE_ENCODER: {{STEM: patch, QUICK_GELU: True, IMAGE_SIZE: 32, WIDTH: 32, HEAD_WIDTH: 16}}
  MASK_DECODER: {{QUERIES: learned, NUM_QUERIES: 12}}
  LANGUAGE:
    TOKENIZER: {TOKENIZER}
    TIE_EMBEDDINGS: False
    IMAGE_TOKEN_STRIDE: 1
    MAX_POSITIONS: 4096
    MAX_NEW_TOKENS: 8
DATASETS:
  TRAIN:
    - gella_coco_png_train2017
    - gella_coco_panoptic_train2017
    - gella_entityseg_captions_train
  TEST: ("gella_coco_png_val2017", "gella_coco_panoptic_val2017")
OUTPUT_DIR: output/gella_swin_t
"""
SHORT = "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, WARMUP_ITERS: 1}\nDATALOADER: {NUM_WORKERS: 0}\n"


def build_sandbox(folder: Path) -> None:
    """Write everything that does not depend on a page; `folder` is made."""
    folder.mkdir(parents=True)
    for name in LINKED:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "Makefile").write_text(replace(ROOT.joinpath("Makefile").read_text(), "Makefile"))
    _write_configs(folder)
    _write_datasets(folder)
    previous = os.getcwd()
    os.chdir(folder)  # paths of configs count from the current folder
    try:
        _write_weights(Path())
        _write_models(Path("models"))
    finally:
        os.chdir(previous)


def copy_sandbox(base: Path, folder: Path, socket: Path) -> dict[str, str]:
    """A sandbox of its own for one page.

    Args:
        base: what `build_sandbox` wrote.
        folder: the copy, which must not exist.
        socket: of the warm Python (docs_warm.py) that is `python` in the sandbox.

    Returns:
        The environment for `bash`, in which PATH leads to that Python first.
    """
    shutil.copytree(base, folder, symlinks=True)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    warm = f'#!/bin/sh\nexec "{sys.executable}" -S -E "{ROOT}/tests/docs_warm.py" run "{socket}"'
    scripts = {
        "python": f'{warm} "$@"\n',
        "torchrun": f'{warm} -m torch.distributed.run "$@"\n',
        "srun": f'{warm} "{ROOT}/tests/docs_srun.py" "$@"\n',
    }
    for name, text in scripts.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    unwanted = ("DETECTRON2_DATASETS", "GELLA_API_URL", "GELLA_API_MODEL", "GELLA_API_KEY")
    kept = {k: v for k, v in os.environ.items() if k not in unwanted and not k.startswith("PYTEST")}
    paths = os.pathsep.join([str(ROOT / "projects"), str(ROOT / "tests")])
    return {
        **kept,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MPLBACKEND": "Agg",
    }


def _write_configs(folder: Path) -> None:
    configs = folder / "configs"
    shutil.copytree(ROOT / "configs", configs)
    (configs / "gella_swin_t.yaml").write_text(PAPER_CONFIG)
    tiny = configs / "gella_tiny_shapes.yaml"
    tiny.rename(configs / "tiny_in_full.yaml")
    tiny.write_text(f"_BASE_: tiny_in_full.yaml\n{SHORT}")
    # Configs of the paper's model that count epochs would train for thousands of steps.
    for path in configs.rglob("*.yaml"):
        assert "  EPOCHS:" not in path.read_text() or path.name == "gella_swin_t.yaml", path


def _write_datasets(folder: Path) -> None:
    from dataset_scripts import script

    data = folder / "datasets"
    data.mkdir()
    for path in (ROOT / "datasets").iterdir():
        if path.is_file():
            (data / path.name).symlink_to(path)
    shapes = data / "shapes"
    script("prepare_shapes").prepare(shapes, {"train": 6, "val": 4}, seed=2, workers=1)
    shutil.copytree(shapes / "tokenizer", folder / TOKENIZER)
    for split in ("train", "val"):
        _write_coco(shapes, data / "coco", split)
    _write_refcoco(shapes, data)
    _write_entityseg(shapes, data / "entityseg")
    masks = data / "entities" / "coco_entity_swin_l_val2017.json"
    masks.parent.mkdir()
    shutil.copy(shapes / "annotations" / "predicted_val.json", masks)
    _write_own_files(folder)


def _write_coco(shapes: Path, coco: Path, split: str) -> None:
    """The scenes as COCO panoptic and PNG of 2017, with COCO's own categories."""
    from gella.data.coco_categories import coco_panoptic_categories

    notes = coco / "annotations"
    year = f"{split}2017"
    shutil.copytree(shapes / split, coco / year)
    shutil.copytree(shapes / "annotations" / f"panoptic_{split}", notes / f"panoptic_{year}")
    content = json.loads((shapes / "annotations" / f"panoptic_{split}.json").read_text())
    categories = coco_panoptic_categories()
    places: dict[bool, list[int]] = {True: [], False: []}
    for category in categories:
        places[bool(category["isthing"])].append(category["id"])
    new = {
        category["id"]: places[bool(category["isthing"])][place]
        for place, category in enumerate(content["categories"])
    }
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] = new[segment["category_id"]]
    content["categories"] = categories
    (notes / f"panoptic_{year}.json").write_text(json.dumps(content))
    narratives = shapes / "annotations" / f"png_shapes_{split}.json"
    shutil.copy(narratives, notes / f"png_coco_{year}.json")


def _write_refcoco(shapes: Path, data: Path) -> None:
    """RefCOCO's files over the scenes that stand for COCO train2017."""
    with open(shapes / "refcoco" / "refs(unc).p", "rb") as stream:
        refs = pickle.load(stream)
    known = {int(path.stem) for path in (data / "coco" / "train2017").iterdir()}
    refs = [ref for ref in refs if ref["image_id"] in known]
    for folder, makers in {"refcoco": ("unc",), "refcoco+": ("unc",), "refcocog": ("umd",)}.items():
        (data / folder).mkdir()
        instances = json.loads((shapes / "refcoco" / "instances.json").read_text())
        instances["images"] = [i for i in instances["images"] if i["id"] in known]
        instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] in known]
        (data / folder / "instances.json").write_text(json.dumps(instances))
        for maker in makers:
            with open(data / folder / f"refs({maker}).p", "wb") as stream:
                pickle.dump(refs, stream, protocol=2)


def _write_entityseg(shapes: Path, folder: Path) -> None:
    notes = folder / "annotations"
    (notes / "entity_segmentation").mkdir(parents=True)
    shutil.copytree(shapes / "train", folder / "images" / "one")
    shutil.copy(
        shapes / "refcoco" / "instances.json",
        notes / "entity_segmentation" / "entityv2_010203_entity_train.json",
    )
    shutil.copy(shapes / "annotations" / "captions_train.jsonl", notes)


def _write_weights(folder: Path) -> None:
    """Random weights where a page takes those of a training, of LLaVA-1.5 and of Mask2Former."""
    import torch
    from detectron2.modeling import build_model

    from gella.config import load_config

    for name in ("gella_tiny_shapes", "gella_swin_t"):
        torch.manual_seed(0)
        cfg = load_config(f"configs/{name}.yaml")
        model = build_model(cfg)
        output = folder / "output" / name
        output.mkdir(parents=True)
        torch.save({"model": model.state_dict()}, output / "model_final.pth")
        if name == "gella_swin_t":
            _write_public(folder, cfg, model)


def _write_public(folder: Path, cfg: Any, model: Any) -> None:
    """Public models whose parts have the sizes of `model`."""
    import numpy as np
    import timm
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from gella.weights.mask2former import Mask2FormerUpstream

    language, clip = cfg.MODEL.LANGUAGE, cfg.MODEL.IMAGE_ENCODER
    words = language.VOCAB_SIZE - 1
    vision = CLIPVisionConfig(
        hidden_size=clip.WIDTH,
        intermediate_size=int(clip.WIDTH * clip.MLP_RATIO),
        num_hidden_layers=clip.LAYERS,
        num_attention_heads=clip.WIDTH // clip.HEAD_WIDTH,
        image_size=clip.IMAGE_SIZE,
        patch_size=clip.PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=words + 8,
        hidden_size=language.HIDDEN_SIZE,
        intermediate_size=language.INTERMEDIATE_SIZE,
        num_hidden_layers=language.NUM_LAYERS,
        num_attention_heads=language.NUM_HEADS,
        num_key_value_heads=language.NUM_KEY_VALUE_HEADS,
        rms_norm_eps=language.RMS_NORM_EPS,
    )
    both = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=words,
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(both).save_pretrained(folder / "llava-1.5-7b-hf")
    encoder = timm.create_model(cfg.MODEL.COLORMAP_ENCODER.ARCH)
    torch.save(encoder.state_dict(), folder / "lcnet.pth")
    m2f = Mask2FormerUpstream.from_config(cfg).from_gella(model.state_dict())
    arrays = {key: np.asarray(tensor) for key, tensor in m2f.items()}
    (folder / "model_final_9fd0ae.pkl").write_bytes(pickle.dumps({"model": arrays}))


def _write_models(folder: Path) -> None:
    """Segmenters and a LLaVA for captions."""
    from caption_server import save_tiny_llava
    from tiny_segmenters import save_mask2former, save_sam, save_toy

    save_sam(folder / "sam")
    save_mask2former(folder / "mask2former")
    save_toy(folder / "toy")
    save_tiny_llava(folder / "llava-1.5-7b-hf", Path("datasets/shapes/tokenizer"))


def _write_own_files(folder: Path) -> None:
    """Pictures and annotations under the names that pages give to the reader's own."""
    from tiny_segmenters import save_toy

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
    save_toy(folder / "toy")
    (folder / "toy" / "toy.yaml").rename(folder / "configs" / "entity_swin_l.yaml")
    (folder / "toy" / "toy.pth").rename(folder / "entity_swin_l.pth")
