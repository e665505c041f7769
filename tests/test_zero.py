"""The language decoder under ZeRO: two processes against one, at every stage, and users' errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gella.engine.optimizer import split_off
from gella.engine.zero import ZeroHook, read_config

ROOT = Path(__file__).resolve().parents[1]
STAGES = ROOT / "configs" / "zero"
VISION, LANGUAGE = 1e-6, 2e-6  # largest difference of a parameter
CLIP = ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5]  # norms are 1 to 25
TWICE = ["SOLVER.ACCUMULATE", 2]
LEARNED = ["MODEL.MASK_DECODER.QUERIES", "learned", "MODEL.MASK_DECODER.NUM_QUERIES", 5]
FROZEN = ["MODEL.META_ARCHITECTURE", "PartlyFrozenGELLA"]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra zero)"
)
needs_two_processes = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="launch gives each process its own GPU, here is one"
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with a few drawn scenes."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    arguments = ["--output", str(folder / "shapes"), "--train", "30", "--val", "2"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    return folder


def python(scenes, script, *arguments):
    """Run a script with the drawn scenes; returns the finished process."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Folder with the runs of one process and of two: final weights and a report each."""
    folder = tmp_path_factory.mktemp("runs")

    def zero(name, *options, refusing=False, **changes):
        """Options of a run under configs/zero/<name>.json, with parameters really divided."""
        config = json.loads((STAGES / f"{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{name}{len(changes)}.json"
        path.write_text(json.dumps({**config, **changes}))
        options = [*CLIP, *(o for part in options for o in part)]
        return {"options": [*options, "SOLVER.ZERO.CONFIG", str(path)], "refusing": refusing}

    one = {
        "one": {"options": CLIP},
        "one learned": {"options": [*CLIP, *LEARNED]},
        "one frozen": {"options": [*CLIP, *FROZEN]},
        "one refusing": {"options": [*CLIP, *TWICE], "refusing": True},
        "one accumulating": {"options": [*CLIP, *TWICE]},
    }
    two = {
        "plain": {"options": CLIP},
        "plain accumulating": {"options": [*CLIP, *TWICE, *LEARNED]},
        "bf16": zero("stage2", bf16={"enabled": True}),
    }
    for stage in "0123":
        two[f"stage {stage}"] = zero(f"stage{stage}")
        two[f"stage {stage} accumulating"] = zero(f"stage{stage}", TWICE)
        two[f"stage {stage} refusing"] = zero(f"stage{stage}", TWICE, refusing=True)
    for stage in "23":
        two[f"stage {stage} offload"] = zero(f"stage{stage}_offload", TWICE)
        two[f"stage {stage} frozen"] = zero(f"stage{stage}", FROZEN)
    tokenizer = str(scenes / "shapes" / "tokenizer")
    spec = json.dumps([one, two, tokenizer, str(folder)])
    process = python(scenes, Path(__file__).with_name("zero_runs.py"), spec)
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


def weights(folder, name):
    return torch.load(folder / name / "model_final.pth", weights_only=True)["model"]


def report(folder, name):
    return json.loads((folder / name / "report.json").read_text())


def differences(found, expected):
    """Largest difference of vision and of language parameters.

    Left out are batch statistics, and biases in front of a norm, whose gradient is 0 but for
    rounding, which Adam makes steps of.
    """
    assert found.keys() == expected.keys()
    largest = {"vision": 0.0, "language": 0.0}
    for name, value in expected.items():
        if any(part in name for part in ("running_", "num_batches", "lateral.0.bias")):
            continue
        side = "language" if name.startswith("language_decoder.") else "vision"
        largest[side] = max(largest[side], float((found[name] - value).abs().max()))
    return largest["vision"], largest["language"]


PARITY = [
    ("plain", "one"),
    ("plain accumulating", "one learned"),
    ("one accumulating", "one"),
    *((f"stage {s}", "one") for s in "0123"),
    *((f"stage {s} accumulating", "one") for s in "0123"),
    *((f"stage {s} refusing", "one refusing") for s in "0123"),
    *((f"stage {s} offload", "one") for s in "23"),
    *((f"stage {s} frozen", "one frozen") for s in "23"),
]


@needs_deepspeed
@needs_two_processes
@pytest.mark.parametrize(("name", "reference"), PARITY, ids=[name for name, _ in PARITY])
def test_two_processes_give_what_one_gives(runs, name, reference):
    """After three steps of all tasks, every one of them clipped, on the same joined batches."""
    vision, language = differences(weights(runs, name), weights(runs, reference))
    assert vision < VISION and language < LANGUAGE
    found, expected = report(runs, name)["rows"], report(runs, reference)["rows"]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        keys = [k for k in theirs if k.startswith(("loss", "total_loss", "grad_norm", "lr"))]
        assert len(keys) > 8 or "refusing" in name
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@needs_deepspeed
@needs_two_processes
def test_the_comparison_is_able_to_fail(runs):
    """Steps are large against the tolerance, clipping bites, and every task was there."""
    vision, language = differences(weights(runs, "one refusing"), weights(runs, "one"))
    assert vision > 1000 * VISION and language > 1000 * LANGUAGE
    rows = report(runs, "one")["rows"]
    assert min(row["grad_norm"] for row in rows) > 2 * CLIP[1]
    for row in rows:
        squares = row["grad_norm_language"] ** 2 + row["grad_norm_vision"] ** 2
        assert row["grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)
        assert row["grad_norm_language"] > 0.1
    assert sum(row["grad_norm_vision"] == 0 for row in rows) < len(rows)
    assert len({row["loss_association"] == 0 for row in rows}) == 2  # describing and another task
    rates = [row["lr"] for row in rows]
    assert len(set(rates)) == len(rows)  # warm-up, then a step


@needs_deepspeed
@needs_two_processes
def test_frozen_parts_stay(runs):
    """With a frozen image encoder and frozen words, which the engine's optimiser does not hold."""
    start, end = (weights(runs, n) for n in ("one frozen", "stage 3 frozen"))
    names = [n for n in start if n.startswith("image_encoder.") or "embed_tokens" in n]
    assert names and all(torch.equal(start[n], end[n]) for n in names)


@needs_deepspeed
@needs_two_processes
def test_stage_3_divides_the_parameters_and_bf16_halves_them(runs):
    assert report(runs, "stage 2")["shares"] == 1.0
    assert report(runs, "stage 3")["shares"] == pytest.approx(0.5, abs=0.01)
    found = report(runs, "bf16")
    assert found["dtype"] == "torch.bfloat16"
    assert found["buffers"] == ["torch.float32"]  # rotary frequencies do not survive bf16


@needs_deepspeed
@needs_two_processes
def test_bf16_moves_the_weights_the_way_float32_does(runs):
    """Saved are the float32 weights that the optimiser steps, not their bf16 copies."""
    exact, found = weights(runs, "one"), weights(runs, "bf16")
    assert {v.dtype for v in found.values() if v.is_floating_point()} == {torch.float32}
    names = [n for n in exact if n.startswith("language_decoder.")]
    joined = [torch.cat([w[n].flatten() for n in names]) for w in (exact, found)]
    assert 1e-6 < float((joined[0] - joined[1]).abs().mean()) < 1e-3
    assert not torch.equal(joined[1], joined[1].bfloat16().float())
    for ours, theirs in zip(report(runs, "bf16")["rows"], report(runs, "one")["rows"]):
        assert ours["grad_norm_language"] == pytest.approx(theirs["grad_norm_language"], rel=0.05)
        assert ours["total_loss"] == pytest.approx(theirs["total_loss"], rel=0.01)


@needs_deepspeed
def test_rates_follow_the_trainer_s_groups_also_after_a_resume():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    groups = [
        {"params": list(model[name].parameters()), "role": role, "name": role}
        for name, role in (("a", "vision"), ("b", "language"))
    ]
    whole = torch.optim.AdamW(groups, lr=1.0)
    language, sources = split_off(whole, "language")
    hook = ZeroHook(model, "b", language, sources, {})
    hook.trainer = SimpleNamespace(optimizer=whole)
    with pytest.raises(RuntimeError, match="when the training starts"):
        hook.before_step()
    hook._branch = SimpleNamespace(engine=SimpleNamespace(optimizer=language))
    whole.load_state_dict(whole.state_dict())  # which replaces the groups
    whole.param_groups[1]["lr"] = 0.25
    hook.before_step()
    assert [group["lr"] for group in language.param_groups] == [0.25]
    assert [group["lr"] for group in whole.param_groups] == [1.0, 0.25]


# -- the script ------------------------------------------------------------------------------------

PLUGIN = """
import gella.engine.trainer
build = gella.engine.trainer.build_optimizer

def steady(cfg, model):
    optimizer = build(cfg, model)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    return optimizer

gella.engine.trainer.build_optimizer = steady
"""


def train_net(scenes, output, *options):
    """Run the script on the model of `zero_runs`; options with -- come first."""
    sys.path.insert(0, str(Path(__file__).parent))
    import zero_runs

    (output / "plugin.py").write_text(PLUGIN)
    modules = [str(Path(__file__).with_name("zero_runs.py")), str(output / "plugin.py")]
    keys = [
        *zero_runs.SMALL,
        *("MODEL.META_ARCHITECTURE", "SteadyGELLA", "DATASETS.MODULES", modules),
        *("MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer", "OUTPUT_DIR", output),
        *("DATALOADER.TASK_RATIOS", zero_runs.RATIOS, "SEED", zero_runs.seed_of_all_tasks()),
        *CLIP,
    ]
    flags = [o for o in options if str(o).startswith("--") or o in ("2", "auto")]
    rest = [o for o in options if o not in flags]
    config = ROOT / "configs" / "gella_tiny_shapes.yaml"
    script = ROOT / "tools" / "train_net.py"
    return python(scenes, script, "--config-file", config, *flags, *keys, *rest)


@needs_deepspeed
@needs_two_processes
def test_the_script_trains_two_processes_like_one(scenes, tmp_path):
    """One process makes its own process group; without ZeRO it is the reference."""
    runs = {
        "one": [],
        "two": [
            "--num-gpus",
            "2",
            "--dist-url",
            "auto",
            "SOLVER.ZERO.CONFIG",
            STAGES / "stage3.json",
        ],
        "alone": ["SOLVER.ZERO.CONFIG", STAGES / "stage2.json", *TWICE],
    }
    for name, options in runs.items():
        (tmp_path / name).mkdir()
        process = train_net(scenes, tmp_path / name, *options)
        assert process.returncode == 0, process.stderr[-3000:]
        assert f"Weights:  {tmp_path / name}/model_final.pth" in process.stdout
        log = (tmp_path / name / "log.txt").read_text()
        assert ("language_decoder is under DeepSpeed" in log) == (name != "one")
    for name in ("two", "alone"):
        vision, language = differences(weights(tmp_path, name), weights(tmp_path, "one"))
        assert vision < VISION and language < LANGUAGE
    lines = (tmp_path / "two" / "metrics.json").read_text().splitlines()
    assert {"grad_norm", "grad_norm_language", "grad_norm_vision"} <= json.loads(lines[0]).keys()


@needs_deepspeed
def test_the_script_names_a_wrong_file(scenes, tmp_path):
    process = train_net(scenes, tmp_path, "SOLVER.ZERO.CONFIG", tmp_path / "absent.json")
    assert process.returncode == 2
    (line,) = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
    assert f"{tmp_path}/absent.json does not exist" in line


# -- DeepSpeed's file ------------------------------------------------------------------------------


def write(tmp_path, content):
    path = tmp_path / "z.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("path", sorted(STAGES.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_files_of_the_project(path, bf16):
    config = read_config(str(path), micro_batch=3, accumulate=4, bf16=bf16)
    stage = config["zero_optimization"]["stage"]
    assert path.stem.startswith(f"stage{stage}")
    section = "torch_autocast" if stage == 0 else "bf16"
    assert config[section]["enabled"] is bf16
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default clips one side
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device")
    assert offload == ("cpu" if "offload" in path.stem else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "z.json is not a JSON"),
        ([], 'lacks "zero_optimization"'),
        ({"zero_optimization": {}}, 'lacks "zero_optimization"'),
        ({"zero_optimization": {"stage": 4}}, "stage is 4, not 0 to 3"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1}, "CLIP_GRADIENTS instead"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, "set SOLVER.OPTIMIZER instead"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "use bf16"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "use torch_autocast"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param goes to 'cpu'",
        ),
    ],
)
def test_what_the_file_must_not_hold(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, content))


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ImportError, match=r"pip install 'gella\[zero\]'"):
        ZeroHook(model, "x", torch.optim.AdamW(model.parameters()), [], {})
