"""Hooks of the training loop: steps thrown away, clipping, scalars, stopping, pictures."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import shapes
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from torch import nn
from toy_run import CONFIG, SMALL, toy_config, toy_run

from gella import load_config
from gella.data.register import register_png
from gella.engine import hooks, picture_panel
from gella.engine.hooks import (
    GradientClipper,
    NonFiniteError,
    NonFiniteGuard,
    PhraseTally,
    RunScalars,
    RunStopped,
    StopOnSignal,
    any_rank,
    peak_memory_mib,
)
from gella.engine.picture_panel import PicturePanel, draw_panel, panel_input
from gella.engine.step import StepTrainer
from gella.engine.trainer import GellaTrainer
from gella.entities.entity_map import EntityMap
from gella.pictures.grounding import Grounding
from gella.text.prompts import TASKS
from gella.utils.stopping import SIGNALS

# -- numbers that are not finite -------------------------------------------------------------------


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.named_parameters()}


class Record(HookBase):
    """Keeps the parameters after each step."""

    def __init__(self):
        self.after = []

    def after_step(self):
        self.after.append(parameters(self.trainer))


def train(cfg, poisoned, resume=False):
    trainer, record = toy_run(cfg, poisoned, resume), Record()
    trainer.register_hooks([record])
    trainer.train()
    return trainer, record.after


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_stop_ends_the_run_at_once_and_names_the_images(tmp_path, poison):
    cfg = toy_config(tmp_path)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    trainer, record = toy_run(cfg, {18: poison}), Record()
    trainer.register_hooks([record])
    with pytest.raises(NonFiniteError, match=r"iteration 4: .*nonfinite_0000004.json"):
        trainer.train()
    assert len(record.after) == 4 and same(record.after[-1], parameters(trainer))
    content = json.loads((tmp_path / "nonfinite_0000004.json").read_text())
    assert content["iteration"] == 4 and content["action"] == "stop"
    assert content["what"] == ("losses" if poison == "loss" else "gradients")
    (rank,) = content["ranks"]
    (batch,) = rank["batches"]
    assert batch["images"] == [
        {"file_name": f"images/{number}.jpg", "image_id": number} for number in range(16, 20)
    ]
    assert batch["tasks"] == ["describe"]
    if poison == "loss":
        assert batch["losses"] == {"loss_toy": "nan", "loss_other": "nan"}
    else:
        assert math.isfinite(batch["losses"]["loss_toy"])
        assert not math.isfinite(float(rank["gradient_norms"]["grad_norm"]))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000002"]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_skip_leaves_the_parameters_and_goes_on(tmp_path, poison):
    cfg = toy_config(tmp_path)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.NONFINITE, cfg.SOLVER.NONFINITE_LIMIT = "skip", 2
    trainer, after = train(cfg, {8: poison, 23: poison})
    skipped = [i for i in range(1, 8) if same(after[i - 1], after[i])]
    assert skipped == [2, 5]
    assert all(torch.isfinite(value).all() for value in after[-1].values())
    names = {path.name for path in tmp_path.glob("nonfinite_*")}
    assert names == {"nonfinite_0000002.json", "nonfinite_0000005.json"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["skipped_steps"] == 2
    assert trainer.storage.history("skipped_steps").values()[2] == (1.0, 2)
    assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 6


def test_the_limit_counts_over_a_resume(tmp_path):
    cfg = toy_config(tmp_path)
    cfg.SOLVER.NONFINITE, cfg.SOLVER.NONFINITE_LIMIT = "skip", 1
    poisoned = {5: "loss", 20: "loss"}
    with pytest.raises(NonFiniteError, match="1 steps were skipped already.*NONFINITE_LIMIT"):
        train(cfg, poisoned)
    assert json.loads((tmp_path / "nonfinite_0000005.json").read_text())["skipped_before"] == 1
    # The checkpoint of iteration 2 knows of the step skipped before it.
    with pytest.raises(NonFiniteError, match="iteration 5"):
        train(cfg, poisoned, resume=True)
    cfg.SOLVER.NONFINITE_LIMIT = 2
    trainer, _ = train(cfg, poisoned, resume=True)
    assert trainer.storage.latest()["skipped_steps"] == (2.0, 7)


class Gradient(HookBase):
    """Keeps the gradient of each finished backward pass, by iteration."""

    def __init__(self):
        self.seen = {}

    def after_backward(self):
        weight = self.trainer.model.layer.weight
        self.seen[self.trainer.iter] = weight.grad.clone()


def test_a_skipped_micro_batch_drops_the_whole_step(tmp_path):
    cfg = toy_config(tmp_path, iterations=5)
    cfg.SOLVER.ACCUMULATE, cfg.SOLVER.NONFINITE = 2, "skip"
    trainer, record, gradient = toy_run(cfg, {14: "loss"}), Record(), Gradient()
    trainer.register_hooks([record, gradient])
    trainer.train()  # the second part of iteration 3 is poisoned
    assert same(record.after[2], record.after[3]) and not same(record.after[3], record.after[4])
    content = json.loads((tmp_path / "nonfinite_0000003.json").read_text())
    parts = content["ranks"][0]["batches"]
    assert [[x["image_id"] for x in part["images"]] for part in parts] == [[12, 13], [14, 15]]
    assert sorted(gradient.seen) == [0, 1, 2, 4]
    # What the first part left behind is gone: iteration 4 alone gives the same gradient.
    alone, again = toy_run(cfg), Gradient()
    for name, value in alone.model.named_parameters():
        value.data.copy_(record.after[3][name])
    alone.register_hooks([again])
    alone.start_iter = 4
    alone.train()
    assert torch.equal(again.seen[4], gradient.seen[4])


def one_of_two(folder):
    """One of two processes, the second of which meets a NaN in iteration 2; with both policies."""
    for policy in ("stop", "skip"):
        cfg = toy_config(folder / policy, iterations=5)
        cfg.SOLVER.NONFINITE = policy
        trainer, record = toy_run(cfg, {4 * 2 + 3: "loss"}), Record()
        trainer.register_hooks([record])
        error = ""
        try:
            trainer.train()
        except NonFiniteError as reason:
            error = str(reason)
        torch.save([record.after, error], folder / policy / f"rank{comm.get_rank()}.pth")


def test_all_ranks_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else each process takes a GPU of its own
    launch(one_of_two, 2, dist_url="auto", args=(tmp_path,))
    for policy in ("stop", "skip"):
        folder = tmp_path / policy
        (after, error), (other, other_error) = (
            torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)
        )
        assert error == other_error and len(after) == len(other) == (2 if policy == "stop" else 5)
        assert all(same(a, b) for a, b in zip(after, other, strict=True))
        content = json.loads((folder / "nonfinite_0000002.json").read_text())
        listed = [[x["image_id"] for x in r["batches"][0]["images"]] for r in content["ranks"]]
        assert listed == [[8, 9], [10, 11]] and [r["rank"] for r in content["ranks"]] == [0, 1]
        assert "nonfinite_0000002.json" in error if policy == "stop" else error == ""
        if policy == "skip":
            assert [i for i in range(1, 5) if same(after[i - 1], after[i])] == [2]


def test_what_the_keys_may_be(tmp_path):
    with pytest.raises(ValueError, match="SOLVER.NONFINITE is 'ignore'"):
        NonFiniteGuard("ignore", 1, str(tmp_path))
    with pytest.raises(ValueError, match="SOLVER.NONFINITE_LIMIT is -1"):
        NonFiniteGuard("skip", -1, str(tmp_path))
    assert any_rank(True) and not any_rank(False)


# -- clipping --------------------------------------------------------------------------------------


def clip(model, *args, language_value=7.0, roles=()):
    """Clip the gradients of a model as a hook of a trainer would; returns the logged norm."""
    logged = {}
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    inner = SimpleNamespace(optimizer=torch.optim.SGD(groups, 1.0))
    for group, role in zip(inner.optimizer.param_groups, roles):
        group["role"] = role
    hook = GradientClipper(*args, language_value=language_value)
    storage = SimpleNamespace(put_scalar=logged.__setitem__)
    hook.trainer = SimpleNamespace(_trainer=inner, storage=storage)
    hook.after_backward()
    return logged["grad_norm"] if not roles else logged


def test_clipping_by_the_norm_of_the_whole_model():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    model.bias.grad = torch.tensor([4.0])
    assert clip(model, "full_model", 1.0, 2.0) == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]))
    assert clip(model, "full_model", 10.0, 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.8]))  # below the limit: untouched
    model.bias.grad = torch.tensor([4.0])
    clip(model, "norm", 2.0, 2.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([2.0]))
    clip(model, "value", 0.5, 2.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.5, 0.0]]))
    with pytest.raises(ValueError, match="CLIP_TYPE is 'both'"):
        GradientClipper("both", 1.0, 2.0, language_value=1.0)
    GradientClipper("full_model", 1.0, 2.0, language_value=1.0, zero=object())
    for wrong in [("norm", 1.0, 2.0), ("full_model", 1.0, 1.0), ("per_side", 1.0, 1.0)]:
        with pytest.raises(ValueError, match=r"only \('per_side', 'full_model'\) and 2.0"):
            GradientClipper(*wrong, language_value=1.0, zero=object())


def test_each_side_is_clipped_by_its_own_norm_and_limit():
    model = nn.Linear(2, 1)  # the weight stands for the masks' side, the bias for the words'
    for limit, language in [(500.0, 1.0), (1.0, 0.5), (1.0, 9.0)]:
        model.weight.grad, model.bias.grad = torch.tensor([[300.0, 400.0]]), torch.tensor([2.0])
        arguments = ("per_side", limit, 2.0)
        norms = clip(model, *arguments, language_value=language, roles=("vision", "language"))
        assert norms == pytest.approx(
            {"grad_norm": 500.004, "grad_norm_language": 2.0, "grad_norm_vision": 500.0}
        )
        assert model.weight.grad.norm().item() == pytest.approx(min(500.0, limit), rel=1e-5)
        assert model.bias.grad.item() == pytest.approx(min(2.0, language), rel=1e-5)


# -- scalars ---------------------------------------------------------------------------------------


def test_rates_are_those_of_the_step(tmp_path):
    cfg = toy_config(tmp_path, iterations=4)
    cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA, cfg.SOLVER.WARMUP_ITERS = (2,), 0.1, 0
    cfg.SOLVER.LANGUAGE_MULTIPLIER = 2.0
    trainer = toy_run(cfg)
    trainer.train()
    found = {
        role: [value for value, _ in trainer.storage.history(f"lr_{role}").values()]
        for role in ("language", "vision")
    }
    assert found["vision"] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert found["language"] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    names = set(trainer.storage.latest())
    assert {"total_loss", "loss_toy", "loss_other", "data_time", "max_memory_mib"} <= names
    assert trainer.storage.latest()["max_memory_mib"][0] == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.1
    )


def test_losses_of_micro_batches_are_logged_as_their_mean(tmp_path):
    cfg = toy_config(tmp_path, iterations=2)
    trainer, seen = toy_run(cfg), []
    cfg.SOLVER.ACCUMULATE = 2
    trainer = toy_run(cfg)
    trainer.model.register_forward_hook(lambda m, i, losses: seen.append(losses["loss_toy"].item()))
    trainer.train()
    logged = [value for value, _ in trainer.storage.history("loss_toy").values()]
    assert logged == pytest.approx([(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2])
    total = trainer.storage.latest()["total_loss"][0]
    assert total == pytest.approx(1.5 * logged[-1])


def test_images_per_second(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))  # every look is two seconds after the last
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: next(clock))
    trainer = toy_run(toy_config(tmp_path))
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    put: dict = {}
    hook = RunScalars()
    hook.trainer = SimpleNamespace(
        iter=5,
        start_iter=4,
        optimizer=trainer.optimizer,
        cfg=trainer.cfg,
        storage=SimpleNamespace(put_scalar=lambda name, value, **_: put.__setitem__(name, value)),
        _trainer=SimpleNamespace(
            batch=[trainer.data_loader.item(i) for i in range(4)], accumulate=2
        ),
    )
    hook.before_step()
    hook.after_step()
    assert put["images_per_second"] == 3 * 4 / 2  # 3 ranks, 4 images, 2 seconds
    assert put["batches_describe"] == 2


def test_tasks_are_counted_over_a_resume(tmp_path):
    """Iterations 0 to 7 are describe, extract, ground, refer, and so on; refer is grounding."""
    cfg = toy_config(tmp_path)

    class Die(HookBase):
        def after_step(self):
            if self.trainer.iter == 4:
                raise KeyboardInterrupt

    trainer = toy_run(cfg)
    trainer.register_hooks([Die()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = toy_run(cfg, resume=True)
    assert trainer.start_iter == 3
    trainer.train()
    latest = trainer.storage.latest()
    counts = {name: value for name, (value, _) in latest.items() if name.startswith("batches_")}
    assert counts == {"batches_describe": 2, "batches_extract": 2, "batches_ground": 4}


def test_memory_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert peak_memory_mib("cuda:1") == 3


def test_phrases_without_an_entity_are_counted(tmp_path, gella_log):
    """The running share is in the storage, the counts are logged at the end."""
    cfg = toy_config(tmp_path, iterations=4)
    trainer, shares = toy_run(cfg), []
    counts = [(0, 0, 0), (4, 1, 0), (2, 2, 3), (2, 0, 0)]  # grounded, unmatched, cut by iteration
    item = trainer.data_loader.item

    def counted(number):
        names = ("num_grounded", "num_unmatched", "num_cut")
        first = number % 4 == 0
        return {**item(number), **(dict(zip(names, counts[number // 4])) if first else {})}

    trainer.data_loader.item = counted

    class Reader(HookBase):
        def after_step(self):
            latest = self.trainer.storage.latest()
            shares.append(latest.get("unmatched_phrases", (None, 0))[0])

    trainer.register_hooks([Reader()])
    trainer.train()
    assert shares == [None, 1 / 4, 3 / 6, 3 / 8]
    lines = {
        r.getMessage(): r.levelname for r in gella_log.records if "Training:" in r.getMessage()
    }
    assert lines == {
        "Training: 3 nouns were cut from captions too long for the model": "WARNING",
        "Training: 3 of 8 phrases with segments (37.50 %) match no input entity": "WARNING",
    }
    tally = PhraseTally()
    tally.add([{"num_grounded": 2}, {"num_grounded": 9, "is_padding": True}, {}])
    gella_log.clear()
    tally.report("Set")
    assert [record.levelname for record in gella_log.records] == ["INFO"]
    assert "0 of 2" in gella_log.text


# -- stopping --------------------------------------------------------------------------------------


@pytest.fixture
def hook():
    """A hook in a run of ten iterations that records what it saves."""
    saved = []
    hook = StopOnSignal(saved.append)
    hook.saved = saved
    hook.trainer = SimpleNamespace(iter=4, max_iter=10)
    before = [signal.getsignal(number) for number in SIGNALS]
    hook.before_train()
    yield hook
    hook.after_train()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in [thread.name for thread in threading.enumerate()]


def send(hook, number):
    """Send this process a signal and wait until the hook's thread has it."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 60
    while not hook.request.number and time.monotonic() < deadline:
        time.sleep(0.005)


