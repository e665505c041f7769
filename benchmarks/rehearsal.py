"""Rehearses the paper's model at its real size, on random weights in the public layouts.

    python tools/benchmark.py rehearsal
    python tools/benchmark.py rehearsal --gpu
    python tools/benchmark.py rehearsal --scale tiny

Writes LLaVA-1.5-7B (bf16), CLIP ViT-L/14-336 and Mask2Former Swin-T below --output, converts them
with tools/convert_weights.py, looks for what is missing, grounds the photographs of --sample with
their narratives, and evaluates them with tools/train_net.py. The numbers mean nothing: that every
stage runs, how long it takes and in how much memory is the point. Memory is anonymous: pages of
mapped files, which the system may drop, do not count. On a CPU the decoder is in bf16 as well.

--gpu does the same on a card and then trains 20 iterations there: ZeRO stage 2 with LoRA, the same
in float32 (5), and stage 3 with optimizer and weights on the host, which takes 136 GB of it.
Utilisation: the FLOPs of prompts as long as those that were trained, as `tools/benchmark.py cost`
counts them (3 forward passes, 2 of the decoder under LoRA, 1 of what is frozen; blocks computed
again do not count), over the card's dense bf16 peak; table_gib is what that table says.

Needs 45 GB of disk, of which nothing stays without --keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cost
import torch
from loading import anonymous_peak
from tabulate import tabulate
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from gella import load_config
from gella.commands import convert_weights, train
from gella.data.register import coco_panoptic_categories, register_png
from gella.engine.evaluation_hooks import EvaluationInTraining
from gella.engine.memory import PLANS, Workload, count_image_tokens
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
    opts = overrides(args)
    cfg = load_config(args.config_file, opts)
    register(sample)
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


def overrides(args: argparse.Namespace) -> list[Any]:
    """Keys and values of the config in every stage."""
    folder = Path(args.output)
    opts = ["MODEL.WEIGHTS", str(folder / "gella"), "MODEL.LANGUAGE.TOKENIZER", str(folder / "bpe")]
    opts += ["OUTPUT_DIR", str(folder / "run"), "DATASETS.TRAIN", (DATASET,)]
    opts += ["MODEL.DEVICE", "cuda" if args.gpu else "cpu"]
    opts += ["DATASETS.TEST", (DATASET,), "DATALOADER.NUM_WORKERS", 0, "MODEL.LANGUAGE.DTYPE"]
    return [*opts, "bfloat16", *(TINY if args.scale == "tiny" else ())]


def register(sample: Path) -> None:
    """Register the narratives of the photographs as ``DATASET``."""
    notes = sample / "annotations"
    where = (notes / name for name in ("panoptic_val2017", "panoptic_val2017.json", NARRATIVES))
    register_png(DATASET, sample / "val2017", *where, coco_panoptic_categories())


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


def trainings(args: argparse.Namespace, opts: list[Any]) -> dict[str, Any]:
    """Train under every entry of ``TRAININGS``, each in a process of its own, as DeepSpeed does not
    let go of what it trained.

    By title ``images_per_s``, mean ``tokens`` of an image's prompt and answer, ``utilisation``,
    ``peak_gib`` of the card, ``table_gib`` that the cost table gives, ``host_gib`` of the process,
    first and last ``losses``; or ``ended``, if the process was.
    """
    rows: dict[str, Any] = {}
    gc.collect()
    if args.gpu:
        torch.cuda.empty_cache()  # the card is the trainings' now
    for title, (changes, zero) in TRAININGS.items():
        half, count = args.gpu and "float32" not in title, args.iterations
        changed = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.EPOCHS", 0, "SOLVER.WARMUP_ITERS", 0]
        changed += ["DATALOADER.TASK_RATIOS", [0.0, 0.0, 1.0], "SOLVER.AMP.ENABLED", half]
        changed += ["SOLVER.ZERO.CONFIG", str(ROOT / "configs" / "zero" / f"{zero}.json"), *changes]
        changed += ["SOLVER.MAX_ITER", min(5, count) if "float32" in title else count]
        changed += ["MODEL.LANGUAGE.DTYPE", "bfloat16" if half else "float32"]
        cfg = load_config(args.config_file, [*opts, *changed])
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                losses, figures = alone.submit(train_once, cfg, Path(args.sample)).result()
        except BrokenProcessPool:
            rows[title] = {"ended": "its process was killed, as for want of host memory"}
            continue
        shape = {name.replace("-", "_"): value for name, (value, *_) in cost.NUMBERS.items()}
        load = Workload(*(shape[name] for name in Workload._fields))
        others = load.length(count_image_tokens(cfg)) - load.caption_tokens
        shape |= {"config_file": args.config_file, "opts": [*opts, *changed], "zero_gpus": 1}
        shape |= {"precision": "bf16" if half else "fp32", "batch": 2}
        shape |= {"caption_tokens": max(0, figures["tokens"] - others)}
        told = cost.run(argparse.Namespace(**shape))[0]
        passes = {part: 3 if x["trained"] else 1 for part, x in told["parts"].items()}
        passes |= {"language decoder": 2 if changes else 3, "all": 0}
        flops = sum(passes[part] * x["flops"] for part, x in told["parts"].items())
        name = torch.cuda.get_device_name() if args.gpu else ""
        peak = next((value for card, value in PEAKS.items() if card in name), math.nan)
        plan = told["zero"][[name for *_, name in PLANS].index(zero)]
        rows[title] = {
            **figures,
            "utilisation": round(figures["images_per_s"] * flops / peak, 3),
            "table_gib": round(plan["total"]["checkpointed"] / cost.GIB, 1),
            "losses": [round(loss, 3) for loss in (*losses[:5], losses[-1])],
        }
        print(title, rows[title], flush=True)
    return rows


def train_once(cfg: Any, sample: Path) -> tuple[list[float], dict[str, Any]]:
    """The loss of every iteration, and figures of :func:`trainings`."""
    register(sample)
    with anonymous_peak() as memory:
        trainer = _Trainer(cfg)
        trainer.resume_or_load(resume=False)
        lengths: list[int] = []
        layers = trainer.model.language_decoder.modules()
        block = next(m for m in layers if isinstance(m, GradientCheckpointingLayer))
        block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        trainer.train()
    losses, times = (trainer.storage.history(name) for name in ("total_loss", "time"))
    most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return [loss for loss, _ in losses.values()], {
        "images_per_s": round(2 / float(times.median(len(times.values()))), 2),
        "tokens": round(sum(lengths) / len(lengths)),
        "peak_gib": round(most / cost.GIB, 1),
        "host_gib": memory["peak_gib"],
    }
