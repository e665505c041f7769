"""The benchmark's command line; its counted cost equals real runs, formulas, published figures."""

from __future__ import annotations

import copy
import functools
import json
import weakref
from pathlib import Path

import benchmark
import cost
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch._subclasses.fake_tensor import FakeTensorMode

from gella import load_config
from gella.engine import memory
from gella.engine.memory import GIB, Branch, Workload, plan_rows, zero_states
from gella.entities.entity_map import EntityMap

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
PAPER = str(ROOT / "configs" / "gella_swin_t.yaml")
LOAD = Workload(caption_tokens=17, nouns=5, noun_tokens=3, prompt_tokens=11, entities=7)
IMAGE_TOKENS = 36
MODULES = {part: path for part, path in cost.PARTS if part != "language decoder"}


def tiny_cfg(*opts):
    return load_config(TINY, list(opts))


def mapped(load, seed):
    """A mapped dict with the token, noun and entity counts of a workload; values at random."""
    rng = np.random.default_rng(seed)
    ids = np.arange(96 * 96, dtype=np.int32).reshape(96, 96) // 900 % load.entities + 1
    entities = EntityMap(ids, list(range(1, load.entities + 1)))
    length = load.length(IMAGE_TOKENS)
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


# -- parameters and FLOPs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper():
    """The paper's config and model on the meta device."""
    cfg = load_config(PAPER)
    return cfg, memory.build_on_meta(cfg)


def test_the_paper_s_model_has_the_published_sizes(paper):
    cfg, model = paper
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sizes = cost.part_sizes(model)
    # LLaMA-7B from its architecture: embedding and output, 32 blocks, the final norm
    width, inner = 4096, 11008
    block = 4 * width * width + 3 * width * inner + 2 * width
    llama = 2 * 32000 * width + 32 * block + width
    assert llama == 6_738_415_616
    assert sizes["language decoder"] == (llama + 2 * width,) * 2  # <SEG>
    # ViT-L/14 at 336: patches, class and position embeddings, first norm, 24 blocks
    width = 1024
    block = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    tower = 3 * 14 * 14 * width + width + (24 * 24 + 1) * width + 2 * width + 24 * block
    assert sizes["image encoder"] == (tower, 0)  # frozen
    assert tower + 2 * width + width * 768 == 304_293_888
    total = sum(p.numel() for p in model.parameters())
    assert sizes["all"][0] == total
    assert sum(count for part, (count, _) in sizes.items() if part != "all") == total
    assert cost.zero_branches(model)[0].largest == 32001 * 4096
    compared = cost.compare_published(cfg, sizes)
    assert [item["ours"] - item["parameters"] for item in compared] == [0, 0]
    text = cost.published_table(compared)
    assert text.count("equal") == 2 and "differs" not in text
    assert "6,738,415,616" in text and "304,293,888" in text
    compared[0]["ours"] += 7
    assert "differs by +7" in cost.published_table(compared)
    other = cfg.clone()
    other.MODEL.LANGUAGE.VOCAB_SIZE = 32003  # added words are taken off before comparing
    assert cost.compare_published(other, sizes)[0]["ours"] == llama - 2 * 2 * 4096
    assert cost.compare_published(tiny_cfg(), sizes) == [] and cost.published_table([]) == ""


def test_counting_takes_shared_parameters_once():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert memory.count_parameters(torch.nn.ModuleList([layer, layer])) == (8, 6)


