"""The counted cost: equal to real runs of the tiny model, closed formulas, DeepSpeed's figures."""

from __future__ import annotations

import contextlib
import json
import weakref
from dataclasses import replace
from pathlib import Path

import benchmark
import cost_flops
import cost_memory
import cost_parameters
import cost_passes
import cost_zero
import numpy as np
import pytest
import torch
from cost_passes import TextPass, Workload
from cost import GIB, Branch
from detectron2.modeling import build_model
from torch._subclasses.fake_tensor import FakeTensorMode

from gella import load_config
from gella.entities.entity_map import EntityMap

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
PAPER = str(ROOT / "configs" / "gella_swin_t.yaml")
LOAD = Workload(caption_tokens=17, nouns=5, noun_tokens=3, prompt_tokens=11, entities=7)
IMAGE_TOKENS = 36
MODULES = {
    "image encoder": "image_encoder",
    "colormap encoder": "colormap_encoder",
    "ResoBlend": "resoblend",
    "mask decoder": "mask_decoder",
    "projector": "language_decoder.projector",
    "association": "association",
}


def tiny_cfg(*opts):
    return load_config(TINY, list(opts))


def mapped(load, seed):
    """A mapped dict with the token, noun and entity counts of a workload; values at random."""
    rng = np.random.default_rng(seed)
    ids = np.arange(96 * 96, dtype=np.int32).reshape(96, 96) // 900 % load.entities + 1
    entities = EntityMap(ids, list(range(1, load.entities + 1)))
    length = IMAGE_TOKENS + load.prompt_tokens + load.caption_tokens + load.answer
    input_ids = torch.from_numpy(rng.integers(5, 600, length))
    input_ids[4 : 4 + IMAGE_TOKENS] = -200
    labels = torch.full_like(input_ids, -100)
    labels[-load.answer :] = input_ids[-load.answer :]
    return {
        "image": torch.from_numpy(rng.integers(0, 256, (3, 96, 96), dtype=np.uint8)),
        "colormap": torch.from_numpy(rng.integers(0, 256, (3, 96, 96), dtype=np.uint8)),
        "entities": entities,
        "entities_full": entities,
        "input_ids": input_ids,
        "labels": labels,
        "seg_positions": torch.arange(length - load.nouns, length),
        "phrases": [
            {"text": "x", "start": -1, "end": -1, "entity_indices": [i % load.entities]}
            for i in range(load.nouns)
        ],
        "task": "ground",
        "caption": "x",
        "height": 96,
        "width": 96,
        "valid_size": (96, 96),
    }


@pytest.fixture(scope="module")
def paper():
    """The paper's config and model on the meta device, with 3 of 32 layers of LLaMA."""
    cfg = load_config(PAPER, ["MODEL.LANGUAGE.NUM_LAYERS", "3"])
    return cfg, cost_parameters.build_on_meta(cfg)


@pytest.mark.parametrize("queries", ["entity", "learned"])
def test_flops_without_data_are_those_of_a_real_run_part_by_part(queries):
    cfg = tiny_cfg("MODEL.MASK_DECODER.QUERIES", queries)
    real = build_model(cfg)
    with cost_flops.counting(real), cost_passes.counter() as count:
        real([mapped(LOAD, 0)])
    found = {name: sum(flops.values()) for name, flops in count.get_flop_counts().items()}
    expected = {part: found[f"GELLA.{path}"] for part, path in MODULES.items()}
    expected["language decoder"] = found["GELLA.language_decoder"] - expected["projector"]
    counted = cost_flops.count_flops(cost_parameters.build_on_meta(cfg), cfg, LOAD)
    assert counted["parts"] == expected
    assert min(expected.values()) > 0
    assert torch.backends.mha.get_fastpath_enabled()


class Saved:
    """A tensor that autograd holds; gone with the part of the graph that holds it."""

    def __init__(self, part, tensor):
        self.part, self.tensor = part, tensor


class Kept:
    """A plain record of what autograd still holds when the step's losses are there."""

    def __init__(self, model):
        self.stack, self.found = ["losses"], []
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def watch(self, module, part, method="forward"):
        """What is saved during a method of ``module`` belongs to ``part``."""
        original = getattr(module, method)

        def watched(*args, **kwargs):
            self.stack.append(part)
            result = original(*args, **kwargs)
            self.stack.pop()
            return result

        setattr(module, method, watched)

    def pack(self, tensor):
        saved = Saved(self.stack[-1], tensor)
        self.found.append(weakref.ref(saved))
        return saved

    def bytes(self):
        sizes, seen = {}, set()
        for saved in [reference() for reference in self.found]:
            storage = saved and saved.tensor.untyped_storage()
            if saved and storage.data_ptr() not in self.own | seen:
                seen.add(storage.data_ptr())
                sizes[saved.part] = sizes.get(saved.part, 0) + storage.nbytes()
        return sizes


