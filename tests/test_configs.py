"""Every shipped config loads, builds, trains a step and states only its difference from its parent.

What the rows of the paper's tables change is written down here a second time, by hand. Rows train
and answer on tiny scenes, and both kinds of queries share their weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from shapes import CATEGORIES

from gella import add_gella_config, load_config
from gella.data import register as datasets
from gella.data.check import known_counts
from gella.data.sampling import task_at
from gella.engine.optimizer import with_epochs
from gella.engine.trainer import GellaTrainer
from gella.entities.sources import SOURCE_KINDS
from gella.modeling.colormap_encoder import TimmColormapEncoder
from gella.weights.checkpoint import check_state_dict, load_weights

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
BY_NAME = {path.stem: path for path in CONFIGS}
ZERO_SHOT = "clip_zero_shot"  # of another meta-architecture
ABLATIONS = [path for path in CONFIGS if path.parent.name == "ablations"]

BLEND, SOURCES = "MODEL.RESOBLEND.", "INPUT.GELLA.ENTITY_SOURCES"
TRAIN, VAL = "gella_coco_*_train2017", "gella_coco_*_val2017"


def masks(*files: str) -> list[list[str]]:
    """Entries of ENTITY_SOURCES; the file's last word is the split."""
    return [
        [f"gella_coco_*_{f.rsplit('_', 1)[1]}", "auto", f"datasets/entities/{f}.json"]
        for f in files
    ]


def first(name: str) -> dict[str, str]:
    """First weights of a config's own."""
    return {"MODEL.WEIGHTS": f"weights/first/{name}"}


USUAL = "coco_entity_swin_l_val2017"
CLIP_224 = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
PANOPTIC, NARRATIVES, COLORMAP = "Base-panoptic", "Base-narratives", "Base-colormap"
MOBILENET = {"MODEL.COLORMAP_ENCODER.ARCH": "mobilenetv2_100"}
HUB_MASKS = "datasets/coco/entities/mask2former_swin_l_{}2017.json"
PARTLY = {"MODEL.WEIGHTS_ALLOW_UNEXPECTED": ["resoblend.*"]}
IN_FOLDER = "datasets/of_the_folder.json"
BRANCHES = ["association.*_branch.*"]
SWIN_L_ARCH = "swin_large_patch4_window12_384"
SWIN_L = {
    "MODEL.COLORMAP_ENCODER.ARCH": SWIN_L_ARCH,
    "MODEL.MASK_DECODER.NUM_QUERIES": 200,
    "INPUT.GELLA.COLORMAP_SIZE": 768,
}
LEAVE_OUT = {"INPUT.GELLA.LEAVE_OUT_MISSING": True}
# Row of a table: (parent, what it changes besides OUTPUT_DIR).
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "table05a_clip_224": (
        PANOPTIC,
        {"MODEL.IMAGE_ENCODER.IMAGE_SIZE": 224, "MODEL.HUB.CLIP": CLIP_224}
        | first("table05a_clip_224"),
    ),
    "table05a_clip_336": (PANOPTIC, {}),
    "table05b_color_location": (PANOPTIC, {"INPUT.GELLA.COLORS": "location"}),
    "table05b_color_random": (PANOPTIC, {}),
    "table06a_mobilenetv2": (
        COLORMAP,
        {**MOBILENET, **first("table06a_mobilenetv2")},
    ),
    "table06a_swin_t": (COLORMAP, {}),
    "table06a_swin_l": (COLORMAP, {**SWIN_L, **first("table06a_swin_l")}),
    "table06b_train_coco": (
        "table06a_mobilenetv2",
        {SOURCES: masks("coco_entity_swin_l_train2017"), **LEAVE_OUT},
    ),
    "table06b_train_entityseg": (
        "table06a_mobilenetv2",
        {SOURCES: masks("entityseg_swin_l_train2017"), **LEAVE_OUT},
    ),
    "table06b_train_ground_truth": ("table06a_mobilenetv2", {}),
    "table07_no_self_attention": (PANOPTIC, {BLEND + "SELF_ATTENTION": False, **PARTLY}),
    "table07_no_cross_attention": (PANOPTIC, {BLEND + "CROSS_ATTENTION": False, **PARTLY}),
    "table07_no_feed_forward": (PANOPTIC, {BLEND + "FEED_FORWARD": False, **PARTLY}),
    "table07_no_residual": (PANOPTIC, {BLEND + "RESIDUAL": False}),
    "table07_no_convolution": (PANOPTIC, {BLEND + "CONVOLUTION": False, **PARTLY}),
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
    "table10_fc_relu_fc": (
        NARRATIVES,
        {
            "MODEL.ASSOCIATION.STRUCTURE": "fc_relu_fc",
            "MODEL.WEIGHTS_ALLOW_MISSING": BRANCHES,
            "MODEL.WEIGHTS_ALLOW_UNEXPECTED": BRANCHES,
        },
    ),
    "table10_fc": (NARRATIVES, {}),
    "table11a_mask2former_swin_l": (NARRATIVES, {}),
    "table11b_coco_entity": (NARRATIVES, {}),
}
# Rows of Table 11, and one of Table 8, that change whose masks are given at test.
MASK_KINDS = {
    "coco_entity_condinst": "table11a_condinst_swin_t",
    "coco_entity_solov2": "table11a_solov2_swin_t",
    "coco_entity_swin_t": "table11a_mask2former_swin_t",
    "coco_instance_swin_l": "table11b_coco_instance",
    "entityseg_swin_l": "table11b_entityseg",
}
ROWS |= {n: (NARRATIVES, {SOURCES: masks(f"{k}_val2017")}) for k, n in MASK_KINDS.items()}
HUB = {SOURCES: [[VAL, "auto", HUB_MASKS.format("val")]]}
ROWS["table11b_coco_panoptic"] = NARRATIVES, HUB


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


