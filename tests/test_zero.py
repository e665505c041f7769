"""The language decoder under ZeRO: one process's training, exact resumes, one error per damage.

All runs of several processes are made once, by `zero_runs.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_checkpoint import Payload
from toy_run import CONFIG, ROOT, SCRIPT, SMALL

from gella.engine.optimizer import split_language
from gella.engine.zero import ZeroHook, read_config
from gella.engine.zero_checkpoint import (
    check_readable,
    current_digests,
    layout_changes,
    load_engine,
    part_layout,
    sample_weights,
)
from gella.weights.checkpoint import check_sample, consolidate

STAGES = ROOT / "configs" / "zero"
SAVED = "checkpoints/iter_0000001"
VISION, LANGUAGE = 4e-6, 2e-6  # largest difference of a parameter; heads step 3 times as far
# Norms are 1 to 25; the two sides' limits differ.
CLIP = ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.CLIP_GRADIENTS.LANGUAGE_VALUE", 0.25]
CLIP += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "per_side"]
TWICE = ["SOLVER.ACCUMULATE", 2]
LEARNED = ["MODEL.MASK_DECODER.QUERIES", "learned", "MODEL.MASK_DECODER.NUM_QUERIES", 5]
FROZEN = ["MODEL.META_ARCHITECTURE", "PartlyFrozenGELLA"]

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extra zero)"
)
needs_two_processes = pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="launch gives each process its own GPU, here is one"
)


def together(test):
    """Marks of what looks at the runs of several processes."""
    return needs_deepspeed(needs_two_processes(test))


def python(scenes, *command):
    """Run Python with the drawn scenes; returns what it printed on stdout and stderr."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(scenes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """Folder of all runs, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("runs")

    def plain(name, *options, start="", **more):
        options = [*CLIP, *(o for part in options for o in part)]
        return {"name": name, "options": options, **more, **({"from": start} if start else {})}

    def zero(name, stage, *options, start="", refusing=False, **changes):
        """A run under configs/zero/stage<stage>.json, with parameters really divided."""
        config = json.loads((STAGES / f"stage{stage}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"stage{stage}{len(changes)}.json"
        path.write_text(json.dumps({**config, **changes}))
        options = [*options, ["SOLVER.ZERO.CONFIG", str(path)]]
        return plain(name, *options, start=start, refusing=refusing)

    half = {"bf16": {"enabled": True}}
    one = [
        plain("one"),
        plain("one on", start="one"),
        plain("one learned", LEARNED),
        plain("one frozen", FROZEN),
        plain("one refusing", TWICE, refusing=True),
        plain("one accumulating", TWICE),
    ]
    given = ["MODEL.WEIGHTS", str(folder / "one" / "start.pth")]
    two = [plain("plain", start=""), plain("plain accumulating", TWICE, LEARNED)]
    two += [plain("plain given", given), zero("stage 2 given", 2, given)]
    for stage in "012":
        two.append(zero(f"stage {stage}", stage))
        two.append(zero(f"stage {stage} refusing", stage, TWICE, refusing=True))
    two += [
        zero("stage 0 on", 0, start="stage 0"),
        zero("stage 2 on", 2, start="stage 2"),
        zero("stage 2 offload", "2_offload", TWICE),
        zero("stage 1 frozen", 1, FROZEN),
        zero("2 half", 2, **half),
        # 3 last: it leaves another linear layer behind in torch
        zero("stage 3", 3),
        zero("stage 3 on", 3, start="stage 3"),
        zero("stage 3 given", 3, given),
        zero("stage 3 shown", 3, ["VIS_PERIOD", 1]),
        zero("stage 3 refusing", 3, TWICE, refusing=True),
        zero("stage 3 offload", "3_offload", TWICE),
        zero("stage 3 frozen", 3, FROZEN),
        zero("1 frozen -> 3", 3, FROZEN, start="stage 1 frozen"),
        zero("2 half -> 3", 3, start="2 half", **half),
        zero("2 -> 3", 3, start="stage 2"),
        zero("3 -> 2", 2, start="stage 3"),
        zero("plain -> 2", 2, start="one"),
    ]
    back = [
        zero("stage 2 alone", 2, TWICE),  # one process makes its own group
        zero("2, two -> one", 2, start="stage 2"),
        plain("2, two -> plain", start="stage 2"),
    ]
    tokenizer = str(scenes / "shapes" / "tokenizer")
    spec = json.dumps([tokenizer, str(folder), [[1, one], [2, two], [1, back]]])
    process = python(scenes, Path(__file__).with_name("zero_runs.py"), spec)
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


def weights(folder, run, name="model_final"):
    """The whole weights that a run kept."""
    loaded = torch.load(folder / run / f"{name}.pth", weights_only=True)
    return loaded.get("model", loaded)


def unequal(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


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
    ("stage 2 alone", "one"),
    *((f"stage {s}", "one") for s in "0123"),
    *((f"stage {s} refusing", "one refusing") for s in "0123"),
    *((f"stage {s} offload", "one") for s in "23"),
    *((f"stage {s} frozen", "one frozen") for s in "13"),
    *((f"{name} given", "one") for name in ("plain", "stage 2", "stage 3")),
]


@together
@pytest.mark.parametrize(("name", "reference"), PARITY, ids=[name for name, _ in PARITY])
def test_two_processes_give_what_one_gives(runs, name, reference):
    """After four steps of all tasks, every one of them clipped, on the same joined batches."""
    vision, language = differences(weights(runs, name), weights(runs, reference))
    assert vision < VISION and language < LANGUAGE
    found, expected = report(runs, name)["rows"], report(runs, reference)["rows"]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        keys = [k for k in theirs if k.startswith(("loss", "total_loss", "grad_norm", "lr"))]
        assert len(keys) > 8 or "refusing" in name
        for key in keys:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key


@together
@pytest.mark.parametrize("name", ["plain given", "stage 3 given", "stage 3 on", "2 half -> 3"])
def test_what_is_loaded_is_not_initialised_before(runs, name):
    """The decoder has no memory until its weights come; without weights it is built at once."""
    assert report(runs, name)["empty"] == 1 and report(runs, "stage 3")["empty"] == 0


@together
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
    assert len(set(rates)) == len(rows) - 1  # warm-up, then a step


@together
def test_frozen_parts_stay(runs):
    """With a frozen image encoder and frozen words, which the engine's optimiser does not hold."""
    start, end = (weights(runs, n) for n in ("one frozen", "stage 3 frozen"))
    names = [n for n in start if n.startswith("image_encoder.") or "embed_tokens" in n]
    assert names and all(torch.equal(start[n], end[n]) for n in names)


@together
def test_stage_3_divides_the_parameters_and_bf16_halves_them(runs):
    assert report(runs, "stage 2")["shares"] == 1.0
    for name in ("stage 3", "stage 3 given"):
        assert report(runs, name)["shares"] == pytest.approx(0.5, abs=0.01)
    found = report(runs, "2 half")
    assert found["dtype"] == "torch.bfloat16"
    assert found["buffers"] == ["torch.float32"]  # rotary frequencies do not survive bf16


@together
def test_bf16_moves_the_weights_the_way_float32_does(runs):
    """Saved are the float32 weights that the optimiser steps, not their bf16 copies."""
    exact, found = weights(runs, "one"), weights(runs, "2 half")
    assert {v.dtype for v in found.values() if v.is_floating_point()} == {torch.float32}
    names = [n for n in exact if n.startswith("language_decoder.")]
    joined = [torch.cat([w[n].flatten() for n in names]) for w in (exact, found)]
    assert 1e-6 < float((joined[0] - joined[1]).abs().mean()) < 1e-3
    assert not torch.equal(joined[1], joined[1].bfloat16().float())
    for ours, theirs in zip(report(runs, "2 half")["rows"], report(runs, "one")["rows"]):
        assert ours["grad_norm_language"] == pytest.approx(theirs["grad_norm_language"], rel=0.05)
        assert ours["total_loss"] == pytest.approx(theirs["total_loss"], rel=0.01)


@together
def test_a_panel_changes_nothing(runs):
    """All ranks make the pass, since parameters are spread over them; the main one draws."""
    shown, plain = (report(runs, name)["rows"] for name in ("stage 3 shown", "stage 3"))
    for row, other in zip(shown, plain, strict=True):
        keys = [key for key in other if key not in ("max_memory_mib", "images_per_second")]
        assert [key for key in keys if row[key] != other[key]] == []
    assert unequal(weights(runs, "stage 3 shown"), weights(runs, "stage 3")) == []
    assert report(runs, "stage 3 shown")["training"]
    # Detectron2 keeps pictures beside the scalars; the small core has a folder of its own.
    size, shown = (
        sum(file.stat().st_size for file in (runs / name).rglob("events.out.tfevents.*"))
        for name in ("stage 3", "stage 3 shown")
    )
    assert shown > size + 10_000


@together
def test_answers_of_unequal_length(runs):
    """Rank 1's last prompt leaves room for 8 tokens, which limits all answers of that call."""
    for rank, (alone, together) in enumerate([([3, 10], [3, 8]), ([9, 10, 8], [9, 8, 8])]):
        before, after = json.loads((runs / f"answers{rank}.json").read_text())
        assert [len(x) for x in before] == alone and [len(x) for x in after] == together
        assert [x[: len(y)] for x, y in zip(before, after)] == after


# -- going on --------------------------------------------------------------------------------------

CHANGED = {  # from, and what the warning says
    "1 frozen -> 3": ("stage 1 frozen", "stage 1 -> 3"),
    "2 half -> 3": ("2 half", "stage 2 -> 3"),
    "2 -> 3": ("stage 2", "stage 2 -> 3"),
    "3 -> 2": ("stage 3", "stage 3 -> 2"),
    "plain -> 2": ("one", "no ZeRO -> ZeRO"),
    "2, two -> one": ("stage 2", "processes 2 -> 1"),
    "2, two -> plain": ("stage 2", "ZeRO -> no ZeRO"),
}


@together
@pytest.mark.parametrize("name", ["one", "stage 0", "stage 2", "stage 3"])
def test_the_same_layout_goes_on_exactly(runs, name):
    """Weights of the uninterrupted run after two more steps, so optimisers and rates as well."""
    found = report(runs, f"{name} on")
    assert found["start"] == 2 and not [n for n in found["notes"] if "start anew" in n]
    assert unequal(weights(runs, f"{name} on", "start"), weights(runs, name, "middle")) == []
    final = weights(runs, name, "model_final")
    assert unequal(weights(runs, f"{name} on", "model_final"), final) == []
    assert len(unequal(weights(runs, name, "middle"), final)) > 50  # it did train


@together
@pytest.mark.parametrize("name", CHANGED)
def test_another_layout_keeps_the_weights_and_says_that_the_optimiser_restarts(runs, name):
    start, change = CHANGED[name]
    found = report(runs, name)
    assert found["start"] == 2
    (note,) = [n for n in found["notes"] if "start anew" in n]
    assert "language" in note and note.endswith(change)
    middle = weights(runs, start, "middle")
    assert unequal(weights(runs, name, "start"), middle) == []
    assert any(n.startswith("language_decoder.") for n in middle)
    trained = unequal(weights(runs, name, "model_final"), middle)
    assert any(n.startswith("language_decoder.") for n in trained)
    # its own checkpoint is whole as well
    last = consolidate(runs / name / "checkpoints" / "iter_0000003")
    assert unequal(last, weights(runs, name, "model_final")) == []


@together
def test_the_vision_side_s_optimiser_goes_on(runs):
    """After a change of the language side's layout too: its steps are counted on."""
    for name in ("2 -> 3", "plain -> 2", "2, two -> plain"):
        file = runs / name / "checkpoints" / "iter_0000003" / "trainer.pth"
        optimizer = torch.load(file, weights_only=True)["trainer"]["_trainer"]["optimizer"]
        steps = {"vision": set(), "language": set()}
        for group in optimizer["param_groups"]:
            side = "language" if group["role"] == "language" else "vision"
            steps[side] |= {int(optimizer["state"][i]["step"]) for i in group["params"]}
        assert max(steps["vision"]) == 4
        assert steps["language"] == ({2} if name == "2, two -> plain" else set())


@together
@pytest.mark.parametrize("name", ["stage 0", "stage 1 frozen", "2 half", "stage 3"])
def test_a_folder_holds_the_whole_model(runs, name):
    """Whatever the stage; of bf16 training the float32 weights that the optimiser steps."""
    assert unequal(consolidate(runs / name / SAVED), weights(runs, name, "middle")) == []


@together
def test_damaged_files_of_the_part_are_named(runs, tmp_path):
    def damaged(file, change, name="stage 2"):
        copy = tmp_path / name.replace(" ", "")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(runs / name / SAVED, copy)
        change(copy / "language" / "zero" / file)
        return copy

    optimizer = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def noise(path):
        path.write_bytes(b"x" * path.stat().st_size)

    def swap(path):  # the file of another iteration
        other = runs / "stage 2" / "checkpoints" / "iter_0000003" / "language" / "zero" / path.name
        path.write_bytes(other.read_bytes())
        assert path.stat().st_size == other.stat().st_size

    with pytest.raises(ValueError, match=f"not complete: language/zero/{optimizer} is missing"):
        consolidate(damaged(optimizer, lambda path: path.unlink()))
    with pytest.raises(ValueError, match=f"language/zero/{optimizer} has 9 bytes, .* were written"):
        consolidate(damaged(optimizer, lambda path: path.write_bytes(b"too short")))
    with pytest.raises(ValueError, match=f"{optimizer} cannot be read"):
        consolidate(damaged(optimizer, noise))
    check_readable(runs / "stage 2" / SAVED)
    with pytest.raises(ValueError, match=f"{optimizer} cannot be read"):
        check_readable(damaged(optimizer, noise))
    with pytest.raises(ValueError, match="compared weights under ZeRO are not what was saved"):
        consolidate(damaged("zero_pp_rank_0_mp_rank_00_optim_states.pt", swap))


@together
def test_reading_deepspeed_s_files_runs_no_code_of_theirs(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs / "stage 2" / SAVED, copy)
    file = copy / "language" / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Payload(str(tmp_path / "ran"))}, file)
    state = json.loads((copy / "state.json").read_text())
    state["files"][str(file.relative_to(copy))] = file.stat().st_size
    (copy / "state.json").write_text(json.dumps(state))
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="zero_pp_rank_0_mp_rank_00_optim_states.pt cannot be re"):
        consolidate(copy)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@needs_deepspeed
