"""Every shipped config loads, builds, and states only its difference from its parent.

What the rows of the paper's tables change is written down here a second time, by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from gella import add_gella_config, load_config
from gella.data.check import known_counts
from gella.engine.optimizer import with_epochs
from gella.entities.sources import SOURCE_KINDS
from gella.modeling.colormap_encoder import TimmColormapEncoder

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
BY_NAME = {path.stem: path for path in CONFIGS}
ABLATIONS = [path for path in CONFIGS if path.parent.name == "ablations"]

BLEND, SOURCES = "MODEL.RESOBLEND.", "INPUT.GELLA.ENTITY_SOURCES"
TRAIN, VAL = "gella_coco_*_train2017", "gella_coco_*_val2017"


def masks(*files: str) -> list[list[str]]:
    """Entries of ENTITY_SOURCES; the file's last word is the split."""
    return [
        [f"gella_coco_*_{f.rsplit('_', 1)[1]}", "auto", f"datasets/entities/{f}.json"]
        for f in files
    ]


USUAL = "coco_entity_swin_l_val2017"
PANOPTIC, NARRATIVES, COLORMAP = "Base-panoptic", "Base-narratives", "Base-colormap"
MOBILENET = {"MODEL.COLORMAP_ENCODER.ARCH": "mobilenetv2_100"}
SWIN_L = {
    "MODEL.COLORMAP_ENCODER.ARCH": "swin_large_patch4_window12_384",
    "MODEL.MASK_DECODER.NUM_QUERIES": 200,
    "INPUT.GELLA.COLORMAP_SIZE": 768,
}
LEAVE_OUT = {"INPUT.GELLA.LEAVE_OUT_MISSING": True}
# Row of a table: (parent, what it changes besides OUTPUT_DIR).
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "table05a_clip_224": (PANOPTIC, {"MODEL.IMAGE_ENCODER.IMAGE_SIZE": 224}),
    "table05a_clip_336": (PANOPTIC, {}),
    "table05b_color_location": (PANOPTIC, {"INPUT.GELLA.COLORS": "location"}),
    "table05b_color_random": (PANOPTIC, {}),
    "table06a_mobilenetv2": (COLORMAP, MOBILENET),
    "table06a_swin_t": (COLORMAP, {}),
    "table06a_swin_l": (COLORMAP, SWIN_L),
    "table06b_train_coco": (
        "table06a_mobilenetv2",
        {SOURCES: masks("coco_entity_swin_l_train2017"), **LEAVE_OUT},
    ),
    "table06b_train_entityseg": (
        "table06a_mobilenetv2",
        {SOURCES: masks("entityseg_swin_l_train2017"), **LEAVE_OUT},
    ),
    "table06b_train_ground_truth": ("table06a_mobilenetv2", {}),
    "table07_no_self_attention": (PANOPTIC, {BLEND + "SELF_ATTENTION": False}),
    "table07_no_cross_attention": (PANOPTIC, {BLEND + "CROSS_ATTENTION": False}),
    "table07_no_feed_forward": (PANOPTIC, {BLEND + "FEED_FORWARD": False}),
    "table07_no_residual": (PANOPTIC, {BLEND + "RESIDUAL": False}),
    "table07_no_convolution": (PANOPTIC, {BLEND + "CONVOLUTION": False}),
    "table07_all": (PANOPTIC, {}),
    "table08a_train_coco": (
        PANOPTIC,
        {SOURCES: masks("coco_entity_swin_l_train2017", USUAL), **LEAVE_OUT},
    ),
    "table08a_train_entityseg": (
        PANOPTIC,
        {SOURCES: masks("entityseg_swin_l_train2017", USUAL), **LEAVE_OUT},
    ),
    "table08a_train_ground_truth": (PANOPTIC, {}),
    "table08b_test_coco": (PANOPTIC, {}),
    "table08b_test_entityseg": (PANOPTIC, {SOURCES: masks("entityseg_swin_l_val2017")}),
    "table08b_test_ground_truth": (PANOPTIC, {SOURCES: []}),
    "table09_ratios_0_0_10": (NARRATIVES, {"DATALOADER.TASK_RATIOS": [0.0, 0.0, 1.0]}),
    "table09_ratios_0_2_8": (NARRATIVES, {"DATALOADER.TASK_RATIOS": [0.0, 0.2, 0.8]}),
    "table09_ratios_1_1_8": (NARRATIVES, {"DATALOADER.TASK_RATIOS": [0.1, 0.1, 0.8]}),
    "table09_ratios_2_2_6": (NARRATIVES, {}),
    "table10_fc_relu_fc": (NARRATIVES, {"MODEL.ASSOCIATION.STRUCTURE": "fc_relu_fc"}),
    "table10_fc": (NARRATIVES, {}),
    "table11a_condinst_swin_t": (NARRATIVES, {SOURCES: masks("coco_entity_condinst_val2017")}),
    "table11a_solov2_swin_t": (NARRATIVES, {SOURCES: masks("coco_entity_solov2_val2017")}),
    "table11a_mask2former_swin_t": (NARRATIVES, {SOURCES: masks("coco_entity_swin_t_val2017")}),
    "table11a_mask2former_swin_l": (NARRATIVES, {}),
    "table11b_coco_instance": (NARRATIVES, {SOURCES: masks("coco_instance_swin_l_val2017")}),
    "table11b_coco_panoptic": (NARRATIVES, {SOURCES: masks("coco_panoptic_swin_l_val2017")}),
    "table11b_coco_entity": (NARRATIVES, {}),
    "table11b_entityseg": (NARRATIVES, {SOURCES: masks("entityseg_swin_l_val2017")}),
}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, (list, tuple)) else cfg


