"""Make GELLA's weights from public ones, and hand GELLA's out in the formats that people use.

    python tools/convert_weights.py --config-file configs/gella_swin_t.yaml --from-hub

downloads what MODEL.HUB names and writes MODEL.WEIGHTS and MODEL.LANGUAGE.TOKENIZER. With files:

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
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from gella import __version__, load_config
from gella.commands.console import Parser, exit_status, tools
from gella.data.register import import_modules
from gella.engine.evaluation_hooks import with_keys
from gella.engine.memory import build_on_meta
from gella.modeling.filling import built_empty
from gella.utils.io import file_hash, read_json, write_atomically
from gella.weights import FORMATS, LlavaHf, LlavaOriginal, detect
from gella.weights.checkpoint import allowed_keys, check_state_dict, consolidate
from gella.weights.files import (
    TOKENIZER_FILES,
    download,
    main_file,
    new_folder,
    read_weights,
    stored_dtypes,
    weight_files,
    write_shards,
)
from gella.weights.layout import Assembly, Piece, assemble, cover
from gella.weights.llava import EMBEDDINGS, fit_words

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
OPTIONS = {
    "from public weights": {
        "--from-hub": "download what MODEL.HUB names and no option gives; write MODEL.WEIGHTS (or "
        "--output), the language decoder in bfloat16, and the tokenizer, as far as not there",
        "--llava PATH": "LLaVA-1.5, of transformers or of its repository: file, index or folder",
        "--mask2former PATH": "Mask2Former with a Swin backbone: mask decoder, colormap encoder",
        "--clip PATH": "CLIP, where the LLaVA has no vision tower, or instead of that one",
        "--colormap-encoder PATH": "a timm or Swin classifier, instead of Mask2Former's backbone",
        "--seg-row N": "row of the LLaVA's embedding that holds <SEG>; default: what its "
        "config.json says, else none: the mean of the words",
        "--output PATH": "a .pth file, or a new folder for safetensors shards",
    },
    "from a training run": {
        "--from-zero DIR": "a folder OUTPUT_DIR/checkpoints/iter_*, of any ZeRO stage or none: "
        "--output gets its weights whole, what was under ZeRO in float32",
    },
    "from GELLA's weights": {
        "--weights PATH": "a checkpoint or exported folder",
        "--export DIR": "GELLA's weights as safetensors shards",
        "--export-llava DIR": "its LLaVA, in transformers' layout",
        "--export-llava-original DIR": "its LLaVA, in the repository's layout",
    },
}


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError for options that do not go together, before anything is read."""
    kinds = ("from-hub", *FORMATS)
    given = [f"--{kind}" for kind in kinds if getattr(args, kind.replace("-", "_"))]
    exports = [p for p in (args.export, args.export_llava, args.export_llava_original) if p]
    finished, zero, output = bool(args.weights or exports), args.from_zero, args.output
    every, size = f"--{', --'.join(FORMATS)}", args.max_shard_size
    for wrong, message in (
        (given and finished, f"{given} make weights, --weights and --export take finished ones: do"
         " one after the other"),
        (zero and (given or finished or not output),
         "--from-zero goes with --output PATH and no other input or export"),
        (given and not (output or args.from_hub),
         "--output is missing: a .pth file or a new folder to write to"),
        (output and not given and not zero,
         f"--output needs public weights: give {every} (as far as needed)"),
        (exports and not args.weights, "--export needs --weights: the checkpoint to export"),
        (args.weights and not exports,
         "--weights needs --export, --export-llava or --export-llava-original DIR"),
        (not (given or finished or zero), "nothing to do; see --help for the ways to use this"),
        (not re.fullmatch(r"[0-9]+(\.[0-9]+)?[KMGT]B", size),
         f"--max-shard-size is {size!r}: give a number and KB, MB, GB or TB"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    for target in (Path(path) for path in (args.output, *exports) if path):
        if not target.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {target.parent} does not exist: make it first")
        if target.suffix != ".pth" and target.exists():
            if not target.is_dir() or any(target.iterdir()):
                raise ValueError(f"{target} exists already: name a new folder, or remove it first")


# -- from public weights ---------------------------------------------------------------------------


def from_hub(args: argparse.Namespace, cfg: Any) -> None:
    """Write what the config starts from, as far as it is not there: weights and tokenizer.

    Raises:
        ValueError: the config names no model or no place.
        OSError: no room, no network, no such model.
    """
    hub, tokenizer = cfg.MODEL.HUB, Path(cfg.MODEL.LANGUAGE.TOKENIZER)
    args.output = args.output or cfg.MODEL.WEIGHTS
    for key, value in (("HUB.LLAVA", hub.LLAVA), ("WEIGHTS", args.output)):
        if not value:
            raise ValueError(f"{args.config_file} sets no MODEL.{key}, which --from-hub needs")
    done = Path(args.output).exists() and bool(weight_files(args.output))  # it was written whole
    names = {} if done else {k: hub[k.upper().replace("-", "_")] for k in FORMATS}
    names = {k: n for k, n in names.items() if n and not getattr(args, k.replace("-", "_"))}
    if hub.TOKENIZER and not any(tokenizer.glob("tokenizer*")):
        names["tokenizer"] = hub.TOKENIZER
    state = {} if done else build_on_meta(plain_config(cfg)).state_dict()
    size = sum(t.numel() * (2 if k.startswith("language_") else 4) for k, t in state.items())
    notes = []
    for kind, folder in download(names, Path(args.output), size).items():
        notes.append(f"{kind}: {names[kind].split('@')[0]} of the Hugging Face hub, {folder.name}")
        print(notes[-1], flush=True)
        if kind != "tokenizer":
            setattr(args, kind.replace("-", "_"), str(folder))
            continue
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(tokenizer) as new:
            copy_tokenizer(folder, new)
        print(f"wrote {tokenizer}")
    if done:
        print(f"{args.output} is there already; remove it to make it anew")
        return
    Path(args.output).absolute().parent.mkdir(parents=True, exist_ok=True)
    convert(args, cfg, notes)


def convert(args: argparse.Namespace, cfg: Any, notes: Iterable[str] = ()) -> None:
    """Make GELLA's weights from public ones and report what they are made of, after ``notes``."""
    plain = plain_config(cfg)
    # The language decoder stays empty: what no file has is outside of it. SEED makes that repeat.
    with built_empty(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(cfg.SEED, 0))
        expected = build_model(plain).state_dict()
    pieces, notes = [], list(notes)
    for kind in FORMATS:
        path = getattr(args, kind.replace("-", "_"))
        if path:
            print(f"reading {path}", flush=True)
            name = getattr(args, f"{kind}-format".replace("-", "_"))
            piece, lines = read_piece(kind, path, name, plain, args.seg_row)
            pieces.append(piece)
            notes += lines
    result = assemble(expected, pieces, **allowed_keys(cfg))
    print(report(result, notes, expected))
    sources = hash_files(piece.source for piece in pieces)
    print(tabulate(sources, ["file", "sha256"]))
    state = {**result.state, **{key: expected[key] for key in result.fresh}}
    state = {key: state[key] for key in expected if key in state}
    card = {"fresh": cover(result.fresh, expected), "notes": [*notes, *result.notes]}
    write_gella(args, args.output, state, cfg, sources, **card)
    weights = "" if args.output == cfg.MODEL.WEIGHTS else f" MODEL.WEIGHTS {args.output}"
    print(f"next: python {tools()}/train_net.py --config-file {args.config_file}{weights}")


def plain_config(cfg: Any) -> Any:
    """A copy of a config on the CPU, with neither adapters nor rounded weights.

    Public weights are those of the plain model; both are laid over it when it is loaded.
    """
    # Another kind of attention may not be installed; its keys are the same.
    keys = {"LORA.ENABLED": False, "QUANTIZATION": "", "ATTENTION": "sdpa"}
    language = {f"MODEL.LANGUAGE.{key}": value for key, value in keys.items()}
    return with_keys(cfg, {"MODEL.DEVICE": "cpu", **language})


def read_piece(
    kind: str, path: str, name: str | None, cfg: Any, seg_row: int | None
) -> tuple[Piece, list[str]]:
    """Read one file and rename its keys to GELLA's; also gives lines for the report.

    Args:
        kind, path: a key of ``gella.weights.FORMATS``, and its file or folder.
        name: of the format; None finds it out.
        seg_row: the embedding's row of <SEG>, see ``fit_words``; None takes what the folder's
            config.json says, if it says so.

    Raises:
        OSError, ValueError: what reading and renaming refuse; a config.json that differs.
    """
    state = read_weights(path)
    named = next((layout for layout in FORMATS[kind] if layout.name == name), None)
    layout = (named or detect(kind, state, path)).from_config(cfg)
    file = main_file(path).parent / "config.json"
    beside = read_json(file) if file.is_file() else {}
    beside = beside if isinstance(beside, dict) else {}
    notes: list[str] = []
    try:
        converted = layout.to_gella(state)
        if kind in ("llava", "clip"):
            check_hyperparameters(beside, cfg, kind)
        if kind == "llava":
            if cfg.MODEL.LANGUAGE.TIE_EMBEDDINGS and EMBEDDINGS[0] in converted:
                # files of models with one matrix for both hold it once
                converted.setdefault(EMBEDDINGS[1], converted[EMBEDDINGS[0]])
            row = beside.get("seg_token_index") if seg_row is None else seg_row
            converted, notes = fit_words(converted, cfg.MODEL.LANGUAGE.VOCAB_SIZE, row)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    dropped = [key for key in state if layout.drops(key)]
    return Piece(path, layout.name, converted, tuple(layout.fresh), dropped), notes


def check_hyperparameters(beside: Mapping[str, Any], cfg: Any, kind: str) -> None:
    """Compare what no tensor's shape shows with a file's own config.json, as far as it says so.

    ``beside`` is {} where there is none. Raises ValueError with all values that differ, each with
    its key here.
    """
    language, clip = cfg.MODEL.LANGUAGE, cfg.MODEL.IMAGE_ENCODER
    # Any model's config.json may lie beside a CLIP file; only CLIP's own says something of it.
    alone = beside if beside.get("model_type") == "clip_vision_model" else {}
    vision = beside.get("vision_config") or alone
    heads, act = clip.WIDTH // clip.HEAD_WIDTH, "quick_gelu" if clip.QUICK_GELU else "gelu"
    rows = [
        (vision, "num_attention_heads", heads, "IMAGE_ENCODER.HEAD_WIDTH"),
        (vision, "hidden_act", act, "IMAGE_ENCODER.QUICK_GELU"),
    ]
    if kind == "llava":
        rows += [(beside, x, -2, "") for x in ("vision_feature_layer", "mm_vision_select_layer")]
        if not language.CONFIG:
            text = beside.get("text_config") or beside
            rope = text.get("rope_parameters") or {}
            rows += [
                (text, "num_attention_heads", language.NUM_HEADS, "LANGUAGE.NUM_HEADS"),
                (text, "rms_norm_eps", language.RMS_NORM_EPS, "LANGUAGE.RMS_NORM_EPS"),
                (text, "rope_theta", language.ROPE_THETA, "LANGUAGE.ROPE_THETA"),
                (rope, "rope_theta", language.ROPE_THETA, "LANGUAGE.ROPE_THETA"),
            ]
    wrong = [
        f"{name} is {there[name]} there and {here} here"
        + (f" (MODEL.{key})" if key else " (GELLA takes CLIP's penultimate layer)")
        for there, name, here, key in rows
        if there.get(name) is not None and there[name] != here
    ]
    if wrong:
        raise ValueError(f"its config.json differs from the model's config: {'; '.join(wrong)}")


def report(result: Assembly, notes: Sequence[str], keys: Iterable[str]) -> str:
    """What each part is made of, what starts fresh and what stays absent, by name."""
    keys = list(keys)
    rows = []
    fresh = Counter(key.split(".")[0] for key in result.fresh)
    for part, (tensors, numbers) in {**dict.fromkeys(fresh, (0, 0)), **sizes(result.state)}.items():
        piece = result.origin.get(part)
        source, name = (Path(piece.source).name, piece.format) if piece else ("-", "-")
        rows.append((part, source, name, tensors, f"{numbers:,}", fresh[part]))
    header = ["part", "source", "format", "tensors", "numbers", "fresh"]
    lines = ["", tabulate(rows, header, colalign=("left",) * 3 + ("right",) * 3), ""]
    for piece in {id(p): p for p in result.origin.values()}.values():
        if piece.dropped:
            # numbers as #, and how many keys each name stands for
            counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", key) for key in piece.dropped)
            names = [f"{key} ({n})" if n > 1 else key for key, n in counts.items()]
            lines.append(f"of no use in {Path(piece.source).name}: {', '.join(names)}")
    lines += [*notes, *result.notes]
    if result.fresh:
        lines.append(f"fresh, in no public file: {', '.join(cover(result.fresh, keys))}")
    if result.absent:
        lines.append(f"absent, allowed by the config: {', '.join(cover(result.absent, keys))}")
    return "\n".join([*lines, ""])


def sizes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Tensors and numbers of each part, by the first word of its keys."""
    parts: dict[str, tuple[int, int]] = {}
    for key, tensor in state.items():
        tensors, numbers = parts.get(key.split(".")[0], (0, 0))
        parts[key.split(".")[0]] = (tensors + 1, numbers + tensor.numel())
    return parts


def hash_files(paths: Iterable[str]) -> list[tuple[str, str]]:
    """(name, sha256) of every file that weights are made of, with a progress bar."""
    files = [file for path in paths for file in weight_files(path)]
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="sha256", leave=False) as bar:
        # folder and file: enough to recognise a model, and nothing of this machine
        return [(f"{f.absolute().parent.name}/{f.name}", file_hash(f, bar.update)) for f in files]


# -- what is written -------------------------------------------------------------------------------


def hand_out(args: argparse.Namespace, cfg: Any) -> None:
    """Write the weights of a training checkpoint whole, or GELLA's weights and the LLaVA inside."""
    source, target = args.from_zero or args.weights, args.output or args.export
    print(f"reading {source}", flush=True)
    state = consolidate(source) if args.from_zero else read_weights(source)
    model = build_on_meta(cfg)
    check_state_dict(state, model, source=source, **allowed_keys(cfg))
    if target:
        sources = [(source, file_hash(source))] if args.from_zero else hash_files([source])
        write_gella(args, target, state, cfg, sources)
        train = f"python {tools()}/train_net.py --config-file {args.config_file}"
        print(f"next: {train} --eval-only MODEL.WEIGHTS {target}")
    for folder, original in ((args.export_llava, False), (args.export_llava_original, True)):
        if folder:
            write_llava(args, folder, state, model, cfg, original)
            print(f"wrote {folder}")
            if not original:
                print(f"next: LlavaForConditionalGeneration.from_pretrained({folder!r})")


def write_gella(
    args: argparse.Namespace,
    path: str,
    state: Mapping[str, Tensor],
    cfg: Any,
    sources: Sequence[tuple[str, str]],
    fresh: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write GELLA's weights to a .pth file, or with config and model card into a new folder.

    Args:
        path: an ``--export`` is always a folder; it has the tokenizer too, and works alone.
        sources: (file, sha256) of what the weights were made from.
        fresh, notes: names of what no source has and is untrained, and more lines for the card.
    """
    dtype: Any = {"language_decoder": torch.bfloat16} if args.from_hub else None
    dtype = DTYPES.get(args.dtype, dtype)
    kinds = stored_dtypes(state, dtype)
    if Path(path).suffix == ".pth" and path != args.export:
        kept = {key: tensor.to(kinds[key]) for key, tensor in state.items()}
        content = {"model": kept, "fresh": [*fresh]}
        write_atomically(path, lambda stream: torch.save(content, stream))
    else:
        with new_folder(path) as folder:
            size = args.max_shard_size
            shards = write_shards(state, folder, max_shard_size=size, dtype=dtype)
            own = cfg.clone()
            own.MODEL.WEIGHTS = ""  # the folder's
            if Path(cfg.MODEL.LANGUAGE.TOKENIZER).is_dir():
                copy_tokenizer(Path(cfg.MODEL.LANGUAGE.TOKENIZER), folder / "tokenizer")
                own.MODEL.LANGUAGE.TOKENIZER = "tokenizer"
            (folder / "config.yaml").write_text(own.dump(), encoding="utf-8")
            dtypes = sorted({str(kind).removeprefix("torch.") for kind in kinds.values()})
            facts = f"{', '.join(dtypes)}, {len(shards)} file(s)"
            name = Path(args.config_file).name
            card = model_card(state, name, facts, sources, fresh, notes)
            (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"\nwrote {path}: {len(state)} tensors")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer into a folder, which is made if it is missing."""
    target.mkdir(exist_ok=True)
    for file in (f for pattern in TOKENIZER_FILES for f in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)


def model_card(
    state: Mapping[str, Tensor],
    config_name: str,
    facts: str,
    sources: Sequence[tuple[str, str]],
    fresh: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The README.md of a folder of GELLA's weights; ``facts``: dtypes and files."""
    rows = [f"| {part} | {n} | {numbers:,} |" for part, (n, numbers) in sizes(state).items()]
    lines = [
        "---\nlibrary_name: gella\npipeline_tag: image-segmentation\n---\n# GELLA weights\n",
        "Grounds every entity that a caption names, on entity masks from any source"
        " (arXiv 2402.02555).\n",
        f"- config: `{config_name}`, whole in `config.yaml`; gella {__version__}",
        f"- {len(state)} tensors, {sum(t.numel() for t in state.values()):,} numbers, {facts}",
        "- load: `MODEL.WEIGHTS` names this folder; keys are checked strictly\n",
        *("| part | tensors | numbers |\n|---|---|---|", *rows),
        "\n## Made from\n\n| file | sha256 |\n|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in sources),
    ]
    if fresh:
        lines += ["\n## Untrained\n\nNo source has these; they are as initialised:\n"]
        lines += [f"- `{name}`" for name in fresh]
    if notes:
        lines += ["\n## Notes\n", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])


def write_llava(
    args: argparse.Namespace,
    folder: str,
    state: Mapping[str, Tensor],
    model: nn.Module,
    cfg: Any,
    original: bool,
) -> None:
    """Write the language decoder and CLIP as a LLaVA-1.5 of transformers, or of its repository.

    ``state`` are all of GELLA's tensors by key, ``model`` the same on any device, for the language
    model's configuration; ``original`` takes the repository's layout. ValueError for what a layout
    has no place for: adapters, or one linear layer as projector.
    """
    adapters = [key for key in state if ".lora_" in key]
    if adapters:
        raise ValueError(
            f"the weights hold {len(adapters)} adapter tensors ({adapters[0]} ...), for which LLaVA"
            " has no place: merge them into the weights first"
        )
    if cfg.MODEL.LANGUAGE.PROJECTOR != "mlp2x_gelu" and not original:
        raise ValueError(
            f"MODEL.LANGUAGE.PROJECTOR is {cfg.MODEL.LANGUAGE.PROJECTOR!r}; transformers' LLaVA has"
            " two layers only: use --export-llava-original"
        )
    if original:
        foreign, config = LlavaOriginal().from_gella(state), original_config(model, cfg)
    else:
        # transformers marks the image's place by a token of the vocabulary; GELLA's has none. Its
        # row is never read as a word, and as the mean of the others it never wins as an answer.
        rows = {key: state[key] for key in EMBEDDINGS if key in state}
        longer = {
            key: torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])
            for key, rows in rows.items()
        }
        foreign, config = LlavaHf().from_gella({**state, **longer}), transformers_config(model, cfg)
        # transformers builds CLIP's last norm, which neither LLaVA nor GELLA uses.
        width, norm = cfg.MODEL.IMAGE_ENCODER.WIDTH, "vision_tower.vision_model.post_layernorm."
        foreign |= {norm + "weight": torch.ones(width), norm + "bias": torch.zeros(width)}
    with new_folder(folder) as new:
        dtype = DTYPES.get(args.dtype)
        write_shards(foreign, new, max_shard_size=args.max_shard_size, dtype=dtype)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")


def transformers_config(model: nn.Module, cfg: Any) -> dict[str, Any]:
    """config.json of ``LlavaForConditionalGeneration`` for a GELLA model.

    ``image_token_index`` is a row of its own behind <SEG>; ``seg_token_index`` tells this command
    which row <SEG> has.
    """
    from transformers import CLIPVisionConfig, LlavaConfig

    clip = cfg.MODEL.IMAGE_ENCODER
    text = model.language_decoder.llama.config.to_dict()
    words = text["vocab_size"]
    text["vocab_size"] = words + 1
    vision = CLIPVisionConfig(
        hidden_size=clip.WIDTH,
        intermediate_size=int(clip.WIDTH * clip.MLP_RATIO),
        num_hidden_layers=clip.LAYERS,
        num_attention_heads=clip.WIDTH // clip.HEAD_WIDTH,
        image_size=clip.IMAGE_SIZE,
        patch_size=clip.PATCH_SIZE,
        hidden_act="quick_gelu" if clip.QUICK_GELU else "gelu",
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_index=words,
        image_seq_length=(clip.IMAGE_SIZE // clip.PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=cfg.MODEL.LANGUAGE.TIE_EMBEDDINGS,
    ).to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    config["seg_token_index"] = words - 1
    return config


def original_config(model: nn.Module, cfg: Any) -> dict[str, Any]:
    """config.json of the LLaVA repository's ``LlavaLlamaForCausalLM`` for a GELLA model."""
    config = model.language_decoder.llama.config.to_dict()
    # The repository reads the tower from the hub by this name, whatever the file holds.
    clip = (cfg.MODEL.IMAGE_ENCODER.WIDTH, cfg.MODEL.IMAGE_ENCODER.IMAGE_SIZE)
    towers = {(1024, 224): "-patch14", (1024, 336): "-patch14-336"}
    return {
        **config,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_hidden_size": clip[0],
        "mm_projector_type": cfg.MODEL.LANGUAGE.PROJECTOR,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"openai/clip-vit-large{towers[clip]}" if clip in towers else None,
        "use_mm_proj": True,
        "seg_token_index": config["vocab_size"] - 1,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="config of the model")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option, text in options.items():
            name, *metavar = option.split()
            how: Any = {"metavar": metavar[0]} if metavar else {"action": "store_true"}
            how |= {"type": int} if name == "--seg-row" else {}
            group.add_argument(name, help=text, **how)
            if name[2:] in FORMATS:
                names = [layout.name for layout in FORMATS[name[2:]]]
                group.add_argument(f"{name}-format", choices=names, help="default: by its keys")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of safetensors (default 5GB)")
    add("--dtype", choices=DTYPES, help="of what is written; default: as in the sources")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(arguments)

    def work() -> None:
        check_arguments(args)
        cfg = load_config(args.config_file, args.opts)
        import_modules(cfg)
        finished = args.from_zero or args.weights
        (hand_out if finished else from_hub if args.from_hub else convert)(args, cfg)

    told = "stopped; the same command goes on with what was downloaded"
    return exit_status(work, interrupted=told)
