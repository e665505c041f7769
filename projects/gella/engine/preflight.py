"""What a run needs, looked at before anything is built: all that is missing, at once.

Files are looked for and not read, but for the headers of weights and the tokenizer: the start of a
run of days waits for seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from gella.engine.checkpoint import FOLDER, CheckpointStore
from gella.engine.memory import (
    GIB,
    USABLE,
    build_on_meta,
    count_image_tokens,
    longest_prompts,
    plans,
    saved_bytes,
    zero_branches,
)
from gella.engine.zero import read_config
from gella.entities.sources import entry_for
from gella.modeling.meta_arch import GELLA
from gella.text.prompts import load_tokenizer
from gella.utils.io import read_text
from gella.weights.checkpoint import allowed_keys, check_state_dict, is_checkpoint, why_incomplete
from gella.weights.files import main_file, read_torch, read_weights

SEGMENTER = "transformers:facebook/mask2former-swin-large-coco-panoptic"
_ERRORS = (ImportError, KeyError, OSError, ValueError)


class Missing(NamedTuple):
    """One thing that is missing or wrong, and what to do about it; a line each."""

    what: str
    advice: str = ""


class Run(NamedTuple):
    """The run that is to start.

    Attributes:
        config_file: as it was given.
        processes, local: of the run, and of them on this machine.
        trains: or else it evaluates.
        resume: from the newest checkpoint of ``OUTPUT_DIR``, if there is one.
        data: whether ``DATASETS`` are what it reads.
        tools: folder of the commands that are advised.
    """

    config_file: str
    processes: int = 1
    local: int = 1
    trains: bool = True
    resume: bool = False
    data: bool = True
    tools: str = "tools"


def missing_for(cfg: Any, run: Run) -> list[Missing]:
    """Everything that the run lacks on this machine; nothing is built or written.

    ``DATASETS.MODULES`` has been imported. ``MODEL.DEVICE`` is what the config says: without a GPU
    a run in float32 that fits the host's memory goes on there.
    """
    problems = config_problems(cfg, run.processes) if run.trains else []
    found = [Missing(text) for text in problems]
    found += _data(cfg, run) if run.data else ()
    try:
        store = CheckpointStore(os.path.join(cfg.OUTPUT_DIR, FOLDER))
        newest = store.newest() if run.resume else None
        weights = str(newest.path) if newest else cfg.MODEL.WEIGHTS
        model = build_on_meta(cfg)
    except _ERRORS as error:
        return [*found, Missing(" ".join(str(error).split()))]
    makes = f"python {run.tools}/convert_weights.py --config-file {run.config_file} --from-hub"
    found += _weights(cfg, run, weights, model, makes)
    if isinstance(model, GELLA):
        found += _tokenizer(cfg, weights, makes)
        found += () if problems else _memory(cfg, run, model)
    return found


def config_problems(cfg: Any, processes: int) -> list[str]:
    """What cannot be trained as the config says, whatever the machine."""
    solver, device = cfg.SOLVER, str(cfg.MODEL.DEVICE)
    problems = []
    if solver.AMP.ENABLED and not device.startswith("cuda"):
        problems.append(
            f"SOLVER.AMP.ENABLED needs a CUDA device but MODEL.DEVICE is {device}: set"
            " SOLVER.AMP.ENABLED False"
        )
    if solver.ACCUMULATE < 1 or solver.IMS_PER_BATCH % (solver.ACCUMULATE * processes):
        problems.append(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, SOLVER.ACCUMULATE {solver.ACCUMULATE}"
            f" and {processes} process(es): make the batch a multiple of their product"
        )
    if solver.ZERO.CONFIG:
        if importlib.util.find_spec("deepspeed") is None:
            problems.append("SOLVER.ZERO.CONFIG needs DeepSpeed: pip install 'gella[zero]'")
        try:
            read_config(solver.ZERO.CONFIG)
        except _ERRORS as error:
            problems.append(str(error))
    return problems


def untrained_parts(weights: str | Path) -> list[str]:
    """Parts of first weights that no public model has and nobody has trained; [] of others.

    Of a folder its model card names them, of a ``.pth`` file the entry "fresh".
    """
    card = Path(weights) / "README.md"
    if card.is_file():
        _, _, section = read_text(card).partition("\n## Untrained\n")
        lines = section.partition("\n## ")[0].splitlines()
        return [line[3:-1] for line in lines if line.startswith("- `")]
    if Path(weights).suffix != ".pth" or not Path(weights).is_file():
        return []
    content = read_torch(weights, mmap=True)
    return list(content.get("fresh", ())) if isinstance(content, dict) else []


def _data(cfg: Any, run: Run) -> Iterator[Missing]:
    names = dict.fromkeys((*(cfg.DATASETS.TRAIN if run.trains else ()), *cfg.DATASETS.TEST))
    key = "TRAIN" if run.trains else "TEST"
    if not cfg.DATASETS[key]:
        yield Missing(f"DATASETS.{key} is empty", "name at least one registered dataset")
    masks: dict[str, str] = {}
    for name in names:
        if name not in DatasetCatalog.list():
            yield Missing(
                f"dataset {name} is not registered",
                "check its name; DATASETS.MODULES names what registers your own",
            )
            continue
        metadata = MetadataCatalog.get(name).as_dict()
        keys = ("json_file", "panoptic_json", "instances_json", "panoptic_root", "image_root")
        paths = dict.fromkeys(metadata[key] for key in keys if metadata.get(key))
        absent = [path for path in paths if not os.path.exists(path)]
        if absent:
            yield Missing(
                f"dataset {name}: {', '.join(absent)}: not there",
                "datasets/get_*.sh get them (datasets/README.md); DETECTRON2_DATASETS names"
                " another folder",
            )
        entry = entry_for(cfg.INPUT.GELLA.ENTITY_SOURCES, name)
        if entry and entry[1] != "annotation" and not os.path.exists(entry[2]):
            masks.setdefault(entry[2], name)
    for path, name in masks.items():
        yield Missing(
            f"entity masks {path} (INPUT.GELLA.ENTITY_SOURCES, for {name}) do not exist",
            f"python {run.tools}/precompute_entities.py --dataset {name} --segmenter {SEGMENTER}"
            f' --output {path}; INPUT.GELLA.ENTITY_SOURCES "[]" takes the annotated entities',
        )


def _weights(cfg: Any, run: Run, weights: str, model: nn.Module, makes: str) -> Iterator[Missing]:
    if not weights:
        if run.trains and not cfg.MODEL.FROM_SCRATCH:
            yield Missing(
                "MODEL.WEIGHTS is empty",
                "name the weights to start from; MODEL.FROM_SCRATCH True trains random ones",
            )
    elif is_checkpoint(weights):
        if reason := why_incomplete(weights):
            yield Missing(f"checkpoint {weights} is not complete: {reason}", "take another one")
    elif "://" in weights:
        return
    elif not os.path.exists(weights):
        first = run.trains or "first" in Path(weights).parts
        advice = makes if first else "check MODEL.WEIGHTS"
        if Path(weights).name == "model_final.pth":  # a training's, which no conversion makes
            advice = "train the config that writes them, or check MODEL.WEIGHTS"
        yield Missing(f"weights {weights} (MODEL.WEIGHTS) do not exist", advice)
    else:
        try:  # mapped, not read
            check_state_dict(read_weights(weights), model, source=weights, **allowed_keys(cfg))
        except _ERRORS as error:
            yield Missing(str(error))


def _tokenizer(cfg: Any, weights: str, makes: str) -> Iterator[Missing]:
    path, rows = cfg.MODEL.LANGUAGE.TOKENIZER, cfg.MODEL.LANGUAGE.VOCAB_SIZE
    try:
        words = load_tokenizer(path).get_vocab()
    except _ERRORS as error:
        makes = makes if path.startswith("weights/") else ""
        yield Missing(f"no tokenizer at {path}" if makes else str(error), makes)
        return
    if max(words.values()) >= rows:
        yield Missing(
            f"tokenizer {path} has {len(words):,} words with <SEG>, MODEL.LANGUAGE.VOCAB_SIZE is"
            f" {rows:,}",
            "take the tokenizer of the weights, or set the key to their number",
        )
    if not weights or not os.path.exists(weights) or "://" in weights:
        return
    # The tokenizer that lies beside the weights, or that the config beside them names, if any.
    folder = Path(weights).parents[1] if is_checkpoint(weights) else main_file(weights).parent
    config, named = folder / "config.yaml", ""
    if config.is_file():
        content = yaml.safe_load(read_text(config)) or {}
        named = content.get("MODEL", {}).get("LANGUAGE", {}).get("TOKENIZER", "")
    places = [folder / "tokenizer", *([folder / named, Path(named)] if named else ())]
    known = next((place for place in places if place.is_dir()), None)
    if known is None or known.resolve() == Path(path).resolve():
        return
    theirs = load_tokenizer(str(known)).get_vocab()
    other = sorted(w for w in words.keys() | theirs.keys() if words.get(w) != theirs.get(w))
    if other:
        yield Missing(
            f"tokenizer {path} is not {known}, which the weights {weights} were trained with:"
            f" {len(other):,} words have other ids, first {other[0]!r}",
            f"MODEL.LANGUAGE.TOKENIZER {known}",
        )


def _memory(cfg: Any, run: Run, model: nn.Module) -> Iterator[Missing]:
    wants_gpu = str(cfg.MODEL.DEVICE).startswith("cuda")
    gpus = min(torch.cuda.device_count(), run.local) if wants_gpu else 0
    batch = max(1, cfg.SOLVER.IMS_PER_BATCH // (run.processes * cfg.SOLVER.ACCUMULATE))
    saved, longest = {"plain": 0, "checkpointed": 0}, ""
    branches = zero_branches(model)
    if run.trains and gpus:
        image = count_image_tokens(cfg)
        load = max(longest_prompts(cfg).values(), key=lambda load: load.length(image))
        longest = f" at the longest prompt, {load.length(image):,} tokens, {batch} image(s) each"
        saved = saved_bytes(model, cfg, load, batch, half=cfg.SOLVER.AMP.ENABLED)["sums"]
    if run.trains:
        own, *others = plans(cfg, *branches, run.processes, saved)
        need, host = own.gpu, own.host * run.local // run.processes
    else:
        others, host = [], 0
        need = sum(p.numel() * p.element_size() for p in model.parameters())
    if wants_gpu and not gpus and run.trains and cfg.SOLVER.AMP.ENABLED:
        yield Missing(
            f"no CUDA GPU is here, and MODEL.DEVICE is {cfg.MODEL.DEVICE}: {run.local} GPU(s) are"
            f" needed, each with more than the {need / GIB:.0f} GiB of weights and optimizer alone",
            f"use such a machine; python {run.tools}/benchmark.py cost --config-file"
            f" {run.config_file} tells what fits",
        )
        return
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(gpus)]
    if sizes and need > USABLE * min(sizes):
        fits = next((plan.overrides for plan in others if plan.gpu <= USABLE * min(sizes)), None)
        yield Missing(
            f"GPU memory: {need / GIB:.1f} GiB are needed on each{longest}; {min(sizes) / GIB:.1f}"
            f" GiB are there, of which {USABLE:.0%} can be used",
            "use larger cards or more of them" if fits is None else f"add{fits}",
        )
    host += 0 if gpus else need * run.local
    free = _host_memory()
    if host > free:
        yield Missing(
            f"host memory: {host / GIB:.1f} GiB are needed for {run.local} process(es),"
            f" {free / GIB:.1f} GiB are there",
            "use a machine with more" + ("" if gpus else ", or with GPUs"),
        )


def _host_memory() -> int:
    """Bytes that processes can still take here, by the kernel and by the limit of a container."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/proc/meminfo", "/sys/fs/cgroup/memory.max"):
        text = Path(file).read_text(encoding="ascii") if os.path.exists(file) else ""
        known = re.search(r"MemAvailable: *(\d+) kB", text)
        free += [int(known[1]) * 1024] if known else [int(text)] if text.strip().isdigit() else []
    return min(free)


def missing_text(found: list[Missing], config_file: str) -> str:
    """What is printed of :func:`missing_for`: one line for one thing, else a numbered list."""
    if len(found) == 1:
        return "error: " + "; ".join(filter(None, found[0]))
    lines = [f"error: {len(found)} things are missing for {config_file}:"]
    for number, (what, advice) in enumerate(found, 1):
        lines += [f"{number:3}. {what}", *([f"     -> {advice}"] if advice else ())]
    return "\n".join(lines)