def test_the_model_zoo_names_every_model_with_its_first_weights_and_iterations():
    text = (ROOT / "docs" / "MODEL_ZOO.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.yaml` \|.*\| `?([\w ]+?)`? \| ([\d,]+) \|$", text, re.M)
    models = {path.stem for path in CONFIGS if path not in ABLATIONS and path.stem[0] == "g"}
    assert {name for name, *_ in rows} == {name for name in models if "tiny" not in name}
    for name, weights, iterations in rows:
        cfg = with_epochs(load_config(BY_NAME[name]), num_records=1)
        assert cfg.MODEL.WEIGHTS == f"weights/first/{name if weights == 'its own' else weights}"
        assert f"{cfg.SOLVER.MAX_ITER:,}" == iterations


def test_the_paper_s_ratios():
    assert load_config(BY_NAME["gella_swin_t"]).DATALOADER.TASK_RATIOS == [0.2, 0.2, 0.6]


def test_paths_are_sought_here_beside_the_config_and_in_the_checkout(tmp_path, monkeypatch):
    here, beside, data = (tmp_path / name for name in ("here", "beside", "data"))
    for folder, names in {
        here: ("both", "module.py"),
        beside: ("both", "weights.pth", "masks.json", IN_FOLDER),
        data: ("tokenizer", "masks.json"),
    }.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    stated = [["a", "auto", "masks.json"], ["b", "auto", "datasets/masks.json"], ["c", "d", ""]]
    (beside / "config.yaml").write_text(f"INPUT: {{GELLA: {{ENTITY_SOURCES: {stated}}}}}")
    given = {
        "MODEL.WEIGHTS": ("weights.pth", f"{beside}/weights.pth"),
        "MODEL.LANGUAGE.TOKENIZER": ("datasets/tokenizer", f"{data}/tokenizer"),
        "MODEL.LANGUAGE.CONFIG": (IN_FOLDER, f"{beside}/{IN_FOLDER}"),
        "TEST.CALIBRATION": ("both", "both"),
        "TEST.CATEGORIES_FROM": ("gella_coco_panoptic_val2017",) * 2,  # a name, and nowhere
        "SOLVER.ZERO.CONFIG": ("configs/zero/stage2.json", f"{ROOT}/configs/zero/stage2.json"),
        "DATASETS.MODULES": ("('module.py', 'json.tool')", ["module.py", "json.tool"]),
    }
    opts = [part for key, (value, _) in given.items() for part in (key, value)]
    cfg = load_config(beside / "config.yaml", opts)
    assert {key: value_of(cfg, key) for key in given} == {k: v[1] for k, v in given.items()}
    found = [path for *_, path in cfg.INPUT.GELLA.ENTITY_SOURCES]
    assert found == [f"{beside}/masks.json", f"{data}/masks.json", ""]
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, root in (("~/data", str(data)), ("", f"{ROOT}/datasets")):  # as Detectron2 does
        monkeypatch.setenv("DETECTRON2_DATASETS", given)
        assert datasets.root_from_environment() == root
        tokenizer = load_config(beside / "config.yaml", opts).MODEL.LANGUAGE.TOKENIZER
        assert tokenizer == (f"{data}/tokenizer" if given else "datasets/tokenizer")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets.root_from_environment() == f"{ROOT}/datasets"
    (here / "datasets").mkdir()
    assert datasets.root_from_environment() == "datasets"


