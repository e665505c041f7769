"""Ground the nouns of captions in pictures' entity masks; write pictures, JSON and one HTML page.

The example scenes with the weights that come with the project:

    python tools/demo.py --input examples/shapes --captions examples/shapes/captions.jsonl

Your own picture, with masks from any segmenter (id PNG, COCO panoptic PNG, .npz, COCO JSON):

    python tools/demo.py --config-file configs/gella_tiny_shapes.yaml --weights model_final.pth \\
        --input scene.png --masks scene_masks.png --caption "A red circle lies on the sand." \\
        --nouns "A red circle,the sand" --output output/demo

A folder of pictures, masks by a live segmenter, captions by the model itself:

    python tools/demo.py --config-file CONFIG --weights PTH --input photos \\
        --segmenter sam:facebook/sam-vit-base --describe-first

Other questions: --task refer (captions are expressions), panoptic (--categories sky,grass,cow),
describe, extract. The first pictures of a registered dataset: --dataset NAME --num 3.

DIR/index.html shows all: nouns light their masks and masks their nouns. Beside it lie <name>.json,
<name>_grounding.png and <name>_colormap.png. Stop the tool as you like: the same command goes on
where it stopped. docs/DEMO.md says more. Exit code 0: all done; 1: some pictures failed (listed in
DIR/failures.json); 2 and one line "error: ...": wrong input; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from gella.captions.ask import is_endpoint, open_captioner
from gella.captions.captioner import EndpointError
from gella.commands.demo_captions import assign, read_captions
from gella.commands.demo_inputs import (
    Job,
    Picture,
    dataset_jobs,
    list_pictures,
    output_names,
    plain,
)
from gella.commands.demo_masks import Beside, Live, MaskSource, Records, Whole, masks_from
from gella.commands.demo_output import PAGE, Output, shown
from gella.commands.demo_run import LISTED, Plan, Run
from gella.commands.demo_stop import Stop
from gella.commands.demo_text import read_categories, split_nouns
from gella.config import load_config
from gella.data.register import import_modules
from gella.predictor import GellaPredictor
from gella.predictor.questions import TASKS
from gella.segmenters.segmenter import SPECS, MaskLimits

RELEASE = Path(__file__).resolve().parents[3] / "weights" / "gella_tiny_shapes" / "config.yaml"
TEXTS = ("--caption", "--captions", "--describe-first", "--captioner")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows an example\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model(parser.add_argument_group("model and output").add_argument)
    _add_input(parser.add_argument_group("pictures and masks").add_argument)
    _add_text(parser.add_argument_group("questions").add_argument)
    args = parser.parse_args(argv)
    if args.config_file is None:
        if not RELEASE.is_file():
            parser.error("--config-file is missing")
        args.config_file = _release()
    for problem in (*_input_problems(args), *_text_problems(args)):
        parser.error(problem)
    return args


def _release() -> str:
    return os.path.relpath(RELEASE)


def _add_model(add: Any) -> None:
    add("--config-file", metavar="YAML", help="default: that of weights/gella_tiny_shapes")
    add("--weights", metavar="PTH", help='default: MODEL.WEIGHTS of the config; "": untrained')
    add("--device", help="cpu, cuda; default: the config's")
    add("--output", default="output/demo", metavar="DIR", help="default: output/demo")
    add("--overwrite", action="store_true", help="do finished pictures again")
    add("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default 8)")
    more = {"nargs": argparse.REMAINDER, "default": [], "metavar": "KEY VALUE"}
    add("--opts", help="config overrides; must come last", **more)


def _add_input(add: Any) -> None:
    add("--input", metavar="PATH", help="a picture, or a folder of pictures (searched through)")
    add(
        "--masks",
        metavar="PATH",
        help="mask file, a folder of them by name, or one COCO JSON; "
        "default: scene_masks.png beside scene.jpg",
    )
    add("--masks-format", default="auto", metavar="FORMAT", help="panoptic_png, gray_png, npz, ...")
    add("--panoptic-json", metavar="JSON", help="of one PNG: COCO file that says what is crowd")
    add("--segmenter", metavar="SPEC", help=f"makes the masks on the spot: {SPECS}")
    add("--segmenter-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--min-area", type=int, default=1, metavar="PIXELS", help="of the segmenter's masks")
    add("--max-entities", type=int, metavar="N", help="the segmenter's best N of a picture")
    add("--dataset", metavar="NAME", help="a registered dataset instead of --input")
    add("--num", type=int, default=3, help="with --dataset: how many pictures (default 3)")


def _add_text(add: Any) -> None:
    add("--task", choices=TASKS, default="ground", help="default: ground")
    add(
        "--caption",
        action="append",
        metavar="TEXT",
        help="the sentence or expression, for every picture; repeatable",
    )
    add(
        "--captions",
        metavar="FILE",
        help="text: name<TAB>caption, or a caption per line; .jsonl: "
        '{"image", "caption", "nouns", "masks"} per line',
    )
    add("--nouns", metavar="A,B,C", help="nouns of --caption in their order")
    add("--extract", action="store_true", help="the model finds the nouns, given ones or not")
    add("--describe-first", action="store_true", help="the model writes the captions")
    add(
        "--captioner",
        metavar="URL",
        help="an OpenAI-compatible endpoint (key: GELLA_API_KEY), or "
        "a local model of transformers, writes the captions",
    )
    add("--captioner-model", metavar="NAME", help="of the endpoint; default: GELLA_API_MODEL")
    add("--categories", metavar="A,B,C", help='for panoptic: names, "coco", or a file of them')


def _input_problems(args: argparse.Namespace) -> list[str]:
    found = []
    if args.dataset is None and args.input is None:
        found.append("--input is missing (or give --dataset NAME)")
    if args.dataset is not None:
        for name in ("input", "masks", "segmenter", "caption", "captions", "nouns"):
            if getattr(args, name) is not None:
                found.append(f"--{name} and --dataset exclude each other")
    if args.masks is not None and args.segmenter is not None:
        found.append("--masks and --segmenter exclude each other")
    if args.panoptic_json is not None and args.masks is None:
        found.append("--panoptic-json needs --masks, a PNG")
    for name in ("num", "batch_size"):
        if getattr(args, name) < 1:
            found.append(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1")
    found += [
        f"--segmenter-option {option} is no KEY=VALUE"
        for option in args.segmenter_option
        if "=" not in option
    ]
    return found


def _text_problems(args: argparse.Namespace) -> list[str]:
    found = []
    given = [name for name in TEXTS if getattr(args, name[2:].replace("-", "_"))]
    if args.caption is not None and "--caption" not in given:
        given.insert(0, "--caption")
    if len(given) > 1:
        found.append(f"{given[0]} and {given[1]} exclude each other")
    if args.task in ("ground", "refer", "extract") and args.dataset is None and not given:
        found.append(f"--caption is missing (or give one of {', '.join(TEXTS[1:])})")
    if args.task in ("panoptic", "describe") and given:
        found.append(f"--task {args.task} takes no captions; leave {given[0]} out")
    if args.task == "refer" and given and given[0] in TEXTS[2:]:
        found.append(f"--task refer takes expressions; {given[0]} writes captions")
    if args.task == "panoptic" and args.categories is None:
        found.append("--task panoptic needs --categories")
    if args.categories is not None and args.task != "panoptic":
        found.append("--categories goes with --task panoptic only")
    if args.nouns is not None:
        if args.extract:
            found.append("--nouns and --extract exclude each other")
        if args.task != "ground" or len(args.caption or ()) != 1:
            found.append("--nouns goes with one --caption and --task ground only")
    if args.captioner_model is not None and not args.captioner:
        found.append("--captioner-model goes with --captioner only")
    return found


def own_jobs(args: argparse.Namespace) -> tuple[list[Job], list[Picture]]:
    """Jobs of ``--input``, and its pictures.

    Raises:
        FileNotFoundError, ValueError: of the files that the arguments name, or an empty caption.
    """
    leave_out = [Path(path) for path in (args.output, args.masks) if path]
    pictures = list_pictures(Path(args.input), leave_out)
    given: list[tuple[Picture, Job]] = []
    blank = Job(pictures[0], "")
    if args.captions:
        found, lost = assign(read_captions(args.captions), pictures)
        for entry in lost[:LISTED]:
            print(f"note: {shown(entry.where)}: {shown(entry.image)} is no picture of --input")
        for place, entries in sorted(found.items()):
            for entry in entries:
                job = replace(blank, text=entry.text, nouns=entry.nouns, masks=entry.masks)
                given.append((pictures[place], job))
        if len(found) < len(pictures):
            print(f"note: {len(pictures) - len(found)} of {len(pictures)} pictures have no caption")
    else:
        texts = [plain(text) for text in args.caption] if args.caption else [None]
        if any(text is not None and not text.strip() for text in texts):
            raise ValueError("the caption is empty; write a sentence that names what to find")
        nouns = split_nouns(args.nouns)
        given = [(p, replace(blank, text=text, nouns=nouns)) for p in pictures for text in texts]
    titles = output_names([picture.name for picture, _ in given])
    jobs = [
        replace(job, picture=picture, name=title) for (picture, job), title in zip(given, titles)
    ]
    return jobs, pictures


def choose_masks(args: argparse.Namespace, pictures: Sequence[Picture]) -> MaskSource:
    """The source of masks that the arguments name; wrong ones are ValueErrors."""
    if args.dataset is not None:
        return Records()
    if args.segmenter is not None:
        options = dict(option.split("=", 1) for option in args.segmenter_option)
        limits = MaskLimits(args.min_area, max_entities=args.max_entities)
        return Live(args.segmenter, args.device, options, limits)
    if args.masks is not None:
        return masks_from(Path(args.masks), pictures, args.masks_format, args.panoptic_json)
    # What the language model says of a picture does not depend on masks.
    return Beside(Whole() if args.task in ("describe", "extract") else None)


def make_plan(args: argparse.Namespace, jobs: Sequence[Job], masks: MaskSource) -> Plan:
    """What to do with the jobs; opens the captioner."""
    origin = {
        name: getattr(args, name)
        for name in ("masks", "segmenter", "dataset")
        if getattr(args, name) is not None
    }
    captioner = None
    if args.captioner:
        captioner = open_captioner(
            args.captioner, args.captioner_model, device=args.device or "cpu"
        )
        origin["captioner"] = captioner.model
        if is_endpoint(args.captioner):
            print(f"captions: the pictures are sent to {captioner.address}")
    single = args.dataset is None and len(jobs) == 1 and not Path(args.input).is_dir()
    return Plan(
        task=args.task,
        masks=masks,
        categories=read_categories(args.categories),
        describe_first=args.describe_first,
        captioner=captioner,
        extract=args.extract,
        origin=origin,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        strict=single,
    )


def execute(args: argparse.Namespace) -> int:
    """Read the input, then build the model (the slow part), then do the jobs; the exit code."""
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is a file; name a folder")
    cfg = load_config(args.config_file, args.opts)
    import_modules(cfg)
    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    if args.device is not None:
        cfg.MODEL.DEVICE = args.device
    if args.dataset is not None:
        pictures: list[Picture] = []
        jobs = dataset_jobs(args.dataset, args.num, cfg, args.task)
    else:
        jobs, pictures = own_jobs(args)
    plan = make_plan(args, jobs, choose_masks(args, pictures))
    predictor = GellaPredictor(cfg, config_file=args.config_file)
    if not cfg.MODEL.WEIGHTS:
        print("no weights: the model is untrained, and the output is labelled so")
    run = Run(predictor, plan, Output(Path(args.output)))
    with Stop(plan.captioner) as stop, logging_redirect_tqdm():
        run.do(jobs, stop)
    summarize(run, args, len(jobs), bool(stop.number))
    if stop.number:
        return 128 + stop.number
    return 1 if run.failures else 0


def summarize(run: Run, args: argparse.Namespace, total: int, stopped: bool) -> None:
    """Say what was done, what failed, where to look and what to do next."""
    if run.skipped:
        print(f"{run.skipped} of {total} were done before (--overwrite does them again)")
    print(f"{run.done} done, {len(run.failures)} failed")
    for failure in run.failures[:LISTED]:
        print(f"failed: {shown(failure['image'])}: {shown(failure['reason'])}")
    if len(run.failures) > LISTED:
        print(f"and {len(run.failures) - LISTED} more")
    if run.failures:
        print(f"all failures: {Path(args.output) / 'failures.json'}")
    if run.done or run.skipped or run.failures:
        print(f"wrote {Path(args.output) / PAGE}")
    if stopped:
        print("next: the same command goes on where this one stopped")
        return
    if run.failures:
        print("next: mend these and run the same command again; it does only what is missing")
        return
    print(f"next: open {Path(args.output) / PAGE} in a browser, or try your own:")
    model = "" if args.config_file == _release() else f" --config-file {quote(args.config_file)}"
    model += f" --weights {quote(args.weights)}" if args.weights else ""
    print(f'  python tools/demo.py{model} --input IMAGE --masks FILE --caption "..."')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parse_args(argv)
    try:
        return execute(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    except (EndpointError, ValueError, OSError) as error:
        if os.getenv("GELLA_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