@pytest.mark.parametrize("queries", ["entity", "learned"])
def test_flops_without_data_are_those_of_a_real_run_part_by_part(queries):
    cfg = tiny_cfg("MODEL.MASK_DECODER.QUERIES", queries)
    cfg.MODEL.GELLA.ENTITY_SCORE_THRESHOLD = -1.0  # every query takes part in the association
    real = build_model(cfg)
    with cost.counting(real), cost.counter() as count:
        real([mapped(LOAD, 0)])
    run = {name: sum(flops.values()) for name, flops in count.get_flop_counts().items()}
    expected = {part: run[f"GELLA.{path}"] for part, path in MODULES.items()}
    words = real.language_decoder.llama.get_output_embeddings().weight.numel()
    # Inference over given nouns leaves the answer's word logits out; what is counted has them.
    logits = 2 * LOAD.answer * words
    expected["language decoder"] = run["GELLA.language_decoder"] - expected["projector"] + logits
    counted = cost.count_flops(memory.build_on_meta(cfg), cfg, LOAD)
    assert counted["parts"] == expected
    assert min(expected.values()) > 0
    assert torch.backends.mha.get_fastpath_enabled()


def llama_flops(length, logits, angles=0):
    """2 FLOPs for each weight and token, two products of queries with keys and values, and what the
    angles of a position take."""
    width, inner, words, layers = 4096, 11008, 32001, 2
    linear = layers * (4 * width * width + 3 * width * inner)
    products, said = 4 * layers * width * length**2, 2 * logits * width * words
    return (2 * linear + angles) * length + products + said


def test_the_language_decoder_and_clip_cost_what_their_formulas_say():
    cfg = load_config(PAPER, ["MODEL.LANGUAGE.NUM_LAYERS", "2"])
    counted = cost.count_flops(memory.build_on_meta(cfg), cfg, Workload())
    length, projector = 576 + 60 + 60 + 58, 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert Workload().answer == 10 + 12 * 4
    assert counted["parts"]["projector"] == projector
    angles = (counted["parts"]["language decoder"] - llama_flops(length, 58)) / length
    assert angles in (0, 2 * 64)  # older versions of transformers multiply matrices for 64 pairs
    llama = functools.partial(llama_flops, angles=angles)
    ways = {way: x["flops"] for way, x in counted["language"].items()}
    assert ways["given"] == projector + llama(length, 58)
    steps = sum(llama(1, 1) + 4 * 2 * 4096 * (cached - 1) for cached in range(697, length))
    assert ways["generated"] - ways["given"] == projector + llama(696, 1) + steps
    assert ways["one_noun"] == 12 * (projector + llama(576 + 120 + 14, 14))
    assert ways["noun_alone"] == 12 * (projector + llama(576 + 62 + 14, 14))
    for rule in (1, 2):
        tokens = counted["implied_tokens"][str(rule)]
        around = [projector + llama(tokens + more, 0) for more in (-1, 1)]
        assert around[0] < 11_987e9 * 2 / rule < around[1]
    rows = counted["table_12"]
    assert rows["ours, nouns given"][0] == ways["given"]
    assert rows["ours, nouns given"][3] == sum(counted["parts"].values())
    assert rows["ours, a pass per noun"][1:3] == rows["ours, nouns given"][1:3]
    width, tokens = 1024, 577
    blocks = 24 * (24 * width * width * tokens + 4 * width * tokens**2)
    clip = counted["parts"]["image encoder"]
    assert clip == blocks + 2 * 576 * width * 3 * 14 * 14
    assert clip / 2e9 == pytest.approx(191.0, abs=0.1)  # as usually cited


def test_sampling_counts_four_multiply_adds_a_value():
    with cost.counter() as count:
        torch.nn.functional.grid_sample(
            torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 6, 2), align_corners=False
        )
    assert count.get_total_flops() == 2 * 3 * 4 * 6 * 8


def test_shared_tensors_stay_shared_and_nothing_is_allocated():
    model = memory.build_on_meta(tiny_cfg())
    llama = model.language_decoder.llama
    before = {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()}
    with FakeTensorMode():
        memory.make_fake(model, torch.bfloat16)
    assert llama.get_input_embeddings().weight is llama.get_output_embeddings().weight
    assert {n: (p.shape, p.requires_grad) for n, p in model.named_parameters()} == before
    floats = {b.dtype for b in model.buffers() if b.is_floating_point()}
    assert {p.dtype for p in model.parameters()} | floats == {torch.bfloat16}