def test_a_folder_of_weights_is_a_config_and_names_are_sought_in_the_checkout(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    released = "weights/gella_tiny_shapes"
    for name in (released, f"{released}/config.yaml", ROOT / released):  # not from here
        cfg = load_config(name)
        assert Path(cfg.MODEL.WEIGHTS) == ROOT / released / "model.safetensors"
        assert Path(cfg.MODEL.LANGUAGE.TOKENIZER) == ROOT / released / "tokenizer"
    run = tmp_path / "run"
    run.mkdir()
    for name in ("first.pth", "model_final.pth"):
        (run / name).touch()
    text = (
        f"_BASE_: {ROOT}/configs/gella_tiny_shapes.yaml\nMODEL: {{WEIGHTS: {tmp_path}/first.pth}}"
    )
    (run / "config.yaml").write_text(text)
    assert load_config("run").MODEL.WEIGHTS == "run/model_final.pth"
    assert load_config("run", ["MODEL.WEIGHTS", "run/first.pth"]).MODEL.WEIGHTS == "run/first.pth"
    assert load_config("run/config.yaml").MODEL.WEIGHTS == f"{tmp_path}/first.pth"
    (run / "model_final.pth").unlink()
    assert load_config("run").MODEL.WEIGHTS == "run"  # as a checkpoint's
    (run / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="run/config.yaml does not exist"):
        load_config("run")


def test_nothing_trains_from_random_weights_unless_the_config_says_so(shapes, tmp_path):
    cfg = tiny(shapes, OUTPUT_DIR=str(tmp_path), MODEL__FROM_SCRATCH=False)
    cfg.DATASETS.TRAIN = (PREFIX + "gella_coco_png_train2017",)
    cfg.DATALOADER.TASK_RATIOS = [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty.*MODEL.FROM_SCRATCH True"):
        GellaTrainer(cfg).resume_or_load(resume=False)
    cfg.MODEL.FROM_SCRATCH = True
    GellaTrainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_paper_s_size_is_a_recipe(path):
    """What the line as typed needs: weights, tokenizer, ZeRO 2 in bf16, masks at test."""
    cfg = load_config(path)
    if path.stem == ZERO_SHOT:  # the hub has all that it needs
        assert cfg.MODEL.CLIP.NAME and not cfg.MODEL.WEIGHTS and not cfg.MODEL.LANGUAGE.TOKENIZER
        return
    if path.stem == "Base-GELLA" or "_tiny_" in path.stem:
        assert cfg.MODEL.FROM_SCRATCH == ("_tiny_" in path.stem)
        return
    assert not cfg.MODEL.FROM_SCRATCH and cfg.SOLVER.AMP.ENABLED
    size = "13b" if "13b" in path.stem else "7b"
    assert cfg.MODEL.LANGUAGE.TOKENIZER == f"weights/tokenizers/llava-v1.5-{size}"
    alone = path.stem.startswith(("table06", COLORMAP))
    assert cfg.SOLVER.ZERO.CONFIG == ("" if alone else "configs/zero/stage2.json")
    assert cfg.MODEL.LANGUAGE.GRADIENT_CHECKPOINTING != alone
    owner = BY_NAME[cfg.MODEL.WEIGHTS.removeprefix("weights/first/")]
    assert load_config(owner).MODEL.WEIGHTS == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize(
    "name", ["gella_swin_t_paper", "gella_swin_t_entity_queries", "table05a_clip_336", *ROWS]
)
def test_first_weights_of_another_config_fit(name, metas):
    """Less what a row allows to be missing or left over; where a row has its own, nothing does."""
    cfg = load_config(BY_NAME[name])
    state = metas(Path(cfg.MODEL.WEIGHTS).name).state_dict()
    allow = cfg.MODEL.WEIGHTS_ALLOW_MISSING, cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED
    options = dict(zip(("allow_missing", "allow_unexpected"), allow))
    check_state_dict(state, metas(name), source=cfg.MODEL.WEIGHTS, **options)
    if any("resoblend" in key or "association" in key for key in allow[1]):
        with pytest.raises(ValueError, match="do not fit"):
            check_state_dict(state, metas(name), source="strictly")


@pytest.fixture(scope="module")
def metas() -> Any:
    """Models by the name of their config, without memory; equal ones are built once."""
    made: dict[str, torch.nn.Module] = {}

    def make(name: str) -> torch.nn.Module:
        node = load_config(BY_NAME[name]).MODEL
        for key in ("WEIGHTS", "WEIGHTS_ALLOW_MISSING", "WEIGHTS_ALLOW_UNEXPECTED"):
            del node[key]
        if node.dump() not in made:
            made[node.dump()] = on_meta(BY_NAME[name])
        return made[node.dump()]

    return make


def models() -> dict[str, Path]:
    """One config for each distinct model, by its name; CLIP's sizes are in its own folder."""
    own = [path for path in CONFIGS if path.stem != ZERO_SHOT]
    found = {load_config(path).MODEL.dump(): path for path in reversed(own)}
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
    assert files - {"CONFIG.yaml", "table*.yaml", "ablate.yaml"} <= {path.name for path in CONFIGS}


# -- at work on tiny scenes --------------------------------------------------------------------

PREFIX = "tiny_"  # of the paper's dataset names, here over drawn scenes
ENTITY_KEYS = "mask_decoder.entity_queries.*"
LEARNED_KEYS = "mask_decoder.transformer.queries_*"
# The paper's sizes that the rows change, at the scale of the tiny scenes. A window of 12 and 200
# million parameters are looked at above.
SCALED = {
    ("MODEL.IMAGE_ENCODER.IMAGE_SIZE", 224): 64,  # 96 x 224 / 336
    ("MODEL.IMAGE_ENCODER.LAYERS", 2): 2,
    ("MODEL.COLORMAP_ENCODER.ARCH", SWIN_L_ARCH): "swin_tiny_patch4_window7_224",
    ("MODEL.MASK_DECODER.NUM_QUERIES", 200): 40,
    ("INPUT.GELLA.COLORMAP_SIZE", 768): 96,
}
KEPT_SIZES = ("MODEL.LANGUAGE.", "SOLVER.", "OUTPUT_DIR")


@pytest.fixture(scope="module")
def shapes(small_shapes: Path) -> Iterator[Path]:
    """Six training and four held-out scenes, under the names of the paper's datasets."""
    root, notes, names = small_shapes, small_shapes / "annotations", []

    def register(function: Any, name: str, *args: Any, **options: Any) -> None:
        names.append(PREFIX + name)
        function(names[-1], *args, **options)

    for split in ("train", "val"):
        where = (root / split, notes / f"panoptic_{split}", notes / f"panoptic_{split}.json")
        year, narratives = f"{split}2017", notes / f"png_shapes_{split}.json"
        register(datasets.register_panoptic, f"gella_coco_panoptic_{year}", *where, CATEGORIES)
        register(datasets.register_png, f"gella_coco_png_{year}", *where, narratives, CATEGORIES)
    register(
        datasets.register_png,
        "gella_coco_nouns_val2017",
        *where,
        narratives,
        CATEGORIES,
        tasks=("extract",),
        evaluator_type="noun_extraction",
    )
    where = (root / "train", notes / "panoptic_train", notes / "panoptic_train.json")
    captions = notes / "captions_train.jsonl"
    register(
        datasets.register_captions, "gella_entityseg_captions_train", *where, captions, CATEGORIES
    )
    yield root
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def tiny(shapes: Path, **changes: Any) -> Any:
    """The paper's choices at the size of the tiny scenes; keys of `changes` have __ for dots."""
    cfg = load_config(ROOT / "configs" / "gella_tiny_shapes.yaml")
    cfg.MODEL.LANGUAGE.TOKENIZER = str(shapes / "tokenizer")
    cfg.MODEL.LANGUAGE.MAX_NEW_TOKENS = 4
    cfg.MODEL.MASK_DECODER.QUERIES, cfg.MODEL.MASK_DECODER.NUM_QUERIES = "learned", 20
    cfg.INPUT.GELLA.COLORS = "random"
    cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 2, 0
    for key, value in changes.items():
        put(cfg, key.replace("__", "."), value)
    return cfg


def put(cfg: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        cfg = cfg[part]
    cfg[last] = value


def scaled(name: str, shapes: Path) -> Any:
    """What a config changes in the paper's model, put onto the tiny one."""
    cfg = tiny(shapes)
    paper = dict(leaves(load_config(BY_NAME["gella_swin_t"])))
    names = {key: paper[key] for key in ("DATASETS.TRAIN", "DATASETS.TEST")}
    changed = {k: v for k, v in leaves(load_config(BY_NAME[name])) if v != paper[k]}
    for key, value in {**names, **changed}.items():
        if key.startswith("DATASETS."):
            value = tuple(PREFIX + dataset for dataset in value)
        elif key == "INPUT.GELLA.ENTITY_SOURCES":
            value = [
                [PREFIX + pattern, kind, mask_file(shapes, file)] for pattern, kind, file in value
            ]
        elif key.startswith(KEPT_SIZES) and key != "MODEL.LANGUAGE.ANSWER_WEIGHT":
            continue
        elif not isinstance(value, (bool, float, list)) and (key, value) in SCALED:
            value = SCALED[key, value]
        put(cfg, key, value)
    return cfg


def mask_file(shapes: Path, file: str) -> str:
    """The imagined segmenter's masks; there are none of the training scenes but the annotation."""
    train = file.endswith("_train2017.json")
    return str(shapes / "annotations" / ("panoptic_train.json" if train else "predicted_val.json"))


def first_batch(cfg: Any) -> list[dict[str, Any]]:
    """Of the first grounding step."""
    loader = GellaTrainer.build_train_loader(cfg)
    ratios = cfg.DATALOADER.TASK_RATIOS
    loader.start_iteration = next(i for i in range(99) if task_at(1, i, ratios) == "ground")
    return next(iter(loader))


def distinct_rows() -> list[str]:
    """Rows that differ at this scale: not by the file of their masks at test alone."""
    names = [path.stem for path in ABLATIONS]
    files = [HUB, *({SOURCES: masks(f"{kind}_val2017")} for kind in MASK_KINDS)]
    return [n for n in names if n not in ROWS or ROWS[n][1] and ROWS[n][1] not in files]


@pytest.mark.parametrize("name", distinct_rows())
def test_every_row_trains_a_step_and_answers(name, shapes):
    cfg = scaled(name, shapes)
    cfg.SEED = 1
    torch.manual_seed(0)
    model = build_model(cfg).train()
    batch = first_batch(cfg)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    before = {k: v.clone() for k, v in model.mask_decoder.state_dict().items()}
    losses = model(batch)
    sum(losses.values()).backward()
    trained = {n: p.grad.abs().max() > 0 for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    after = model.mask_decoder.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    alone = name.startswith("table06") or name == "Base-colormap"
    for part in ("language_decoder.", "association.", "resoblend.", "colormap_encoder."):
        used = any(value for n, value in trained.items() if n.startswith(part))
        assert used == (not alone or part in ("resoblend.", "colormap_encoder.")), part
    model.eval()
    for dataset in cfg.DATASETS.TEST:
        inputs = next(iter(GellaTrainer.build_test_loader(cfg, dataset)))
        with torch.no_grad():
            outputs = model(inputs)
        wanted = {"png": "grounding", "panoptic": "panoptic_seg", "nouns": "text"}
        assert all(wanted[dataset.split("_")[3]] in output for output in outputs)
        assert all("instances" in output for output in outputs)


def test_the_image_has_no_way_into_the_masks_of_table_6(shapes):
    for name, seen in (("table06a_swin_t", False), ("table07_all", True)):
        cfg = scaled(name, shapes)
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        inputs = next(iter(GellaTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
        other = [{**x, "image": 255 - x["image"]} for x in inputs]
        with torch.no_grad():
            masks = [model.encode(x)[0][0].mask_logits[-1] for x in (inputs, other)]
        assert torch.equal(*masks) != seen


@pytest.mark.parametrize("target", ["entity", "learned"])
def test_both_kinds_of_queries_share_all_other_weights(target, shapes, tmp_path):
    source = {"entity": "learned", "learned": "entity"}[target]
    torch.manual_seed(0)
    trained = build_model(tiny(shapes, MODEL__MASK_DECODER__QUERIES=source))
    file = tmp_path / "model.pth"
    torch.save({"model": trained.state_dict()}, file)
    own, foreign = ENTITY_KEYS, LEARNED_KEYS
    if target == "learned":
        own, foreign = foreign, own
    cfg = tiny(shapes, MODEL__MASK_DECODER__QUERIES=target)
    torch.manual_seed(1)
    model = build_model(cfg)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="missing: mask_decoder.*unexpected: mask_decoder"):
        load_weights(model, str(file), cfg)
    cfg.MODEL.WEIGHTS_ALLOW_MISSING = [own]
    with pytest.raises(ValueError, match="unexpected: mask_decoder"):
        load_weights(model, str(file), cfg)
    cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED = [foreign]
    load_weights(model, str(file), cfg)
    loaded, state = model.state_dict(), trained.state_dict()
    fresh = {key for key in loaded if key not in state}
    prefix = own.rstrip("*")
    assert fresh == {key for key in loaded if key.startswith(prefix)} and fresh
    assert all(torch.equal(loaded[key], initial[key]) for key in fresh)
    assert all(torch.equal(loaded[key], state[key]) for key in loaded if key not in fresh)
    inputs = next(iter(GellaTrainer.build_test_loader(cfg, PREFIX + "gella_coco_png_val2017")))
    with torch.no_grad():
        outputs = model.eval()(inputs)
        # Behind the queries it is one function: fed to both decoders, the same features agree.
        entities = inputs[0]["entities_full"].num_entities
    count = len(outputs[0]["instances"])
    assert count == entities if target == "entity" else count <= 20


def test_the_decoder_behind_the_queries_is_one_function(shapes):
    """Entity queries that say what the learned ones say get their embeddings and masks."""
    torch.manual_seed(0)
    models = {
        q: build_model(tiny(shapes, MODEL__MASK_DECODER__QUERIES=q)) for q in ("learned", "entity")
    }
    learned, entity = (models[q].mask_decoder.eval() for q in ("learned", "entity"))
    shared = {k: v for k, v in learned.state_dict().items() if "queries_" not in k}
    assert entity.load_state_dict(shared, strict=False).unexpected_keys == []
    content = learned.transformer.queries_features.weight.expand(2, -1, -1)
    position = learned.transformer.queries_embedder.weight.expand(2, -1, -1)
    queries = (content, position, torch.zeros_like(content))
    entity.entity_queries.forward = lambda features, masks, image: queries
    features = {
        n: torch.randn(2, 64, 96 // s, 96 // s) for n, s in zip(learned.in_features, (4, 8, 16, 32))
    }
    with torch.no_grad():
        one = learned(features)
        two = entity(features, entity_masks=torch.ones(2, content.shape[1], 24, 24))
    torch.testing.assert_close(one.query_embeddings, two.query_embeddings, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.mask_logits[-1], two.mask_logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", ["learned", "entity"])
@pytest.mark.parametrize("snap", [False, True])
def test_snapping_is_a_switch_of_inference_alone(queries, snap, shapes):
    cfg = tiny(shapes, MODEL__MASK_DECODER__QUERIES=queries, MODEL__GELLA__SNAP=snap)
    cfg.MODEL.GELLA.ENTITY_SCORE_THRESHOLD, cfg.MODEL.GELLA.SNAP_IOU = 0.0, 1e-6
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    reference = build_model(tiny(shapes, MODEL__MASK_DECODER__QUERIES=queries))
    assert reference.state_dict().keys() == model.state_dict().keys()
    inputs = next(iter(GellaTrainer.build_test_loader(cfg, PREFIX + "gella_coco_png_val2017")))
    with torch.no_grad():
        outputs = model(inputs)
    own = 0
    for sample, output in zip(inputs, outputs):
        entities = sample["entities_full"]
        for unit in output["grounding"]:
            indices = [
                entities.segment_ids.index(i)
                for i in unit["entity_ids"]
                if i in entities.segment_ids
            ]
            own += len(indices) == len(unit["entity_ids"]) and np.array_equal(
                unit["mask"], entities.union(indices)
            )
    total = sum(len(output["grounding"]) for output in outputs)
    assert own == total if snap else own < total