def test_the_engine_s_loading_is_checked(tmp_path):
    """DeepSpeed returns None, or keeps the weights, where it should fail."""
    folder = tmp_path / "language" / "zero"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no .*model_states.pt"):
        load_engine(SimpleNamespace(), tmp_path)
    (folder / "mp_rank_00_model_states.pt").touch()
    engine = SimpleNamespace(load_checkpoint=lambda path, tag: (None, None))
    with pytest.raises(ValueError, match="could not be loaded by DeepSpeed"):
        load_engine(engine, tmp_path)

    def bare(path, tag):
        raise AssertionError

    with pytest.raises(ValueError, match="model_states.pt cannot be read .AssertionError"):
        load_engine(SimpleNamespace(load_checkpoint=bare), tmp_path)
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2))
    sample = sample_weights(engine)
    check_sample(current_digests(engine, sample), sample, tmp_path)
    with torch.no_grad():
        engine.module.bias[1] += 1e-6
    with pytest.raises(ValueError, match=r"1 of 2 compared weights .* first bias"):
        check_sample(current_digests(engine, sample), sample, tmp_path)


def test_layout_changes():
    config = {"zero_optimization": {"stage": 1}}
    model = torch.nn.Linear(2, 2)
    layout = part_layout(config, model)

    def changed(**zero):
        return part_layout({"zero_optimization": {"stage": 1, **zero}}, model)

    assert layout_changes(layout, 2, layout, 2) == ""
    assert layout_changes(layout, 2, changed(stage=2), 2) == ""
    assert layout_changes(layout, 2, changed(stage=3), 4) == "stage 1 -> 3, processes 2 -> 4"
    offload = changed(offload_optimizer={"device": "cpu"})
    assert layout_changes(layout, 1, offload, 1) == "optimiser offload none -> cpu"
    model.bias.requires_grad_(False)
    assert "trained" in layout_changes(layout, 1, changed(), 1)