# -- activations -----------------------------------------------------------------------------------


class Saved:
    """A tensor that autograd holds; gone with the part of the graph that holds it."""

    def __init__(self, part, tensor):
        self.part, self.tensor = part, tensor


class Kept:
    """A plain record of what autograd still holds when the step's losses are there."""

    def __init__(self, model):
        self.stack, self.saved = ["losses"], []
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
        self.saved.append(weakref.ref(saved))
        return saved

    def bytes(self):
        sizes, seen = {}, set()
        for saved in [reference() for reference in self.saved]:
            storage = saved and saved.tensor.untyped_storage()
            if saved and storage.data_ptr() not in self.own | seen:
                seen.add(storage.data_ptr())
                sizes[saved.part] = sizes.get(saved.part, 0) + storage.nbytes()
        return sizes


@pytest.mark.parametrize(("queries", "half"), [("entity", True), ("learned", False)])
def test_activations_without_data_are_those_of_a_real_step(queries, half):
    opts = ("MODEL.MASK_DECODER.QUERIES", queries)
    cfg = tiny_cfg(*opts)
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
    # Both ways are told, whatever the config says of checkpointing.
    cfg = tiny_cfg(*opts, "MODEL.LANGUAGE.GRADIENT_CHECKPOINTING", half)
    counted = memory.saved_bytes(memory.build_on_meta(cfg), cfg, LOAD, 2, half)
    parts = dict(counted["parts"])
    # Indices of supervised tokens: a bool per token there, two numbers per answer token here.
    assert parts.pop("losses") == pytest.approx(expected.pop("losses"), rel=0.02)
    # In bfloat16 a norm's statistics are float32; fake tensors make them bfloat16.
    assert parts == (pytest.approx(expected, rel=0.01) if half else expected)
    inputs = 4 * 2 * LOAD.length(IMAGE_TOKENS) * 128 * (2 if half else 4)
    spared = counted["sums"]["plain"] - counted["sums"]["checkpointed"]
    assert spared == sum(blocks[:-1]) - inputs > 0


# -- ZeRO ------------------------------------------------------------------------------------------

LLAMA = Branch(parameters=6_759_403_520, trained=6_759_403_520, largest=32_001 * 4096)


def on_gpu(states):
    return sum(states.values()) - states["host"]


def test_zero_states_follow_the_paper_s_figure():
    psi, gpus = 7_500_000_000, 64  # figure 1 of the ZeRO paper, decimal GB
    figure = [on_gpu(zero_states(Branch(psi, psi), gpus, stage)) / 1e9 for stage in range(4)]
    assert figure == pytest.approx([120.0, 31.4, 16.6, 1.9], abs=0.05)


