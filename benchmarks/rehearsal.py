"""Rehearses the paper's model at its real size, on random weights in the public layouts.

    python tools/benchmark.py rehearsal
    python tools/benchmark.py rehearsal --gpu
    python tools/benchmark.py rehearsal --scale tiny

Writes LLaVA-1.5-7B (bf16), CLIP ViT-L/14-336 and Mask2Former Swin-T below --output, converts them
with tools/convert_weights.py, looks for what is missing, grounds the photographs of --sample with
their narratives, and evaluates them with tools/train_net.py. The numbers mean nothing: that every
stage runs, how long it takes and in how much memory is the point. Memory is anonymous: pages of
mapped files, which the system may drop, do not count. On a CPU the decoder is in bf16 as well.

--gpu then trains 20 iterations on one card: ZeRO stage 2 with LoRA, the same in float32 (5), and
stage 3 with optimizer and weights on the host. Utilisation: 3 forward passes' FLOPs an iteration (2
of a branch whose weights are frozen), as `tools/benchmark.py cost` counts them, over the card's
dense bf16 peak; beside the measured memory stands what that table says.

Needs 45 GB of disk, of which nothing stays without --keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cost
import torch
from loading import anonymous_peak
from tabulate import tabulate
from torch import Tensor

from gella import load_config
from gella.commands import convert_weights, train
from gella.data.register import coco_panoptic_categories, register_png
from gella.engine.evaluation_hooks import EvaluationInTraining
from gella.engine.memory import PLANS
from gella.engine.preflight import Run, missing_for, missing_text
from gella.engine.resume import RunCheckpoints
from gella.engine.trainer import GellaTrainer, load_records
from gella.predictor import GellaPredictor
from gella.weights import LlavaHf
from gella.weights.files import write_shards
from gella.weights.llava import EMBEDDINGS, ClipHfVision
from gella.weights.mask2former import Mask2FormerTransformers

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = {
    "iterations": (20, 1, "of each training with --gpu"),
    "threads": (torch.get_num_threads(), 1, "of torch on the CPU"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "--config-file": {"default": str(ROOT / "configs" / "gella_swin_t.yaml"), "metavar": "FILE"},
    "--scale": {"choices": ("paper", "tiny"), "default": "paper"},
    "--output": {"default": "output/rehearsal", "metavar": "DIR", "help": "a new folder"},
    "--sample": {"default": str(ROOT.parent / "shared" / "coco_sample"), "metavar": "DIR"},
    "--gpu": {"action": "store_true", "help": "train on one card too"},
    "--keep": {"action": "store_true", "help": "leave the files in --output"},
}
NEXT = "docs/TRAINING.md, the same with public weights"
TINY = """
    MODEL.LANGUAGE.VOCAB_SIZE 4001 MODEL.LANGUAGE.HIDDEN_SIZE 64 MODEL.LANGUAGE.NUM_LAYERS 2
    MODEL.LANGUAGE.INTERMEDIATE_SIZE 96 MODEL.LANGUAGE.NUM_HEADS 4
    MODEL.LANGUAGE.NUM_KEY_VALUE_HEADS 4 MODEL.IMAGE_ENCODER.IMAGE_SIZE 56
    MODEL.IMAGE_ENCODER.WIDTH 64 MODEL.IMAGE_ENCODER.LAYERS 3 INPUT.GELLA.COLORMAP_SIZE 224
