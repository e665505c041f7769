"""Tiny CLIPs as transformers saves them: with random weights, or trained on crops of drawn scenes.

    python tests/tiny_clip.py [--scenes 600 --steps 600 --seed 0 --output output/tiny_clip]

trains one from scratch on scenes of `datasets/prepare_shapes.py`, and evaluates it on the held-out
ones as ``tools/train_net.py --config-file configs/clip_zero_shot.yaml --eval-only`` does. It is a
recipe of the tests and no release: it shows what the grounder makes of a CLIP that knows its nouns.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from open_clip.loss import ClipLoss
from tiny_weights import perturb
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from gella import GellaPredictor, load_config
from gella.commands import train as train_command
from gella.entities.sources import load_from_record
from gella.entities.view import read_recorded
from gella.text.words import bare_noun

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "clip_zero_shot.yaml")
VISION = {"image_size": 32, "patch_size": 8}
SIDE = 96  # of the drawn scenes, pixels
BATCH = 64
RATE = 2e-3


def sizes(side):
    """What makes the zero-shot config fit small pictures on a CPU: KEY, VALUE, ..."""
    keys = ("MODEL.CLIP.DENSE_SIZE", "MODEL.IMAGE_ENCODER.IMAGE_SIZE")
    keys += ("MODEL.IMAGE_ENCODER.PATCH_SIZE", "INPUT.GELLA.COLORMAP_SIZE")
    return [*itertools.chain(*((key, side) for key in keys)), "MODEL.DEVICE", "cpu"]


def letters():
    """CLIP's tokenizer, knowing single letters only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{x}</w>" for x in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=48)


def save_clip(folder, seed=0, tokenizer=None, width=32, **vision):
    """Write model and tokenizer (default: of letters) to a folder; returns the model."""
    tokenizer = tokenizer or letters()
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": width, "intermediate_size": width * 3 // 2}
    size |= {"num_attention_heads": width // 16, "num_hidden_layers": 3}
    size["projection_dim"] = width // 2
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 48, **ends}
    config = CLIPConfig(
        text_config={**size, **text},
        vision_config={**size, **VISION, **vision},
        projection_dim=size["projection_dim"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = perturb(CLIPModel(config), seed)
    model.save_pretrained(folder)
    return model


def pairs_of(grounder, records):
    """(noun, entity's id, crop) of every entity that a noun names, cut as the grounder cuts them.

    Args:
        grounder: a ``ClipGrounder``.
        records: of a "png" dataset, those of a picture in a row; pictures of the grounder's size.
    """
    pairs = []
    for _, of_one in itertools.groupby(records, lambda record: record["file_name"]):
        told = list(of_one)
        image = read_recorded(told[0]["file_name"], None)
        entities, crops = load_from_record(told[0], image), {}
        picture = torch.from_numpy(image).permute(2, 0, 1)
        picture = (picture - grounder.pixel_mean) / grounder.pixel_std
        for number, mask in zip(entities.segment_ids, entities.bitmasks()):
            crops[number] = grounder.crop(picture, torch.from_numpy(mask)[None].float())
        for phrase in (phrase for record in told for phrase in record["phrases"]):
            pairs += [(phrase["text"], number, crops[number]) for number in phrase["segment_ids"]]
    return pairs


def batches(pairs, seed):
    """Yield batches without end: texts and crops, no noun and no entity twice.

    To the loss all other crops of a batch are wrong for a noun, so it is not there again with
    another article or number either. A wider one may be ("circle"), as in any CLIP's batches.
    """
    draw, order = random.Random(seed), []
    while True:
        chosen = {}
        while len(chosen) < BATCH:
            order = order or draw.sample(pairs, len(pairs))
            noun, number, crop = order.pop()
            if all(number != other for _, other, _ in chosen.values()):
                chosen.setdefault(bare_noun(noun.lower(), counts=True), (noun, number, crop))
        yield [noun for noun, _, _ in chosen.values()], torch.stack([x[2] for x in chosen.values()])


def train_clip(folder, records, steps, seed=0):
    """Train a CLIP from scratch, on what nouns name, by open_clip's loss; write it to a folder.

    Args:
        folder: to write to.
        records: see `pairs_of`.
        steps: of one batch each.
        seed: of weights and batches.
    """
    template = load_config(CONFIG).MODEL.CLIP.TEMPLATE
    texts = [template.format(phrase["text"]) for x in records for phrase in x["phrases"]]
    tokenizer = letters().train_new_from_iterator(texts, 800)
    clip = save_clip(folder, seed, tokenizer, width=64)
    keys = map(str, ["MODEL.CLIP.NAME", folder, *sizes(SIDE)])
    grounder = GellaPredictor.from_config(CONFIG, opts=list(keys)).model
    pairs = pairs_of(grounder, records)
    grounder.requires_grad_(True)
    optimizer = torch.optim.AdamW(grounder.parameters(), RATE, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    loss_of = ClipLoss()
    for step, (nouns, crops) in enumerate(itertools.islice(batches(pairs, seed), steps), 1):
        written = grounder.text_features([template.format(noun) for noun in nouns])
        seen = grounder.vision_model(pixel_values=crops).pooler_output
        seen = F.normalize(grounder.visual_projection(seen), dim=-1)
        loss = loss_of(seen, written, grounder.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(grounder.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}", flush=True)
    clip.load_state_dict(grounder.state_dict())
    clip.save_pretrained(folder)


def evaluate(folder, output, datasets, side, *options):
    """The results of ``train_net.py --eval-only`` with the CLIP of a folder.

    Args:
        folder: of the CLIP.
        output: where ``results.json`` is written.
        datasets: names of registered ones.
        side: of the pictures in pixels.
        options: more keys and values.
    """
    keys = ["MODEL.CLIP.NAME", folder, *sizes(side), "INPUT.GELLA.ENTITY_SOURCES", "[]"]
    keys += ["DATASETS.TEST", tuple(datasets), "OUTPUT_DIR", output, "DATALOADER.NUM_WORKERS", 0]
    command = ["--config-file", CONFIG, "--eval-only", *map(str, [*keys, *options])]
    args = default_argument_parser().parse_args(command)
    args.table, args.check = "", False
    train_command.preflight(args, 1, 1)
    train_command.run(args)
    return json.loads((Path(output) / "results.json").read_text())


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=600, help="training scenes")
    parser.add_argument("--steps", type=int, default=600, help="of 64 crops and nouns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/tiny_clip"))
    args = parser.parse_args()
    records = DatasetCatalog.get("gella_shapes_png_train")
    images = itertools.groupby(records, lambda record: record["file_name"])
    some = itertools.islice(images, args.scenes)
    train_clip(args.output, [x for _, told in some for x in told], args.steps, args.seed)
    print(f"trained in {time.process_time():.0f} seconds of processor time")
    datasets = ["gella_shapes_png_val", "gella_shapes_refcoco_val"]
    evaluate(args.output, args.output / "evaluation", datasets, SIDE)


if __name__ == "__main__":
    main()
