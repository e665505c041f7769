"""A script for test_evaluation_in_training.py: two processes whose answers are of unequal length.

    python zero3_generation.py FOLDER

Each process generates under ZeRO stage 3 and writes what it got, and what it had got before, to
``rank<N>.json``. Without the switch of ``undisturbed`` the longer answer waits for ever.
"""

from __future__ import annotations

import json
import sys

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import nn

from gella.evaluation_hooks import undisturbed
from gella.modeling.language_decoder import IMAGE_TOKEN_ID, LanguageDecoder
from gella.zero import ZeroHook

LENGTHS = (3, 9)


def build():
    """A model that is nothing but a tiny language decoder."""
    torch.manual_seed(3)
    model = nn.Module()
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    llama = dict(vocab_size=50, num_key_value_heads=2, initializer_range=0.5, **sizes)
    model.language_decoder = LanguageDecoder(
        llama=llama, image_dim=8, projector="linear", image_token_stride=1
    )
    return model


def generate(model):
    """An answer of this rank's length; no end token ends it sooner."""
    rank = comm.get_rank()
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, 5 + rank])
    grid = torch.full((1, 8, 2, 2), 0.1 + rank)
    options = dict(max_new_tokens=LENGTHS[rank], eos_token_id=60, pad_token_id=0)
    return model.language_decoder.generate(grid, [ids], **options)[0].tolist()


def main(folder):
    """Generate before the engine and under it."""
    torch.set_num_threads(1)
    model = build().eval()
    before = generate(model)
    decoder = model.language_decoder
    optimizer = torch.optim.AdamW(decoder.parameters())
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    hook = ZeroHook(model, "language_decoder", optimizer, optimizer.param_groups, config)
    hook.before_train()
    with torch.no_grad(), undisturbed(model):
        after = generate(model)
    assert "generate" not in vars(hook.engine.module.llama)
    with open(f"{folder}/rank{comm.get_rank()}.json", "w", encoding="utf-8") as stream:
        json.dump([before, after], stream)
    comm.synchronize()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
