"""The options of the configs at work on tiny scenes: every row of the ablations trains and answers,
and both kinds of queries share their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_scripts import ROOT, prepare_small_shapes
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from shapes import CATEGORIES
from test_configs import ABLATIONS, BY_NAME, leaves

from gella import load_config
from gella.data import register as datasets
from gella.data.sampling import task_at
from gella.engine.trainer import GellaTrainer
from gella.weights.checkpoint import load_weights

PREFIX = "tiny_"  # of the paper's dataset names, here over drawn scenes
ENTITY_KEYS = "mask_decoder.entity_queries.*"
LEARNED_KEYS = "mask_decoder.transformer.queries_*"
# The paper's sizes that the rows change, at the scale of the tiny scenes. A window of 12 and 200
# million parameters are looked at in test_configs.py.
SCALED = {
    ("MODEL.IMAGE_ENCODER.IMAGE_SIZE", 224): 64,  # 96 x 224 / 336
    ("MODEL.IMAGE_ENCODER.LAYERS", 2): 2,
    (
        "MODEL.COLORMAP_ENCODER.ARCH",
        "swin_large_patch4_window12_384",
    ): "swin_tiny_patch4_window7_224",
    ("MODEL.MASK_DECODER.NUM_QUERIES", 200): 40,
    ("INPUT.GELLA.COLORMAP_SIZE", 768): 96,
}
KEPT_SIZES = ("MODEL.LANGUAGE.", "SOLVER.", "OUTPUT_DIR")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six training and four held-out scenes, under the names of the paper's datasets."""
    root = prepare_small_shapes(tmp_path_factory.mktemp("data") / "shapes")
    notes, names = root / "annotations", []

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


@pytest.mark.parametrize("name", [path.stem for path in ABLATIONS])
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
            masks = [model.encode(x)[0].mask_logits[-1] for x in (inputs, other)]
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
    entity.entity_queries.forward = lambda features, masks: (content, position)
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