def test_float32_keeps_no_second_copy_and_frozen_weights_have_no_states():
    adapters = Branch(parameters=1000, trained=10)
    assert [*zero_states(adapters, 4, 0, "fp32").values()] == [4000, 40, 80, 0, 0]
    assert [*zero_states(adapters, 4, 3, "bf16").values()] == [
        500,
        6,
        36,
        0,
        0,
    ]  # rounded up
    for gpus, rest in ((1, 4000 + 40 + 80), (2, 4000 + 80 + 80)):
        assert {row["rest"] for row in plan_rows(LLAMA, adapters, gpus, "bf16", {})} == {rest}


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_zero_states_differ_from_deepspeed_s_estimates_as_is_known(gpus):
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="no deepspeed")
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    size, largest, extra = LLAMA.parameters, LLAMA.largest, 1.5

    def ours(stage, *offload):
        states = zero_states(LLAMA, gpus, stage, "bf16", offload)
        return on_gpu(states), states["host"]

    # Its 18 bytes have float32 gradients (4) that the paper's 14 of gradients and optimizer lack.
    _, gpu = stage2.estimate_zero2_model_states_mem_needs(size, gpus, cpu_offload=False)
    assert gpu - ours(2)[0] == pytest.approx(4 * size / gpus, abs=64)
    host, gpu = stage2.estimate_zero2_model_states_mem_needs(size, gpus, cpu_offload=True)
    assert gpu == ours(2, "optimizer")[0]
    # The host's buffers are half as much again; from 5 GPUs on float32 initial weights are more.
    assert host == extra * max(4 * gpus * size, ours(2, "optimizer")[1])
    # Stage 3: 18 against 16, and the gathered layer in float32 against the weights' own 2 bytes.
    need = stage3.estimate_zero3_model_states_mem_needs
    _, gpu, _ = need(size, largest, gpus, cpu_offload=False, cpu_offload_params=False)
    assert gpu - ours(3)[0] == pytest.approx(2 * size / gpus + 2 * largest, abs=64)
    for offload in (["optimizer"], ["optimizer", "parameters"]):
        parameters = "parameters" in offload
        host, gpu, _ = need(size, largest, gpus, cpu_offload=True, cpu_offload_params=parameters)
        states = ours(3, *offload)
        assert gpu - states[0] == pytest.approx(2 * largest, abs=64)
        assert host == extra * (states[1] - 2 * size)  # the gradient that is kept twice


def test_rows_add_up_and_name_the_smallest_card():
    activations = {"plain": 20 * GIB, "checkpointed": 5 * GIB}
    rows = plan_rows(LLAMA, Branch(10**8, 10**8), 8, "bf16", activations)
    for row in rows:
        states = sum(row[name] for name in ("weights", "gradients", "optimizer", "gathered"))
        for kind, size in activations.items():
            assert row["total"][kind] == states + 20 * 10**8 + size
    assert [row["card"]["checkpointed"] for row in rows] == [0, 48, 40, 24, 24, 24, 24]
    room = int(0.9 * 24 * GIB)
    for size, card in ((room, 24), (room + 1, 40)):
        row = plan_rows(Branch(0, 0), Branch(0, 0), 8, "bf16", {"plain": size})[0]
        assert row["card"]["plain"] == card


@pytest.mark.parametrize(
    ("file", "checkpointing", "overrides"),
    [
        ("stage2", True, ""),  # 26.5 GiB of states and 5 of activations
        ("", True, " SOLVER.ZERO.CONFIG configs/zero/stage2.json"),
        ("", False, " MODEL.LANGUAGE.GRADIENT_CHECKPOINTING True SOLVER.ZERO.CONFIG"),
    ],
)
def test_the_first_plan_that_fits(file, checkpointing, overrides):
    cfg = load_config(PAPER, ["MODEL.LANGUAGE.GRADIENT_CHECKPOINTING", str(checkpointing)])
    cfg.SOLVER.ZERO.CONFIG = file and f"{ROOT}/configs/zero/{file}.json"
    activations = {"plain": 60 * GIB, "checkpointed": 5 * GIB}
    made = memory.plans(cfg, LLAMA, Branch(10**8, 10**8), 8, activations)
    fitting = next(plan for plan in made if plan.gpu <= 0.9 * 80 * GIB)
    assert fitting.overrides.startswith(overrides) and bool(fitting.overrides) == bool(overrides)
    assert made[-1].host > 0 == made[1].host and made[-1].gpu < made[1].gpu