""".split()
SPARE_ROWS = 64  # of LLaVA-1.5 in transformers' layout: <image>, <pad>, and what no token uses
DATASET, NARRATIVES = "gella_rehearsal_png", "png_coco_val2017.json"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOPs a second
LORA = ("MODEL.LANGUAGE.LORA.ENABLED", True, "MODEL.WEIGHTS_ALLOW_MISSING", ["*.lora_*"])
TRAININGS: dict[str, Any] = {  # title: overrides, ZeRO file
    "stage 2, LoRA": (LORA, "stage2"),
    "stage 2, LoRA, float32": (LORA, "stage2"),
    "stage 3, all on the host": ((), "stage3_offload"),
}


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The figures and the text to print: seconds and peak memory of every stage, and trainings.

    ValueError for a folder that is there already, or ``--gpu`` without one.
    """
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: there is no CUDA device here")
    folder, sample = Path(args.output), Path(args.sample)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a new folder, or remove it first")
    torch.set_num_threads(args.threads)
    opts = ["MODEL.WEIGHTS", str(folder / "gella"), "MODEL.LANGUAGE.TOKENIZER", str(folder / "bpe")]
    opts += ["OUTPUT_DIR", str(folder / "run"), "DATASETS.TRAIN", (DATASET,), "MODEL.DEVICE", "cpu"]
    opts += ["DATASETS.TEST", (DATASET,), "DATALOADER.NUM_WORKERS", 0, "MODEL.LANGUAGE.DTYPE"]
    opts += ["bfloat16", *(TINY if args.scale == "tiny" else ())]
    cfg = load_config(args.config_file, opts)
    notes = sample / "annotations"
    where = (notes / name for name in ("panoptic_val2017", "panoptic_val2017.json", NARRATIVES))
    register_png(DATASET, sample / "val2017", *where, coco_panoptic_categories())
    figures: dict[str, Any] = {"stages": {}}
    try:
        (folder / "public").mkdir(parents=True)
        for name, work in {
            "write": lambda: write_public(folder, cfg, sample),
            "convert": lambda: convert(folder, args.config_file, opts),
            "check": lambda: missing_for(cfg, Run(args.config_file, trains=False)),
            "ground": lambda: ground(cfg),
            "evaluate": lambda: evaluate(cfg, args.config_file),
        }.items():
            with anonymous_peak() as found:
                missing = work()
            if missing:
                raise ValueError(missing_text(missing, args.config_file))
            figures["stages"][name] = found
            print(f"{name}: {found['seconds']} s, {found['peak_gib']} GiB", flush=True)
        figures["trainings"] = trainings(args, opts) if args.gpu else {}
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    stages = [(name, *found.values()) for name, found in figures["stages"].items()]
    tables = [tabulate(stages, ["stage", *figures["stages"]["write"]])]
    if args.gpu:
        rows = [{"training": name, **row} for name, row in figures["trainings"].items()]
        tables.append(tabulate(rows, headers="keys"))
    return figures, "\n\n".join(tables)


def write_public(folder: Path, cfg: Any, sample: Path) -> None:
    """Write the three public models with random weights, and a tokenizer of the sample's words."""
    model = cost.build_on_meta(cfg)
    state = model.state_dict()
    words, width = state[EMBEDDINGS[0]].shape
    rows = torch.empty(words - 1 + SPARE_ROWS, width, device="meta")
    llava = state | dict.fromkeys(EMBEDDINGS, rows)
    for kind, layout, held, dtype in (
        ("llava", LlavaHf(), llava, torch.bfloat16),
        ("clip", ClipHfVision(), state, torch.float32),
        ("mask2former", Mask2FormerTransformers.from_config(cfg), state, torch.float32),
    ):
        target = folder / "public" / kind
        target.mkdir()
        write_shards(random_weights(layout.from_gella(held)), target, dtype=dtype)
        if kind == "llava":
            config = convert_weights.transformers_config(model, cfg)
            config.pop("seg_token_index")  # no public model has <SEG>
            (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = json.loads((sample / "annotations" / NARRATIVES).read_text())
    write_tokenizer(folder / "bpe", words - 1, (item["caption"] for item in texts))


def random_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes without memory of their own: one random block, looked at in rows that
    overlap, of standard deviation 0.02. Norms are ones and biases zeros."""
    block = 0.02 * torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    state = {}
    for number, (key, like) in enumerate(shapes.items()):
        if like.ndim < 2:
            state[key] = torch.ones(()).mul(key.endswith("weight")).expand(like.shape)
            continue
        steps = [math.prod(like.shape[n + 1 :]) for n in range(1, like.ndim)]
        state[key] = block.as_strided(like.shape, (7, *steps), 11 * number)
    return state


def write_tokenizer(folder: Path, words: int, texts: Iterable[str]) -> None:
    """A byte-level tokenizer of as many words, those of the texts and others that never come."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    bpe = ByteLevelBPETokenizer()
    special = [*names.values()]
    bpe.train_from_iterator(texts, words, special_tokens=special, show_progress=False)
    whole = json.loads(bpe.to_str())
    vocabulary = whole["model"]["vocab"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), words)}
    bpe = Tokenizer.from_str(json.dumps(whole))
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)