def test_the_step_is_finished_and_saved(hook):
    hook.after_step()
    assert hook.saved == []
    send(hook, signal.SIGTERM)
    send(hook, signal.SIGTERM)  # the same request on a second way
    with pytest.raises(RunStopped, match="SIGTERM after iteration 4") as end:
        hook.after_step()
    assert end.value.code == 0 and hook.saved == [4]


def test_the_last_iteration_ends_as_always(hook):
    hook.trainer.iter = 9
    send(hook, signal.SIGINT)
    hook.after_step()
    assert hook.saved == []


def test_outside_the_main_thread_it_only_agrees():
    hook = StopOnSignal(lambda iteration: None)
    hook.trainer = SimpleNamespace(iter=0, max_iter=9)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=hook.before_train)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    hook.after_step()
    hook.after_train()


# -- pictures and resumes of the real model -------------------------------------------------------


def tiny_run(scenes, folder, *options, hooks=()):
    """Train the tiny config for some steps; returns losses by iteration, weights and trainer."""
    name, root = f"gella_watching_{scenes.name}", scenes / "shapes"
    notes = root / "annotations"
    if name not in DatasetCatalog:
        where = (root / "train", notes / "panoptic_train", notes / "panoptic_train.json")
        narratives = notes / "png_shapes_train.json"
        register_png(name, *where, narratives, shapes.CATEGORIES, tasks=TASKS)
    pairs = [*SMALL, "MODEL.LANGUAGE.TOKENIZER", scenes / "shapes" / "tokenizer"]
    pairs += ["OUTPUT_DIR", folder, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "100"]
    pairs += ["DATALOADER.NUM_WORKERS", "0", "SEED", "5", "DATASETS.TRAIN", (name,)]
    cfg = load_config(CONFIG, [str(part) for part in [*pairs, *options]])
    torch.manual_seed(0)
    trainer = GellaTrainer(cfg)
    trainer.resume_or_load(resume=True)  # there is nothing to resume in a new folder
    trainer.register_hooks(hooks)
    trainer.train()
    losses = {
        name: history.values()
        for name, history in trainer.storage.histories().items()
        if "loss" in name
    }
    return losses, trainer.model.state_dict(), trainer


