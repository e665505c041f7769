"""Write descriptions of images and the nouns in them, made by a multimodal model.

By a chat endpoint that speaks OpenAI's protocol (address, model and key also from GELLA_API_URL,
GELLA_API_MODEL and GELLA_API_KEY; the key is best given there, where `ps` does not show it):

    export GELLA_API_KEY=...
    python tools/describe_images.py --url https://host/v1 --model some-model \\
        --input images --output captions.jsonl

By a model of transformers in this process:

    python tools/describe_images.py --local models/llava-1.5-7b-hf --device cuda \\
        --input images --output captions.jsonl

Two descriptions are made of each image, one a prompt. An answer counts when it is on the disk. Stop
the tool as you like: the same command goes on where it stopped. docs/CAPTIONS.md says more.
Exit code 0: all there; 1: some images failed; 2: wrong input; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from tqdm.contrib.logging import logging_redirect_tqdm

import gella.data  # noqa: F401  registers the datasets
from gella.captions.captioner import MODES, PROMPTS, EndpointError, Tally
from gella.captions.endpoint import EndpointCaptioner, EndpointSettings
from gella.captions.local import LocalCaptioner
from gella.captions.run import CaptionRun, Job, open_captions
from gella.commands.console import USER_ERRORS, Parser, exit_status
from gella.commands.inputs import Source, distinct, list_pictures
from gella.data.entityseg import locate_images
from gella.data.records import Place, read_json
from gella.data.register import dataset_records
from gella.utils.io import image_key, write_json
from gella.utils.io import read_json as read_any_json
from gella.utils.journal import Journal

LISTED = 10  # failures that the screen shows; --json has all


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the process with code 2 and one line."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("images and captions").add_argument
    add("--input", nargs="+", metavar="PATH", help="image files and folders (searched through)")
    add("--dataset", metavar="NAME", help="a registered dataset's images")
    add("--images-json", metavar="JSON", help='COCO-style file: the ids and names in "images"')
    add("--image-root", metavar="DIR", help="with --images-json: where the images are")
    add("--output", required=True, metavar="JSONL", help="captions to write or to go on with")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--upright", action="store_true", help="turn photographs by their EXIF orientation")
    add("--max-side", type=int, default=1024, metavar="PIXELS", help="default 1024")
    add("--prompts", metavar="JSON", help='own prompts: {"id": "text", ...}')
    add("--prompt", action="append", metavar="ID", help="use only this prompt; may be repeated")
    add("--json", metavar="FILE", help="write counts, cost and failures here too")
    add = parser.add_argument_group("model").add_argument
    add("--url", help="endpoint, such as https://host/v1; default: GELLA_API_URL")
    add("--model", help="its model; default: GELLA_API_MODEL")
    add("--key", help="its key; default: GELLA_API_KEY (better: others cannot see it)")
    add("--extra", default="{}", metavar="JSON", help='request fields, e.g. {"temperature": 0.2}')
    add("--local", metavar="PATH", help="a model of transformers instead of an endpoint")
    add("--device", default="cpu", help="of the local model: cpu (default), cuda")
    add("--dtype", default="auto", help="of the local model: auto (default), bfloat16, ...")
    add("--mode", choices=MODES, help="default: json for an endpoint, two-steps for --local")
    add("--max-tokens", type=int, default=1024, metavar="N", help="longest answer; default 1024")
    add("--answer-attempts", type=int, default=3, metavar="N", help="per caption; default 3")
    add("--min-found", type=float, default=0.8, metavar="SHARE", help="of the nouns; default 0.8")
    add = parser.add_argument_group("endpoint: patience and limits").add_argument
    add("--concurrency", type=int, default=4, metavar="N", help="requests at once; default 4")
    add("--timeout", type=float, default=120, metavar="S", help="a request; default 120")
    add("--retries", type=int, default=6, metavar="N", help="per request; default 6")
    add("--backoff", type=float, default=1, metavar="S", help="before the first retry; default 1")
    add("--max-wait", type=float, default=300, metavar="S", help="longest Retry-After; default 300")
    add("--max-answer-bytes", type=int, default=1_000_000, metavar="N", help="default 1000000")
    add("--max-failures", type=int, default=20, metavar="N", help="in a row: stop; default 20")
    add("--price-in", type=float, default=0, metavar="X", help="per million prompt tokens")
    add("--price-out", type=float, default=0, metavar="X", help="per million answer tokens")
    add("--verbose", action="store_true", help="say why each request is retried")
    args = parser.parse_args(argv)
    if sum(bool(given) for given in (args.input, args.dataset, args.images_json)) != 1:
        parser.error("give exactly one of --input, --dataset and --images-json")
    if args.images_json and not args.image_root:
        parser.error("--images-json needs --image-root, the folder of its images")
    if args.local and (args.url or args.model or args.key):
        parser.error("--local and --url, --model, --key exclude each other")
    for name in ("concurrency", "max_tokens", "max_side", "answer_attempts", "max_failures"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1")
    for name in ("timeout", "retries", "backoff", "max_wait", "price_in", "price_out"):
        value = getattr(args, name)
        if not math.isfinite(value) or value < 0 or (name == "timeout" and value == 0):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if not 0 <= args.min_found <= 1:
        parser.error(f"--min-found is {args.min_found}; a share between 0 and 1")
    return args


def read_sources(args: argparse.Namespace) -> list[Source]:
    """The pictures that the arguments name, each once; wrong ones are the errors of the user."""
    named = [source for path in args.input or () for source in list_pictures([path])]
    if args.dataset:
        records = dataset_records(args.dataset, ("file_name", "image_id"))
        root = MetadataCatalog.get(args.dataset).get("image_root", None)
        for record in records:
            path = Path(record["file_name"])
            inside = root is not None and path.is_relative_to(root)
            short = path.relative_to(root).as_posix() if inside else path.name
            named.append(Source(record["image_id"], path, short))
    elif args.images_json:
        file, root, ids = args.images_json, Path(args.image_root), []
        for number, image in enumerate(Place(file).field(read_json(file), "images")):
            place = Place(file, f"image {number}")
            ids.append((place.key(image, "file_name"), place.field(image, "id")))
        places = locate_images(root, (str(root / name) for name, _ in ids))
        named = [Source(i, Path(places[str(root / name)]), name) for name, i in ids]
    sources = distinct(named, "name them apart, or give their ids by --images-json")
    if not sources:
        raise ValueError("there is no image in it")
    return sources[: args.limit]


def build_captioner(args: argparse.Namespace, tally: Tally) -> Any:
    """The model that the arguments name; wrong ones are ValueErrors."""
    if args.local:
        options = {"device": args.device, "dtype": args.dtype, "max_tokens": args.max_tokens}
        return LocalCaptioner(args.local, tally=tally, **options)
    try:
        extra = json.loads(args.extra)
    except ValueError as error:
        raise ValueError(f"--extra is no JSON ({error})") from None
    if not isinstance(extra, dict):
        raise ValueError('--extra must be an object, such as {"temperature": 0.2}')
    same = ("timeout", "retries", "backoff", "max_wait", "max_tokens")
    settings = EndpointSettings(
        **{name: getattr(args, name) for name in same},
        max_bytes=args.max_answer_bytes,
        extra=extra,
    )
    address = (args.url, args.model, args.key)
    return EndpointCaptioner.from_environment(*address, settings=settings, tally=tally)


def choose_prompts(path: str | None, wanted: Sequence[str] = ()) -> dict[str, str]:
    """The prompts to use, by id: those wanted, or all, of a JSON file ``{prompt_id: text}``.

    Without a path they are those that come with GELLA. Raises FileNotFoundError without the file,
    ValueError if it is no such JSON, a text is empty, or there is no prompt of an id.
    """
    prompts = PROMPTS if path is None else read_any_json(path, "prompt file")
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(f'{path}: expected {{"id": "text", ...}} with at least one prompt')
    for prompt_id, text in prompts.items():
        if not isinstance(text, str) or not text.strip() or not prompt_id.strip():
            raise ValueError(f"{path}: prompt {prompt_id!r} has no text; write one or remove it")
    unknown = [name for name in wanted if name not in prompts]
    if unknown:
        raise ValueError(f"there is no prompt {unknown[0]!r}; there are: {', '.join(prompts)}")
    return {name: text for name, text in prompts.items() if name in (wanted or prompts)}


def open_jobs(sources: Sequence[Source], prompts: Sequence[str], file: Journal) -> list[Job]:
    """What the file lacks; ValueError if it has a caption of another picture of the same id."""
    jobs = []
    for source in sources:
        for prompt_id in prompts:
            name, _ = file.entries.get((image_key(source.image_id), prompt_id), (None, None))
            if name is None:
                jobs.append(Job(source.image_id, source.name, source.path, prompt_id))
            elif name != source.name:
                raise ValueError(
                    f"{file.path}: image {source.image_id} is {name} there, but {source.name} "
                    "here; write these images to another --output"
                )
    return jobs


def report_of(run: CaptionRun, args: argparse.Namespace, done: int, total: int) -> dict[str, Any]:
    """Counts, cost and failures of a run, ready for JSON.

    ``done`` captions were there before, ``total`` there shall be in the end.
    """
    counts = Counter(run.tally.as_dict())
    asked, answered = counts["prompt_tokens"], counts["completion_tokens"]
    open_ones = {"failed": len(run.failures), "open": total - done - run.written}
    return {
        "captions": {"written": run.written, "there_before": done, **open_ones},
        "counts": dict(counts),
        "cost": (asked * args.price_in + answered * args.price_out) / 1e6,
        "prices_per_million_tokens": {"prompt": args.price_in, "answer": args.price_out},
        "failures": [
            {name: getattr(job, name) for name in ("image_id", "file_name", "prompt_id")}
            | {"reason": reason}
            for job, reason in run.failures
        ],
    }


def print_summary(report: dict[str, Any], output: str) -> None:
    """Say what was done, what it cost, what failed and what to do next."""
    captions, counts, failures = report["captions"], Counter(report["counts"]), report["failures"]
    written, requests, nouns, tokens = (
        "{written} captions written, {there_before} were there, {failed} failed, {open} to do",
        "requests {0[requests]}, retries {0[retries]} ({0[rate_limited]} by rate limits), answers "
        "rejected {0[rejected]}",
        "nouns {0[nouns]}: {0[nouns_repaired]} repaired; left out: {0[nouns_merged]} repeated or "
        "nested, {0[nouns_dropped]} not in the text",
        "tokens: {0[prompt_tokens]} asked, {0[completion_tokens]} answered",
    )
    print(f"{output}: {written.format_map(captions)}\n{requests.format(counts)}")
    unknown = counts["answers_without_usage"]
    paid = any(report["prices_per_million_tokens"].values())
    print(
        f"{nouns.format(counts)}\n{tokens.format(counts)}"
        + (f" (not told for {unknown} answers)" if unknown else "")
        + (f"; cost {report['cost']:.4f}" if paid else "")
    )
    for failure in failures[:LISTED]:
        print("failed: {file_name}, {prompt_id}: {reason}".format_map(failure))
    if len(failures) > LISTED:
        print(f"and {len(failures) - LISTED} more (all of them: --json FILE)")
    if captions["open"]:
        print("next: run the same command again; it goes on with what is missing")
    else:
        print("next: register the captions and train on them, see docs/CAPTIONS.md")


def execute(args: argparse.Namespace) -> int:
    """Read the input, ask the model, write; return the exit code."""
    prompts = choose_prompts(args.prompts, args.prompt or ())
    sources, tally = read_sources(args), Tally()
    captioner = None if args.local else build_captioner(args, tally)
    with open_captions(args.output) as file:
        jobs = open_jobs(sources, list(prompts), file)
        total = len(sources) * len(prompts)
        done = total - len(jobs)
        print(f"{len(sources)} images, {total} captions, of which {done} are there")
        if captioner is None and jobs:  # loading a large model takes minutes: only if needed
            captioner = build_captioner(args, tally)
        others = {model for _, model in file.entries.values()} - {getattr(captioner, "model", "")}
        if captioner is not None and others:
            print(f"note: {args.output} also holds captions of {', '.join(sorted(others))}")
        picture = {"max_side": args.max_side, "upright": args.upright}
        rules = {"attempts": args.answer_attempts, "min_found": args.min_found, "mode": args.mode}
        run = CaptionRun(captioner, file, prompts, tally, picture, rules)
        run.workers, run.max_failures = 1 if args.local else args.concurrency, args.max_failures
        try:
            run.do(jobs, done)
        finally:
            report = report_of(run, args, done, total)
            print_summary(report, args.output)
            if args.json:
                write_json(args.json, report)
    return run.status or int(bool(run.failures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code. ``GELLA_TRACEBACK=1`` shows where an error arose."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    level = logging.INFO if args.verbose else logging.WARNING
    logging.getLogger("gella.captions.endpoint").setLevel(level)
    with logging_redirect_tqdm():
        return exit_status(
            lambda: execute(args),
            errors=(*USER_ERRORS, EndpointError),
            interrupted="stopped; run the same command again to go on",
        )
