"""Make GELLA's weights from public ones, and hand GELLA's out in the formats that people use.

    python tools/convert_weights.py --config-file configs/gella_swin_t.yaml \\
        --llava llava-v1.5-7b --clip clip-vit-large-patch14-336 \\
        --mask2former model_final_9fd0ae.pkl --output gella_init.pth

    python tools/convert_weights.py --config-file configs/gella_swin_t.yaml \\
        --weights output/gella_swin_t/model_final.pth --export gella_swin_t

The format of a file is found out by its keys. All keys are checked: one that is missing, left over
or of another shape is an error unless the config names it in MODEL.WEIGHTS_ALLOW_MISSING or
MODEL.WEIGHTS_ALLOW_UNEXPECTED. Parts that no public file has are written as initialised (SEED), and
named. docs/WEIGHTS.md says where the files come from. KEY VALUE overrides of the config go last.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from gella import load_config
from gella.commands.convert_export import write_gella, write_llava
from gella.commands.convert_sources import (
    build_on_meta,
    hash_files,
    initial_tensors,
    plain_config,
    read_piece,
)
from gella.data.register import import_modules
from gella.utils.io import file_hash, write_atomically
from gella.weights import FORMATS
from gella.weights.assembly import Assembly, assemble, cover
from gella.weights.checkpoint import check_state_dict, consolidate
from gella.weights.files import read_weights

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
HELP = {
    "llava": "LLaVA-1.5, of transformers or of the LLaVA repository: file, index or folder",
    "mask2former": "Mask2Former with a Swin backbone: mask decoder and colormap encoder",
    "clip": "CLIP, where the LLaVA has no vision tower of its own, or instead of that one",
    "colormap-encoder": "a timm or Swin classifier, instead of Mask2Former's backbone",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="config of the model")
    group = parser.add_argument_group("from public weights")
    for kind in FORMATS:
        group.add_argument(f"--{kind}", metavar="PATH", help=HELP[kind])
        names = [layout.name for layout in FORMATS[kind]]
        group.add_argument(f"--{kind}-format", choices=names, help="default: by its keys")
    group.add_argument(
        "--seg-row",
        type=int,
        metavar="N",
        help="row of the LLaVA's embedding that holds <SEG>; default: what its config.json says, "
        "else none: the mean of the words",
    )
    group.add_argument(
        "--output", metavar="PATH", help="a .pth file, or a new folder for safetensors shards"
    )
    group = parser.add_argument_group("from a training run")
    group.add_argument(
        "--from-zero",
        metavar="DIR",
        help="a folder OUTPUT_DIR/checkpoints/iter_*, of any ZeRO stage or none: --output gets its "
        "weights whole, what was under ZeRO in float32",
    )
    group = parser.add_argument_group("from GELLA's weights")
    group.add_argument("--weights", metavar="PATH", help="a checkpoint or exported folder")
    group.add_argument("--export", metavar="DIR", help="GELLA's weights as safetensors shards")
    group.add_argument("--export-llava", metavar="DIR", help="its LLaVA, in transformers' layout")
    group.add_argument(
        "--export-llava-original", metavar="DIR", help="its LLaVA, in the repository's layout"
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of safetensors (default 5GB)")
    add("--dtype", choices=DTYPES, help="of what is written; default: as in the sources")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together, before anything is read."""
    given = [kind for kind in FORMATS if source_of(args, kind)]
    exports = [p for p in (args.export, args.export_llava, args.export_llava_original) if p]
    if given and (args.weights or exports):
        raise ValueError(
            f"--{given[0]} makes GELLA's weights, --weights and --export read finished ones: do one"
            " after the other"
        )
    if args.from_zero and (given or args.weights or exports or not args.output):
        raise ValueError("--from-zero goes with --output PATH and no other input or export")
    if args.from_zero:
        check_target(Path(args.output))
        return
    if given and not args.output:
        raise ValueError("--output is missing: a .pth file or a new folder to write to")
    if not given and args.output:
        raise ValueError(
            f"--output needs public weights: give --{', --'.join(FORMATS)} (as far as needed)"
        )
    if exports and not args.weights:
        raise ValueError("--export needs --weights: the checkpoint of GELLA to export")
    if args.weights and not exports:
        raise ValueError("--weights needs --export, --export-llava or --export-llava-original DIR")
    if not given and not args.weights:
        raise ValueError("nothing to do; see --help for the two ways to use this tool")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT]B", args.max_shard_size):
        raise ValueError(
            f"--max-shard-size is {args.max_shard_size!r}: give a number and KB, MB, GB or TB"
        )
    for target in filter(None, (args.output, *exports)):
        check_target(Path(target))