def test_the_longest_prompts_of_the_paper_s_datasets():
    loads = memory.longest_prompts(load_config(PAPER, ["INPUT.GELLA.PANOPTIC_NEGATIVES", "20"]))
    tokens = {name: load.length(576) for name, load in loads.items()}
    assert tokens == {
        "gella_coco_png_train2017": 576 + 60 + 250 + 10 + 30 * 5,
        "gella_coco_panoptic_train2017": 576 + 60 + 50 * 4 + 10 + 50 * 5,
        "gella_entityseg_captions_train": 576 + 60 + 300 + 10 + 30 * 5,
    }
    every = load_config(PAPER, ["INPUT.GELLA.PANOPTIC_NEGATIVES", "-1"])
    assert memory.longest_prompts(every)["gella_coco_panoptic_train2017"].nouns == 133
    every.MODEL.LANGUAGE.MAX_POSITIONS = 1000
    cut = memory.longest_prompts(every)["gella_coco_panoptic_train2017"]
    assert cut.length(576) <= 1000 and cut.nouns == 33


# -- the command -----------------------------------------------------------------------------------


def run(*arguments):
    return benchmark.main(["cost", "--config-file", TINY, *map(str, arguments)])


def test_the_report_and_its_json(tmp_path, capsys, monkeypatch):
    calls = {}

    def record(name, made):
        def recorded(*args, **options):
            result = made(*args, **options)
            calls.setdefault(name, (args[2:], copy.deepcopy(result)))  # the longest prompts follow
            return result

        monkeypatch.setattr(cost, name, recorded)

    record("saved_bytes", cost.saved_bytes)
    record("count_flops", cost.count_flops)
    file = tmp_path / "cost.json"
    words = ["--caption-tokens", 17, "--nouns", 5, "--noun-tokens", 3, "--prompt-tokens", 11]
    status = run(*words, "--entities", 7, "--zero-gpus", 4, "--json", file, "SEED", 1)
    out = capsys.readouterr().out
    assert status == 0 and "next: python tools/train_net.py" in out
    figures = json.loads(file.read_text())
    model = memory.build_on_meta(tiny_cfg())
    (given, saved), (load, counted) = calls["saved_bytes"], calls["count_flops"]
    assert given == (LOAD, 3) and load == (LOAD,)
    assert figures["batch"] == 3  # 12 images on 4 GPUs
    assert figures["activations"] == saved["sums"]
    assert sum(x["activations"] for x in figures["parts"].values()) == 2 * saved["sums"]["plain"]
    flops = {part: x["flops"] for part, x in figures["parts"].items() if x["flops"]}
    assert flops == {**counted["parts"], "all": sum(counted["parts"].values())}
    assert figures["language"] == counted["language"]
    assert figures["workload"]["image_tokens"] == IMAGE_TOKENS
    language = sum(p.numel() for p in model.language_decoder.parameters())
    assert figures["zero"][1]["optimizer"] == 8 * -(-language // 4)
    assert figures["training"]["iterations"] == 2600 and figures["training"]["days"] > 0
    assert set(figures["training"]["longest"]) == set(load_config(TINY).DATASETS.TRAIN)
    ratio = counted["language"]["one_noun"]["flops"] / counted["language"]["given"]["flops"]
    assert f"{ratio:.2f}" in out and ratio > 1
    for part, size in figures["parts"].items():
        assert f"{size['parameters']:,}" in out, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--config-file", "absent.yaml"], "absent.yaml"),
        (["data", "--images", "1"], "--images"),
        *(
            (["cost", "--config-file", TINY, *words.split()], message)
            for words, message in (
                ("--nouns 0", "--nouns is 0"),
                ("--entities 0", "--entities is 0"),
                ("--batch 0", "--batch is 0"),
                ("--zero-gpus 0", "--zero-gpus is 0"),
                ("--caption-tokens -1", "--caption-tokens is -1"),
                ("--caption-tokens 500", "654 tokens"),
                ("MODEL.FOO 1", "MODEL.FOO"),
            )
        ),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_help_names_the_modes_and_teaches_the_rules(capsys):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["speed"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert all(mode in error for mode in benchmark.MODES)
    for arguments, words in (
        (["--help"], benchmark.MODES),
        (["cost", "--help"], ("multiply-add", "Activations", "2 + 2 + 12", "example", "--nouns")),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in words)
