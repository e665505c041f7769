"""Whole GELLAs of tiny size with perturbed weights, and scenes on disk for them."""

from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from PIL import Image

from gella.config import load_config
from gella.data.mapper import GroundingMapper
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.text.spans import locate_phrases

TINY = Path(__file__).resolve().parents[1] / "configs" / "gella_tiny_shapes.yaml"
TOLERANCE = 1e-5
QUERIES = ("entity", "learned")
CATEGORIES = [
    {"id": 3, "name": "circle", "isthing": 1},
    {"id": 5, "name": "star", "isthing": 1},
    {"id": 9, "name": "sand", "isthing": 0},
]
NOUNS = ("a red circle", "the star", "two squares", "the sand", "a lamp", "it", "the blue thing")
FLUENT = ("MODEL.LANGUAGE.NUM_LAYERS", 2, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 90)


def make_cfg(tokenizer_dir, queries="entity", *opts):
    """The tiny config for the tests' tokenizer; learned queries all count as entities."""
    sizes = ("MODEL.LANGUAGE.MAX_POSITIONS", 2048, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 12)
    decoder = ("MODEL.MASK_DECODER.QUERIES", queries, "MODEL.MASK_DECODER.NUM_QUERIES", 8)
    chosen = ("MODEL.LANGUAGE.TOKENIZER", str(tokenizer_dir), *sizes, *decoder)
    return load_config(TINY, [*chosen, "MODEL.GELLA.ENTITY_SCORE_THRESHOLD", 0.0, *opts])


def make_model(cfg, seed=0):
    """A model in evaluation mode, none of whose weights are zero or one by initialisation."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def make_fluent(tokenizer_dir, records):
    """(config, model) whose language decoder knows the nouns of these records' captions."""
    cfg = make_cfg(tokenizer_dir, "entity", *FLUENT)
    model, mapper = make_model(cfg), make_mapper(cfg, is_train=False)
    teach(model, [mapper(record, task="ground") for record in records])
    return cfg, model


def teach(model, batch):
    """Train the language decoder until it knows the answers of these mapped records."""
    optimizer = torch.optim.AdamW(model.language_decoder.parameters(), 4e-3)
    with torch.no_grad():
        grid = model.encode(batch)[1]
    for _ in range(150):
        loss = model.read_answers(batch, grid).loss_answer
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.language_decoder.parameters(), 1.0)
        optimizer.step()
        if loss < 0.02:
            break


def make_entities(height, width, count, seed=0):
    """Cells around random points, with a strip of no entity; ids are neither 1..E nor sorted."""
    rng = np.random.default_rng(seed)
    places = rng.permutation(height * width)[:count]
    y, x = np.mgrid[:height, :width]
    ids = np.zeros((height, width), np.int32)
    if count:
        far = (y[..., None] - places // width) ** 2 + (x[..., None] - places % width) ** 2
        ids = far.argmin(-1).astype(np.int32) + 1
        ids[: height // 10] = 0
        ids.flat[places] = np.arange(1, count + 1)
    return EntityMap(ids, [11 + 7 * int(k) for k in rng.permutation(count)])


def make_caption(nouns):
    """A sentence with these nouns, and its phrases without segments."""
    caption = "There is " + " beside ".join(nouns) + " in the light."
    spans = locate_phrases(caption, list(nouns))
    known = {"segment_ids": [], "is_plural": False, "is_thing": True}
    phrases = [
        {"text": noun, "start": span[0], "end": span[1], **known}
        for noun, span in zip(nouns, spans, strict=True)
    ]
    return caption, phrases


def make_record(folder, name, size, entities, nouns, seed=0):
    """A dataset dict whose files lie in `folder`; noun i names the entities i and 2 i + 1."""
    rng = np.random.default_rng((seed, 1))
    if isinstance(entities, int):
        entities = make_entities(*size, entities, seed)
    picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / f"{name}.png")
    listed = entities.segment_ids
    real = np.array([0, *listed], np.int32)[entities.ids]
    Image.fromarray(id_to_rgb(real)).save(folder / f"{name}_ids.png")
    caption, phrases = make_caption(nouns)
    for i, phrase in enumerate(phrases):
        phrase["segment_ids"] = sorted({listed[k] for k in (i, 2 * i + 1) if k < len(listed)})
    segments = [
        {"id": i, "category_id": CATEGORIES[k % 3]["id"], "iscrowd": 0}
        for k, i in enumerate(listed)
    ]
    masks = {"format": "panoptic_png", "file_name": str(folder / f"{name}_ids.png")}
    record = {"file_name": str(folder / f"{name}.png"), "image_id": name, "height": size[0]}
    return {
        **record,
        "width": size[1],
        "entities": {**masks, "segments_info": segments},
        "caption": caption,
        "phrases": phrases,
        "expressions": [{**phrases[0], "sent_id": 1}] if phrases else [],
        "tasks": ("describe", "extract", "ground", "panoptic", "refer"),
    }


def make_mapper(cfg, is_train, **changes):
    """The mapper of a config, with `CATEGORIES`; training views are not mirrored."""
    arguments = GroundingMapper.from_config(cfg, is_train, dataset_names=[])
    return GroundingMapper(**{**arguments, "categories": CATEGORIES, "flip": False, **changes})


def without_entities(mapped):
    """The same view with no entity at all."""
    changed = {**mapped, "colormap": torch.zeros_like(mapped["colormap"])}
    for key in ("entities", "entities_full"):
        if key in mapped:
            changed[key] = EntityMap(np.zeros_like(mapped[key].ids))
    changed["phrases"] = [
        {**phrase, "segment_ids": [], "entity_indices": []} for phrase in mapped["phrases"]
    ]
    return changed


def farthest(a, b, relative=False):
    """The largest difference between two tensors; of their largest value if `relative`."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    assert a.shape == b.shape, (a.shape, b.shape)
    if not a.numel():
        return 0.0
    scale = max(1.0, float(a.abs().max())) if relative else 1.0
    return float((a - b).abs().max()) / scale


def same_result(alone, joint):
    """Assert that two results of one image agree: scores to TOLERANCE, texts and ids exactly."""
    assert alone.get("text") == joint.get("text")
    for a, b in zip(alone.get("grounding", ()), joint.get("grounding", ()), strict=True):
        keys = ("phrase", "start", "end", "entity_ids")
        assert [a[k] for k in keys] == [b[k] for k in keys]
        assert farthest(a["scores"], b["scores"]) < TOLERANCE
        assert np.array_equal(a["mask"], b["mask"])
    if "instances" in alone:
        # A logit that is 0 to its last digits may be on either side.
        masks, others = (result["instances"].pred_masks for result in (alone, joint))
        assert int((masks != others).sum()) < 1e-4 * masks.numel() + 1
        assert farthest(alone["instances"].scores, joint["instances"].scores) < TOLERANCE
    if "panoptic_seg" in alone:
        (ids, segments), (joint_ids, joint_segments) = alone["panoptic_seg"], joint["panoptic_seg"]
        assert int((ids != joint_ids).sum()) < 1e-4 * ids.numel() + 1
        for a, b in zip(segments, joint_segments, strict=True):
            assert farthest(a.pop("score"), b.pop("score")) < TOLERANCE and a == b