# -- the script ------------------------------------------------------------------------------------


@together
def test_the_script_trains_evaluates_and_shares_unequally(scenes, tmp_path):
    """Three images for two ranks at the end, one while training; one process scores the same."""
    keys = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer"]
    keys += ["SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.IMS_PER_BATCH", 1]
    keys += ["DATASETS.TEST", "('gella_shapes_png_val','gella_shapes_nouns_val')"]
    keys += ["TEST.EVAL_PERIOD", 1, "TEST.SUBSET", 1, "TEST.BEST_METRIC", "png/AR"]
    folder = tmp_path / "data"  # three scenes of those that are drawn
    shutil.copytree(scenes, folder)
    for name in ("panoptic_val", "png_shapes_val"):
        file = folder / "shapes" / "annotations" / f"{name}.json"
        content = json.loads(file.read_text())
        rows = content["annotations"] if name == "panoptic_val" else content
        del rows[3:]
        if name == "panoptic_val":
            del content["images"][3:]
        file.write_text(json.dumps(content))
    whole, again = tmp_path / "whole", tmp_path / "again"
    start = (SCRIPT, "--config-file", CONFIG)
    two = ("--num-gpus", 2, "--dist-url", "auto")
    stage3 = ("SOLVER.ZERO.CONFIG", STAGES / "stage3.json", "OUTPUT_DIR", whole)
    process = python(folder, *start, *two, *keys, *stage3)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"Weights:  {whole}/model_final.pth" in process.stdout
    assert "language_decoder is under DeepSpeed" in (whole / "log.txt").read_text()
    row = json.loads((whole / "metrics.json").read_text().splitlines()[0])
    assert {"grad_norm", "grad_norm_language", "grad_norm_vision"} <= row.keys()
    results = json.loads((whole / "results.json").read_text())
    assert results["png"]["n_captions"] == results["nouns"]["n_captions"] == 3.0
    assert json.loads((whole / "best.json").read_text())["iteration"] in (0, 1)
    last = ("MODEL.WEIGHTS", whole / "model_final.pth", "OUTPUT_DIR", again)
    process = python(folder, *start, "--eval-only", *keys, *last)
    assert process.returncode == 0, process.stderr[-3000:]
    repeated = json.loads((again / "results.json").read_text())
    for scores in (results, repeated):
        scores.pop("run")  # when, and in how many processes
    assert repeated == results