def differences(path: Path) -> dict[str, Any]:
    """What the loaded config has otherwise than its loaded parent."""
    parent = load_config(path.parent / yaml.safe_load(path.read_text())["_BASE_"])
    before = dict(leaves(parent))
    return {key: value for key, value in leaves(load_config(path)) if before[key] != value}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_only_differences_are_stated(path):
    stated = yaml.safe_load(path.read_text())
    base = stated.pop("_BASE_", None)
    stated.pop("VERSION", None)  # of the file's format, no difference
    parent = load_config(path.parent / base) if base else get_cfg()
    if not base:
        add_gella_config(parent)
    own = load_config(path)
    keys = [key for key, _ in leaves(stated)]
    assert keys
    assert [key for key in keys if value_of(own, key) == value_of(parent, key)] == []


def test_names_and_output_folders_are_one_per_config():
    assert len(BY_NAME) == len(CONFIGS)
    folders = {p: load_config(p).OUTPUT_DIR for p in CONFIGS if p.stem != "Base-GELLA"}
    for path, folder in folders.items():
        prefix = "output/ablations/" if path in ABLATIONS else "output/"
        assert folder == prefix + path.stem


def test_every_row_of_tables_5_to_11_has_its_config():
    rows = {path.stem for path in ABLATIONS if not path.stem.startswith("Base-")}
    assert rows == set(ROWS)
    table = Counter(re.match(r"table(\d+[ab]?)_", name)[1] for name in rows)
    # Rows as printed in the paper.
    assert table == {
        **{"05a": 2, "05b": 2, "06a": 3, "06b": 3, "07": 6, "08a": 3, "08b": 3},
        **{"09": 4, "10": 2, "11a": 4, "11b": 4},
    }


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_changes_what_its_table_changes_and_says_the_paper_s_figure(name):
    parent, changes = ROWS[name]
    path = BY_NAME[name]
    text = path.read_text()
    assert yaml.safe_load(text)["_BASE_"] == f"{parent}.yaml"
    assert differences(path) == {**changes, "OUTPUT_DIR": f"output/ablations/{name}"}
    number, part = re.match(r"table0?(\d+)([ab]?)_", name).groups()
    assert text.startswith(f"# Table {number}{part}, ")
    comment = " ".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"\b(PQ|AP|AR|AR_text) \d\d\.\d\b", comment)
    assert ("the parent itself" in comment) == (not changes)


def test_the_parents_of_the_ablations_measure_what_the_tables_report():
    for name in (PANOPTIC, NARRATIVES):
        cfg = load_config(BY_NAME[name])
        assert not cfg.MODEL.GELLA.SNAP  # the paper scores the decoder's masks
        assert cfg.INPUT.GELLA.ENTITY_SOURCES == masks(USUAL)
        assert set(differences(BY_NAME[name])) == {
            "MODEL.GELLA.SNAP",
            SOURCES,
            "DATASETS.TEST",
            "OUTPUT_DIR",
        }
    cfg = load_config(BY_NAME[COLORMAP])
    assert cfg.INPUT.GELLA.ENTITY_SOURCES == []
    assert cfg.MODEL.ASSOCIATION.WEIGHT == cfg.MODEL.LANGUAGE.ANSWER_WEIGHT == 0
    assert cfg.MODEL.GELLA.ENTITY_SCORE_THRESHOLD == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_datasets_and_sources_are_known(path):
    cfg = load_config(path)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    assert set(names) <= set(DatasetCatalog.list())
    readme = (FOLDER / "README.md").read_text()
    for pattern, kind, file in cfg.INPUT.GELLA.ENTITY_SOURCES:
        regex = re.compile(pattern.replace("*", ".*"))
        assert any(regex.fullmatch(name) for name in names), pattern
        assert kind in SOURCE_KINDS
        assert Path(file).name in readme, "configs/README.md says how each file is made"
    assert path in ABLATIONS or path.name in readme