def check_target(target: Path) -> None:
    """ValueError or FileNotFoundError for a place that cannot be written to."""
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first")
    if target.suffix != ".pth" and target.exists():
        if not target.is_dir() or any(target.iterdir()):
            raise ValueError(f"{target} exists already: name a new folder, or remove it first")


def source_of(args: argparse.Namespace, kind: str) -> str | None:
    """The path given for a kind of public weights."""
    return getattr(args, kind.replace("-", "_"))


def convert(args: argparse.Namespace, cfg: Any) -> None:
    """Make GELLA's weights from public ones and report what they are made of."""
    cfg_plain = plain_config(cfg)
    model = build_on_meta(cfg_plain)
    pieces, notes = [], []
    for kind in FORMATS:
        path = source_of(args, kind)
        if path:
            name = getattr(args, f"{kind.replace('-', '_')}_format")
            print(f"reading {path}", flush=True)
            piece, lines = read_piece(kind, path, name, cfg_plain, args.seg_row)
            pieces.append(piece)
            notes += lines
    expected = model.state_dict()
    result = assemble(
        expected,
        pieces,
        allow_missing=cfg.MODEL.WEIGHTS_ALLOW_MISSING,
        allow_unexpected=cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED,
    )
    print(report(result, notes, expected))
    sources = hash_files(piece.source for piece in pieces)
    print(tabulate(sources, ["file", "sha256"]))
    state = {**result.state, **initial_tensors(cfg, model, result.fresh)}
    state = {key: state[key] for key in expected if key in state}
    card = {"fresh": cover(result.fresh, expected), "notes": [*notes, *result.notes]}
    write_output(args, cfg, state, sources, **card)
    print(
        f"next: python tools/train_net.py --config-file {args.config_file}"
        f" MODEL.WEIGHTS {args.output}"
    )


def from_zero(args: argparse.Namespace, cfg: Any) -> None:
    """Put the weights of a training checkpoint together, check them, and write them."""
    print(f"reading {args.from_zero}", flush=True)
    state = consolidate(args.from_zero)
    check_state_dict(
        state,
        build_on_meta(cfg),
        source=args.from_zero,
        allow_missing=cfg.MODEL.WEIGHTS_ALLOW_MISSING,
        allow_unexpected=cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED,
    )
    write_output(args, cfg, state, [(args.from_zero, file_hash(args.from_zero))])
    print(
        f"next: python tools/train_net.py --config-file {args.config_file} --eval-only"
        f" MODEL.WEIGHTS {args.output}"
    )


def write_output(
    args: argparse.Namespace,
    cfg: Any,
    state: dict[str, Tensor],
    sources: list[tuple[str, str]],
    **card: Any,
) -> None:
    """Write GELLA's weights to ``--output``: a .pth file, or a folder of shards.

    Args:
        args, cfg: the command line and the model's config.
        state: tensors by GELLA's key.
        sources: (name, sha256) of what they were made of.
        card: ``fresh`` and ``notes`` of the folder's model card.
    """
    dtype = DTYPES.get(args.dtype)
    if Path(args.output).suffix == ".pth":
        save_pth(args.output, state, dtype)
    else:
        write_gella(
            args.output,
            state,
            cfg,
            config_file=args.config_file,
            sources=sources,
            max_shard_size=args.max_shard_size,
            dtype=dtype,
            **card,
        )
    print(f"\nwrote {args.output}: {len(state)} tensors")