@pytest.fixture
def pictures(monkeypatch):
    """What the panels put, as (iteration, picture)."""
    shown: list = []

    def put(self, picture):
        # What a panel draws and switches must not reach the training.
        torch.rand(1), np.random.rand(), random.random()
        shown.append((self.trainer.iter, picture))

    monkeypatch.setattr(PicturePanel, "_put", put)
    return shown


def test_a_panel_changes_nothing(scenes, tmp_path, monkeypatch, pictures):
    # Seeds of each step would hide a changed generator.
    monkeypatch.setattr(StepTrainer, "_seed_generators", lambda self: None)
    options = ["SOLVER.MAX_ITER", "8", "DATALOADER.TASK_RATIOS", "[0.5,0.2,0.3]"]
    losses, weights, _ = tiny_run(scenes, tmp_path / "plain", *options)
    assert pictures == []
    shown_losses, shown_weights, trainer = tiny_run(
        scenes, tmp_path / "shown", *options, "VIS_PERIOD", "2"
    )
    assert len(pictures) >= 3
    assert losses == shown_losses
    assert [k for k in weights if not torch.equal(weights[k], shown_weights[k])] == []
    assert any("running_mean" in name for name in weights)
    # A description has no nouns: the panel comes with the next batch that has.
    tasks = [batch[0]["task"] for batch, _ in zip(trainer.data_loader, range(8), strict=False)]
    drawn = [iteration for iteration, _ in pictures]
    assert "describe" in tasks[1::2]
    due, expected = False, []
    for iteration, task in enumerate(tasks):
        due = due or iteration % 2 == 1
        if due and task != "describe":
            expected, due = [*expected, iteration], False
    assert drawn == expected
    assert all(module.training for module in trainer.model.modules())


