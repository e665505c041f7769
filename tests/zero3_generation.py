"""A script for test_evaluation_in_training.py: two processes whose answers are of unequal length.

    python zero3_generation.py FOLDER

Each process generates under ZeRO stage 3 and writes what it got, and what it had got before, to
``rank<N>.json``. Without the switch of ``undisturbed`` the longer answer waits for ever.
"""

from __future__ import annotations

import json
import sys

import torch
from detectron2.config import get_cfg
from detectron2.engine import launch
from detectron2.utils import comm
from torch import nn

from gella import add_gella_config
from gella.engine.evaluation_hooks import undisturbed
from gella.engine.launch import leave_process_group
from gella.engine.zero import ZeroHook
from gella.modeling.language_decoder import IMAGE_TOKEN_ID, LanguageDecoder


def build():
    """A model that is nothing but a tiny language decoder, with room for 20 tokens."""
    cfg = get_cfg()
    add_gella_config(cfg)
    node = cfg.MODEL.LANGUAGE
    node.VOCAB_SIZE, node.HIDDEN_SIZE, node.INTERMEDIATE_SIZE, node.INIT_STD = 50, 16, 32, 0.5
    node.NUM_LAYERS, node.NUM_HEADS, node.NUM_KEY_VALUE_HEADS = 2, 2, 2
    node.MAX_POSITIONS, node.PROJECTOR = 20, "linear"
    torch.manual_seed(3)
    model = nn.Module()
    model.language_decoder = LanguageDecoder(cfg, 8)
    return model


def generate(model, lengths, most):
    """Answers to prompts of these lengths, image tokens included; no end token ends one."""
    ids = [torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *range(5, n)]) for n in lengths]
    grid = torch.full((len(ids), 8, 2, 2), 0.1 + comm.get_rank())
    options = dict(max_new_tokens=most, eos_token_id=60, pad_token_id=0, snippets=[[7, 8, 9]])
    return [x.tolist() for x in model.language_decoder.generate(grid, ids, **options)]


def all_answers(model):
    """First answers of unequal length; then one rank has a prompt that leaves room for 8 only."""
    rank = comm.get_rank()
    return [
        *generate(model, [6 + rank], (3, 9)[rank]),
        *generate(model, ([6], [6, 12])[rank], 10),
    ]


def main(folder):
    """Generate before the engine and under it."""
    torch.set_num_threads(1)
    model = build().eval()
    model.norm = nn.BatchNorm1d(2)
    model.norm.running_mean.fill_(1.0 + comm.get_rank())
    before = all_answers(model)
    decoder = model.language_decoder
    optimizer = torch.optim.AdamW(decoder.parameters())
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    hook = ZeroHook(model, "language_decoder", optimizer, optimizer.param_groups, config)
    hook.before_train()
    with torch.no_grad(), undisturbed(model):
        after = all_answers(model)
        assert model.norm.running_mean.tolist() == [1.0, 1.0]  # rank 0's, on both
    assert model.norm.running_mean.tolist() == [1.0 + comm.get_rank()] * 2
    decoder = hook.engine.module
    assert "generate" not in vars(decoder) and "generate" not in vars(decoder.llama)
    with open(f"{folder}/rank{comm.get_rank()}.json", "w", encoding="utf-8") as stream:
        json.dump([before, after], stream)
    leave_process_group()


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