@pytest.mark.parametrize("queries", ["entity", "learned"])
@pytest.mark.parametrize("half", [False, True])
def test_activations_without_data_are_those_of_a_real_step(queries, half):
    cfg = tiny_cfg("MODEL.MASK_DECODER.QUERIES", queries)
    torch.manual_seed(0)
    real = build_model(cfg).train()
    if half:
        real.language_decoder.to(torch.bfloat16)
    kept = Kept(real)
    for part, path in MODULES.items():
        kept.watch(real.get_submodule(path), part)
    kept.watch(real.language_decoder, "projector", "image_tokens")  # pools in front of it
    llama = real.language_decoder.llama
    for module in (llama.base_model, llama.get_output_embeddings()):
        kept.watch(module, "language decoder")
    for number, block in enumerate(llama.base_model.layers):
        kept.watch(block, f"block {number}")
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses = real([mapped(LOAD, seed) for seed in range(2)])
    expected = kept.bytes()
    assert all(loss.requires_grad for loss in losses.values())
    blocks = [expected.pop(f"block {i}") for i in range(4)]
    expected["language decoder"] += sum(blocks)
    found = cost_memory.saved_bytes(cost_parameters.build_on_meta(cfg), cfg, LOAD, 2, half)
    parts = dict(found["parts"])
    # Indices of supervised tokens: a bool per token there, two numbers per answer token here.
    assert parts.pop("losses") == pytest.approx(expected.pop("losses"), rel=0.02)
    # In bfloat16 a norm's statistics are float32; fake tensors make them bfloat16.
    assert parts == (pytest.approx(expected, rel=0.01) if half else expected)
    length = IMAGE_TOKENS + 11 + 17 + LOAD.answer
    inputs = 4 * 2 * length * 128 * (2 if half else 4)
    spared = found["sums"]["plain"] - found["sums"]["checkpointed"]
    assert spared == sum(blocks[:-1]) - inputs > 0


def test_both_ways_are_told_whatever_the_config_says():
    found = []
    for checkpointing in (False, True):
        cfg = tiny_cfg("MODEL.LANGUAGE.GRADIENT_CHECKPOINTING", checkpointing)
        model = cost_parameters.build_on_meta(cfg)
        found.append(cost_memory.saved_bytes(model, cfg, LOAD, 1, half=False))
    assert found[0] == found[1]


def llama_flops(length, logits, sizes=(4096, 11008, 3, 32001)):
    """2 FLOPs for each weight and token, and two products of queries with keys and values."""
    width, inner, layers, words = sizes
    linear = layers * (4 * width * width + 3 * width * inner)
    return 2 * linear * length + 4 * layers * width * length**2 + 2 * logits * width * words


PROJECTOR = 2 * 576 * (1024 * 4096 + 4096 * 4096)


def test_the_language_decoder_costs_what_llama_s_formula_says(paper):
    cfg, model = paper
    load = Workload()
    assert load.answer == 10 + 12 * 4
    found = cost_flops.count_flops(model, cfg, load)
    length = 576 + 60 + 60 + 58
    assert found["parts"]["projector"] == PROJECTOR
    assert found["parts"]["language decoder"] == llama_flops(length, 58)
    ways = found["language"]
    given = ways["given"]["flops"]
    assert given == PROJECTOR + llama_flops(length, 58)
    steps = sum(llama_flops(1, 1) + 4 * 3 * 4096 * (cached - 1) for cached in range(697, length))
    assert ways["generated"]["flops"] - given == PROJECTOR + llama_flops(696, 1) + steps
    assert ways["one_noun"]["flops"] == 12 * (PROJECTOR + llama_flops(576 + 120 + 14, 14))
    assert ways["noun_alone"]["flops"] == 12 * (PROJECTOR + llama_flops(576 + 62 + 14, 14))
    assert 10 < ways["one_noun"]["flops"] / given < 12
    for rule in (1, 2):
        tokens = found["implied_tokens"][str(rule)]
        flops = 11_987e9 * 2 / rule
        assert (
            PROJECTOR + llama_flops(tokens - 1, 0) < flops < PROJECTOR + llama_flops(tokens + 1, 0)
        )
    rows = found["table_12"]
    assert rows["ours, nouns given"][0] == given
    assert rows["ours, nouns given"][3] == sum(found["parts"].values())
    assert rows["ours, a pass per noun"][1:3] == rows["ours, nouns given"][1:3]