def test_the_picture_goes_to_tensorboard(scenes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_run(scenes, tmp_path, "SOLVER.MAX_ITER", "2", "VIS_PERIOD", "1", *GROUND_ONLY)
    # Detectron2 keeps pictures beside the scalars; the small core has a folder of its own.
    own = tmp_path / "pictures"
    (file,) = (own if own.is_dir() else tmp_path).glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    panels = events.Images("panel")
    assert [panel.step for panel in panels] == [0, 1]
    assert panels[0].width > 600 and panels[0].height > 1000


GROUND_ONLY = ["DATALOADER.TASK_RATIOS", "[0.0,0.0,1.0]"]


def sample():
    """A mapped training sample: a red left half and a blue right one, in a padded frame."""
    ids = np.zeros((8, 8), dtype=np.int32)
    ids[:4, :4], ids[:4, 4:] = 1, 2
    colormap = np.zeros((3, 8, 8), dtype=np.uint8)
    colormap[0, :4, :4], colormap[1, :4, 4:] = 200, 100
    image = np.zeros((3, 16, 16), dtype=np.uint8)
    image[0, :8, :8], image[2, :8, 8:] = 255, 255
    phrase = {"text": "the sea", "start": 9, "end": 16, "entity_indices": [1]}
    return {
        "image": torch.from_numpy(image),
        "colormap": torch.from_numpy(colormap),
        "entities": EntityMap(ids, [7, 9]),
        "valid_size": (4, 8),
        "height": 100,
        "width": 200,
        "caption": "Land and the sea.",
        "phrases": [phrase],
        "task": "extract",
        "image_id": 3,
    }


def test_the_model_is_asked_in_the_frame_without_padding():
    inputs = panel_input(sample())
    assert (inputs["height"], inputs["width"]) == (4, 8) and inputs["task"] == "ground"
    assert inputs["entities_full"].size == (4, 8)
    assert inputs["entities_full"].segment_ids == [7, 9]
    picture = inputs["picture"]
    assert picture.shape == (4, 8, 3) and picture.dtype == np.uint8
    assert picture[1, 1].tolist() == [255, 0, 0] and picture[1, 6].tolist() == [0, 0, 255]


def test_the_panel_shows_truth_and_prediction(monkeypatch):
    drawn = []

    def drawn_too(*args, **options):
        drawn.append(Grounding(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(picture_panel, "Grounding", drawn_too)
    inputs = panel_input(sample())
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, :4] = True
    answer = [{"phrase": "the sea", "start": 9, "end": 16, "entity_ids": [7], "mask": mask}]
    answer[0]["scores"] = [0.9]
    panel = draw_panel(inputs, answer, "iteration 1")
    truth, prediction = drawn
    assert truth.phrases[0]["entity_ids"] == [9] and (truth.phrases[0]["mask"] == ~mask).all()
    assert prediction.phrases is answer and prediction.entities is inputs["entities_full"]
    colors = {color for _, color in panel.getcolors(1 << 24)}
    assert {(200, 0, 0), (0, 100, 0)} <= colors  # the colormap
    inputs["phrases"][0]["entity_indices"] = None
    drawn.clear()
    draw_panel(inputs, answer, "iteration 1", own_masks=True)
    (nobody,) = drawn[0].phrases
    assert nobody["entity_ids"] == [] and not nobody["mask"].any()
    assert not drawn[0].own_masks and drawn[1].own_masks


class Stop(HookBase):
    """Ends the run after an iteration, in a way that a checkpoint is written."""

    def after_step(self):
        if self.trainer.iter == 2:
            hook = next(h for h in self.trainer._hooks if isinstance(h, StopOnSignal))
            os.kill(os.getpid(), signal.SIGTERM)
            while not hook.request.number:
                pass


class Seen(HookBase):
    """Keeps the images of each forward pass, by iteration."""

    def __init__(self):
        self.images: list = []

    def before_train(self):
        self.trainer.model.register_forward_pre_hook(self._see)

    def _see(self, model, inputs):
        self.images.append((self.trainer.iter, [item["image_id"] for item in inputs[0]]))


def test_a_run_of_micro_batches_resumes_at_its_exact_position(scenes, tmp_path):
    options = ["SOLVER.MAX_ITER", "6", "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "4"]
    whole, first, second = Seen(), Seen(), Seen()
    _, weights, _ = tiny_run(scenes, tmp_path / "whole", *options, hooks=[whole])
    with pytest.raises(RunStopped):
        tiny_run(scenes, tmp_path / "cut", *options, hooks=[first, Stop()])
    assert first.images[-1][0] == 3  # the signal came after the hook had looked
    _, resumed, _ = tiny_run(scenes, tmp_path / "cut", *options, hooks=[second])
    assert whole.images == first.images + second.images
    assert [len(images) for _, images in whole.images] == [2] * 12
    assert [k for k in weights if not torch.equal(weights[k], resumed[k])] == []