EPOCHS = {
    "gella_swin_t": 134_272,
    "gella_swin_t_coco_panoptic": "gella_coco_panoptic_train2017",
    "gella_swin_t_refcoco": "gella_refcoco_unc_train",
    "gella_swin_t_refcocoplus": "gella_refcocoplus_unc_train",
    "gella_swin_t_refcocog": "gella_refcocog_umd_train",
    "gella_swin_t_entityseg": 2 * 31_000,
}


@pytest.mark.parametrize("name", EPOCHS)
def test_the_paper_s_schedule(name):
    cfg = load_config(BY_NAME[name])
    size = EPOCHS[name]
    if isinstance(size, str):
        assert list(cfg.DATASETS.TRAIN) == [size]
        size = known_counts(size, None)["images"].value
    cfg = with_epochs(cfg, num_records=1)
    epoch = size / cfg.SOLVER.IMS_PER_BATCH
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (16, 1e-5, 0.1)
    assert cfg.SOLVER.MAX_ITER == ceil(50 * epoch)
    assert list(cfg.SOLVER.STEPS) == [ceil(46 * epoch), ceil(48 * epoch)]
    assert cfg.SOLVER.CHECKPOINT_PERIOD == int(epoch)
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"


def test_the_paper_s_ratios():
    assert load_config(BY_NAME["gella_swin_t"]).DATALOADER.TASK_RATIOS == [0.2, 0.2, 0.6]


def models() -> dict[str, Path]:
    """One config for each distinct model, by its name."""
    found = {load_config(path).MODEL.dump(): path for path in reversed(CONFIGS)}
    return {path.stem: path for path in found.values()}


def on_meta(path: Path) -> torch.nn.Module:
    cfg = load_config(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("path", models().values(), ids=lambda path: path.stem)
def test_every_distinct_model_builds_without_memory(path):
    model = on_meta(path)
    assert all(p.is_meta for p in model.parameters())
    if path.stem == "gella_swin_t_13b":
        # LLaMA-13B as published, and a row of 5,120 for <SEG> in embedding and output layer.
        count = sum(p.numel() for p in model.language_decoder.llama.parameters())
        assert count == 13_015_864_320 + 2 * 5120


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_colormaps_hold_whole_windows_at_every_stride(path):
    cfg = load_config(path)
    arch, side = cfg.MODEL.COLORMAP_ENCODER.ARCH, cfg.INPUT.GELLA.COLORMAP_SIZE
    window = re.search(r"window(\d+)", arch)
    assert side % (32 * int(window[1] if window else 1)) == 0


def test_swin_large_has_the_published_pyramid():
    cfg = load_config(BY_NAME["gella_swin_l"])
    side = cfg.INPUT.GELLA.COLORMAP_SIZE
    with torch.device("meta"):
        encoder = TimmColormapEncoder(cfg)
        pyramid = encoder(torch.zeros(1, 3, side, side))
    shapes = [tuple(level.shape[1:]) for level in pyramid.values()]
    assert shapes == [(192 * 2**i, side // 4 // 2**i, side // 4 // 2**i) for i in range(4)]
    blocks = [block for name, block in encoder.named_modules() if name.endswith("attn")]
    assert len(blocks) == 2 + 2 + 18 + 2
    assert {tuple(block.window_size) for block in blocks} == {(12, 12)}


@pytest.mark.parametrize("page", ["configs/README.md", "docs/OPTIONS.md"])
def test_the_pages_name_keys_and_configs_that_exist(page):
    text = (ROOT / page).read_text()
    keys = re.findall(r"\b(?:MODEL|INPUT|DATALOADER|SOLVER|TEST|DATASETS)\.[A-Z_.]+[A-Z_]", text)
    assert len(keys) > 5
    cfg = load_config(BY_NAME["gella_swin_t"])
    for key in keys:
        value_of(cfg, key)
    files = {Path(name).name for name in re.findall(r"[\w/.*-]+\.yaml", text)}
    assert len(files) > 2
    assert files - {"CONFIG.yaml", "table*.yaml"} <= {path.name for path in CONFIGS}