def test_clip_costs_what_is_published(paper):
    cfg, model = paper
    with FakeTensorMode(), cost_flops.counting(model):
        cost_passes.make_fake(model)
        count = cost_passes.FlopCount()
        cost_passes.run_vision(model, cfg, 20, 1, count)
    width, tokens = 1024, 577
    blocks = 24 * (24 * width * width * tokens + 4 * width * tokens**2)
    assert count.parts["image encoder"] == blocks + 2 * 576 * width * 3 * 14 * 14
    assert count.parts["image encoder"] / 2e9 == pytest.approx(191.0, abs=0.1)  # as usually cited


def test_sampling_counts_four_multiply_adds_a_value():
    with cost_passes.counter() as count:
        torch.nn.functional.grid_sample(
            torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 6, 2), align_corners=False
        )
    assert count.get_total_flops() == 2 * 3 * 4 * 6 * 8


def test_shared_tensors_stay_shared_and_nothing_is_allocated():
    model = cost_parameters.build_on_meta(tiny_cfg())
    llama = model.language_decoder.llama
    before = {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()}
    with FakeTensorMode():
        cost_passes.make_fake(model, torch.bfloat16)
    assert llama.get_input_embeddings().weight is llama.get_output_embeddings().weight
    assert {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} == before
    floats = {b.dtype for b in model.buffers() if b.is_floating_point()}
    assert {p.dtype for p in model.parameters()} | floats == {torch.bfloat16}


# -- ZeRO ------------------------------------------------------------------------------------------

LLAMA = Branch(parameters=6_759_403_520, trained=6_759_403_520, largest=32_001 * 4096)


def test_zero_states_follow_the_paper_s_figure():
    psi, gpus = 7_500_000_000, 64  # figure 1 of the ZeRO paper, decimal GB
    whole = Branch(psi, psi)
    figure = [cost_zero.zero_states(whole, gpus, stage).gpu / 1e9 for stage in range(4)]
    assert figure == pytest.approx([120.0, 31.4, 16.6, 1.9], abs=0.05)


def test_float32_keeps_no_second_copy_and_frozen_weights_have_no_states():
    adapters = Branch(parameters=1000, trained=10)
    states = cost_zero.zero_states(adapters, 4, 0, "fp32")
    assert (states.weights, states.gradients, states.optimizer) == (4000, 40, 80)
    states = cost_zero.zero_states(adapters, 4, 3, "bf16")
    assert (states.weights, states.gradients, states.optimizer) == (500, 6, 36)  # rounded up
    assert cost_zero.replicated_states(adapters, 1).gpu == 4000 + 40 + 80
    assert cost_zero.replicated_states(adapters, 2).gpu == 4000 + 80 + 80


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_zero_states_agree_with_deepspeed_s_estimates(gpus):
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="no deepspeed")
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    size, largest, extra = LLAMA.parameters, LLAMA.largest, 1.5

    def ours(stage, *offload):
        return cost_zero.zero_states(LLAMA, gpus, stage, "bf16", frozenset(offload))

    # Its 18 bytes have float32 gradients (4) that the paper's 14 of gradients and optimizer lack.
    _, gpu = stage2.estimate_zero2_model_states_mem_needs(size, gpus, cpu_offload=False)
    assert gpu - ours(2).gpu == pytest.approx(4 * size / gpus, abs=64)
    host, gpu = stage2.estimate_zero2_model_states_mem_needs(size, gpus, cpu_offload=True)
    assert gpu == ours(2, "optimizer").gpu
    # The host's buffers are half as much again; from 5 GPUs on float32 initial weights are more.
    assert host == extra * max(4 * gpus * size, ours(2, "optimizer").host)
    # Stage 3: 18 against 16, and the gathered layer in float32 against the weights' own 2 bytes.
    need = stage3.estimate_zero3_model_states_mem_needs
    _, gpu, _ = need(size, largest, gpus, cpu_offload=False, cpu_offload_params=False)
    assert gpu - ours(3).gpu == pytest.approx(2 * size / gpus + 2 * largest, abs=64)
    host, gpu, _ = need(size, largest, gpus, cpu_offload=True, cpu_offload_params=False)
    assert gpu - ours(3, "optimizer").gpu == pytest.approx(2 * largest, abs=64)
    assert host == extra * ours(3, "optimizer").host
    host, gpu, _ = need(size, largest, gpus, cpu_offload=True, cpu_offload_params=True)
    assert gpu - ours(3, "optimizer", "parameters").gpu == 2 * largest
    assert host == extra * ours(3, "optimizer", "parameters").host


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, {"optimizer"}), (2, {"parameters"}), (3, {"parameters"}), (4, set())]
)
def test_impossible_plans_are_refused(stage, offload):
    with pytest.raises(ValueError, match=f"stage {stage}"):
        cost_zero.zero_states(LLAMA, 8, stage, "bf16", frozenset(offload))