# -- in this process -------------------------------------------------------------------------------


@needs_deepspeed
def test_rates_follow_the_trainer_s_groups_also_after_a_resume():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    groups = [
        {"params": list(model[name].parameters()), "role": role, "name": role}
        for name, role in (("a", "vision"), ("b", "language"))
    ]
    whole = torch.optim.AdamW(groups, lr=1.0)
    language, sources = split_language(whole)
    hook = ZeroHook(model, "b", language, sources, {"zero_optimization": {"stage": 1}})
    hook.trainer = SimpleNamespace(optimizer=whole)
    with pytest.raises(RuntimeError, match="when the training starts"):
        hook.before_step()
    hook._branch = SimpleNamespace(engine=SimpleNamespace(optimizer=language))
    whole.load_state_dict(whole.state_dict())  # which replaces the groups
    whole.param_groups[1]["lr"] = 0.25
    hook.before_step()
    assert [group["lr"] for group in language.param_groups] == [0.25]
    assert [group["lr"] for group in whole.param_groups] == [1.0, 0.25]


# -- DeepSpeed's file ------------------------------------------------------------------------------


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
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, "set SOLVER.BASE_LR instead"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "use bf16"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "use torch_autocast"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "'offload_param': 'nvme'}: 'cpu' or",
        ),
    ],
)
def test_what_the_file_must_not_hold(tmp_path, content, message):
    path = tmp_path / "z.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_config(str(path))


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ImportError, match=r"pip install 'gella\[zero\]'"):
        ZeroHook(model, "x", None, [], {"zero_optimization": {"stage": 1}})