def convert(folder: Path, config_file: str, opts: list[Any]) -> None:
    """Run tools/convert_weights.py; RuntimeError if it fails."""
    given = [f"--{kind}={folder / 'public' / kind}" for kind in ("llava", "clip", "mask2former")]
    words = ["--config-file", config_file, f"--output={folder / 'gella'}", *given, *map(str, opts)]
    if convert_weights.main(words):
        raise RuntimeError("tools/convert_weights.py failed; its message is above")


def ground(cfg: Any) -> None:
    """Ground every narrative with its nouns, through the predictor."""
    predictor = GellaPredictor(cfg)
    for record in load_records([DATASET], "DATASETS.TEST"):
        entities = record["entities"]
        predictor.set_image(
            record["file_name"],
            entities["file_name"],
            masks_format=entities["format"],
            segments_info=entities["segments_info"],
        )
        found = predictor.ground_phrases(record["caption"], record["phrases"])
        print(f"{record['image_id']}: {len(found.phrases)} nouns", flush=True)


def evaluate(cfg: Any, config_file: str) -> None:
    """What ``tools/train_net.py --eval-only`` does, in this process."""
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    cfg.freeze()
    done, _ = train.evaluate(cfg, resume=False, config_file=config_file)
    print(json.dumps(done.results))


# -- on a card -------------------------------------------------------------------------------------


class _Trainer(GellaTrainer):
    """Writes and evaluates nothing."""

    def build_hooks(self) -> list[Any]:
        left_out = (RunCheckpoints, EvaluationInTraining)
        return [hook for hook in super().build_hooks() if not isinstance(hook, left_out)]


def trainings(args: argparse.Namespace, opts: list[Any], device: str = "cuda") -> dict[str, Any]:
    """Train under every entry of ``TRAININGS``; by title ``images_per_s``, ``utilisation``,
    ``peak_gib`` of the card, ``table_gib`` that the cost table gives, first and last ``losses``."""
    rows = {}
    for title, (changes, zero) in TRAININGS.items():
        half, count = "float32" not in title, args.iterations
        changed = ["MODEL.DEVICE", device, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.EPOCHS", 0]
        changed += ["DATALOADER.TASK_RATIOS", [0.0, 0.0, 1.0], "SOLVER.AMP.ENABLED", half]
        changed += ["SOLVER.ZERO.CONFIG", str(ROOT / "configs" / "zero" / f"{zero}.json"), *changes]
        changed += ["SOLVER.MAX_ITER", count if half else min(5, count)]
        changed += ["MODEL.LANGUAGE.DTYPE", "bfloat16" if half else "float32"]
        known = {name.replace("-", "_"): value for name, (value, *_) in cost.NUMBERS.items()}
        known |= {"config_file": args.config_file, "opts": [*opts, *changed], "zero_gpus": 1}
        known |= {"precision": "bf16" if half else "fp32", "batch": 2}
        told = cost.run(argparse.Namespace(**known))[0]
        parts = {part: x for part, x in told["parts"].items() if part != "all"}
        plan = told["zero"][[name for *_, name in PLANS].index(zero)]
        losses, seconds = train_once(load_config(args.config_file, known["opts"]))
        frozen = {part for part, x in parts.items() if not x["trained"]}
        frozen |= {"language decoder"} if changes else set()
        flops = sum((3 - (part in frozen)) * x["flops"] for part, x in parts.items())
        name = torch.cuda.get_device_name() if device == "cuda" else ""
        peak = next((value for card, value in PEAKS.items() if card in name), math.nan)
        most = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        rows[title] = {
            "images_per_s": round(2 / seconds, 2),
            "utilisation": round(2 * flops / seconds / peak, 3),
            "peak_gib": round(most / cost.GIB, 1),
            "table_gib": round(plan["total"]["checkpointed"] / cost.GIB, 1),
            "losses": [round(loss, 3) for loss in (*losses[:5], losses[-1])],
        }
        print(title, rows[title], flush=True)
    return rows


def train_once(cfg: Any) -> tuple[list[float], float]:
    """The loss of every iteration, and the median seconds of one."""
    gc.collect()  # what the training before left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = _Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    losses, times = (trainer.storage.history(name) for name in ("total_loss", "time"))
    return [loss for loss, _ in losses.values()], times.median(len(losses.values()))