def test_rows_add_up_and_name_the_smallest_card():
    activations = {"plain": 20 * GIB, "checkpointed": 5 * GIB}
    rows = cost_zero.plan_rows(LLAMA, Branch(10**8, 10**8), 8, "bf16", activations)
    for row in rows:
        states = sum(row[name] for name in ("weights", "gradients", "optimizer", "gathered"))
        for kind, size in activations.items():
            assert row["total"][kind] == states + 20 * 10**8 + size
    assert [row["card"]["checkpointed"] for row in rows] == [0, 48, 40, 24, 24, 24, 24]
    assert cost_zero.smallest_card(int(0.9 * 24 * GIB)) == 24
    assert cost_zero.smallest_card(int(0.9 * 24 * GIB) + 1) == 40


# -- the command -----------------------------------------------------------------------------------


def run(*arguments):
    return benchmark.main(["cost", "--config-file", TINY, *map(str, arguments)])


def test_the_report_and_its_json(tmp_path, capsys):
    file = tmp_path / "cost.json"
    words = ["--caption-tokens", 17, "--nouns", 5, "--noun-tokens", 3, "--prompt-tokens", 11]
    status = run(*words, "--entities", 7, "--zero-gpus", 4, "--json", file, "SEED", 1)
    out = capsys.readouterr().out
    assert status == 0 and "next: python tools/train_net.py" in out
    figures = json.loads(file.read_text())
    cfg = tiny_cfg()
    model = cost_parameters.build_on_meta(cfg)
    saved = cost_memory.saved_bytes(model, cfg, LOAD, 3, half=False)
    assert figures["batch"] == 3  # 12 images on 4 GPUs
    assert figures["activations"] == saved["sums"]
    assert sum(x["activations"] for x in figures["parts"].values()) == 2 * saved["sums"]["plain"]
    counted = cost_flops.count_flops(model, cfg, LOAD)
    assert {p: x["flops"] for p, x in figures["parts"].items() if x["flops"]} == {
        **counted["parts"],
        "all": sum(counted["parts"].values()),
    }
    assert figures["language"] == counted["language"]
    assert figures["workload"]["image_tokens"] == IMAGE_TOKENS
    language = sum(p.numel() for p in model.language_decoder.parameters())
    assert figures["zero"][1]["optimizer"] == 8 * -(-language // 4)
    ratio = counted["language"]["one_noun"]["flops"] / counted["language"]["given"]["flops"]
    assert f"{ratio:.2f}" in out and ratio > 1
    for part, size in figures["parts"].items():
        assert f"{size['parameters']:,}" in out, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nouns", "0"], "--nouns is 0"),
        (["--entities", "0"], "--entities is 0"),
        (["--batch", "0"], "--batch is 0"),
        (["--zero-gpus", "0"], "--zero-gpus 0"),
        (["--caption-tokens", "-1"], "--caption-tokens is -1"),
        (["--caption-tokens", "500"], "654 tokens"),
        (["MODEL.FOO", "1"], "MODEL.FOO"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_help_teaches_the_rules(capsys):
    with contextlib.suppress(SystemExit):
        benchmark.main(["cost", "--help"])
    out = capsys.readouterr().out
    for word in ("multiply-add", "Activations", "2 + 2 + 12", "example", "--nouns", "(default 12)"):
        assert word in " ".join(out.split())


def test_a_text_pass_counts_every_token():
    load = replace(LOAD, nouns=2)
    assert cost_passes.text_pass(load, 36) == TextPass(36 + 11 + 17 + 10 + 2 * 5, 20, 2)