def save_pth(path: str, state: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write a checkpoint in Detectron2's form, atomically."""
    if dtype is not None:
        state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    write_atomically(path, lambda stream: torch.save({"model": state}, stream))


def report(result: Assembly, notes: Sequence[str], keys: Iterable[str]) -> str:
    """What each part is made of, what starts fresh and what stays absent, by name.

    Args:
        result: what was put together.
        notes: further lines.
        keys: all keys of the model.
    """
    keys = list(keys)
    rows = []
    parts = dict.fromkeys(key.split(".")[0] for key in (*result.state, *result.fresh))
    for part in parts:
        mine = [t for k, t in result.state.items() if k.split(".")[0] == part]
        fresh = [k for k in result.fresh if k.split(".")[0] == part]
        piece = result.origin.get(part)
        rows.append(
            (
                part,
                Path(piece.source).name if piece else "-",
                piece.format if piece else "-",
                len(mine),
                f"{sum(t.numel() for t in mine):,}",
                len(fresh),
            )
        )
    header = ["part", "source", "format", "tensors", "numbers", "fresh"]
    lines = ["", tabulate(rows, header, colalign=("left",) * 3 + ("right",) * 3), ""]
    for piece in {id(p): p for p in result.origin.values()}.values():
        if piece.dropped:
            names = ", ".join(collapse(piece.dropped))
            lines.append(f"of no use in {Path(piece.source).name}: {names}")
    lines += [*notes, *result.notes]
    if result.fresh:
        lines.append(f"fresh, in no public file: {', '.join(cover(result.fresh, keys))}")
    if result.absent:
        lines.append(f"absent, allowed by the config: {', '.join(cover(result.absent, keys))}")
    return "\n".join([*lines, ""])


def collapse(keys: Iterable[str]) -> list[str]:
    """Keys with their numbers replaced by #, and how many each stands for."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", key) for key in keys)
    return [f"{key} ({n})" if n > 1 else key for key, n in counts.items()]


def export(args: argparse.Namespace, cfg: Any) -> None:
    """Write GELLA's weights, or the LLaVA inside, as folders of safetensors shards."""
    state = read_weights(args.weights)
    model = build_on_meta(cfg)
    check_state_dict(
        state,
        model,
        source=args.weights,
        allow_missing=cfg.MODEL.WEIGHTS_ALLOW_MISSING,
        allow_unexpected=cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED,
    )
    shared: dict[str, Any] = {
        "max_shard_size": args.max_shard_size,
        "dtype": DTYPES.get(args.dtype),
    }
    if args.export:
        sources = hash_files([args.weights])
        write_gella(
            args.export,
            state,
            cfg,
            config_file=args.config_file,
            sources=sources,
            **shared,
        )
        print(f"wrote {args.export}: {len(state)} tensors\n")
        print(
            f"next: python tools/train_net.py --config-file {args.config_file} --eval-only"
            f" MODEL.WEIGHTS {args.export}"
        )
    for folder, original in ((args.export_llava, False), (args.export_llava_original, True)):
        if folder:
            write_llava(folder, state, model, cfg, original=original, **shared)
            print(f"wrote {folder}")
            if not original:
                print(f"next: LlavaForConditionalGeneration.from_pretrained({folder!r})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    args = build_parser().parse_args(arguments)
    try:
        check_arguments(args)
        cfg = load_config(args.config_file, args.opts)
        import_modules(cfg)
        if args.from_zero:
            from_zero(args, cfg)
        elif args.weights:
            export(args, cfg)
        else:
            convert(args, cfg)
    except (ImportError, KeyError, OSError, ValueError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return 0
