"""Scalars and pictures of a run: right numbers, and no trace in the training."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapes
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from test_train_net import CONFIG, ROOT, SMALL
from toy_run import toy_config, toy_run

from gella import load_config
from gella.data.register import register_png
from gella.engine import picture_panel, watching
from gella.engine.picture_panel import PicturePanel, draw_panel, panel_input
from gella.engine.stopping import RunStopped, StopOnSignal
from gella.engine.trainer import GellaTrainer
from gella.engine.watching import peak_memory_mib
from gella.entities.entity_map import EntityMap
from gella.text.prompts import TASKS

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
    monkeypatch.setattr(watching.time, "perf_counter", lambda: next(clock))
    cfg = toy_config(tmp_path, iterations=3)
    cfg.SOLVER.ACCUMULATE = 2
    trainer = toy_run(cfg)
    hook = next(h for h in trainer._hooks if isinstance(h, watching.RunScalars))
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    hook.trainer = SimpleNamespace(
        iter=5,
        start_iter=4,
        model=trainer.model,
        optimizer=trainer.optimizer,
        cfg=cfg,
        storage=SimpleNamespace(put_scalar=lambda name, value, **_: put.__setitem__(name, value)),
    )
    put: dict = {}
    hook.before_train()
    hook.before_step()
    batch = trainer.data_loader.item
    for part in ([batch(0), batch(1)], [batch(2), batch(3)]):
        trainer.model(part)
    hook.after_step()
    assert put["images_per_second"] == 3 * 4 / 2  # 3 ranks, 4 images, 2 seconds
    trainer.model.eval()
    trainer.model([batch(4)])  # an evaluation does not count
    assert hook._images == 4 and hook.batches == {"describe": 2}
    hook.after_train()
    assert not trainer.model._forward_pre_hooks


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


# -- pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder with a few drawn scenes in ``shapes``."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py")]
    arguments = ["--output", str(folder / "shapes"), "--train", "20", "--val", "2"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return folder


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
    # IterationSeed would hide a changed generator.
    options = ["SOLVER.MAX_ITER", "8", "DATALOADER.TASK_RATIOS", "[0.5,0.2,0.3]"]
    monkeypatch.setattr("gella.engine.trainer.IterationSeed", lambda seed: HookBase())
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

    def draw(image, caption, grounding, *, entities=None):
        drawn.append((grounding, entities))
        return draw_grounding(image, caption, grounding, entities=entities)

    draw_grounding = picture_panel.draw_grounding
    monkeypatch.setattr(picture_panel, "draw_grounding", draw)
    inputs = panel_input(sample())
    mask = np.zeros((4, 8), dtype=bool)
    mask[:, :4] = True
    answer = [{"phrase": "the sea", "start": 9, "end": 16, "entity_ids": [7], "mask": mask}]
    panel = draw_panel(inputs, answer, "iteration 1")
    (truth, entities), (prediction, _) = drawn
    assert truth[0]["entity_ids"] == [9] and (truth[0]["mask"] == ~mask).all()
    assert prediction is answer and entities is inputs["entities_full"]
    colors = {color for _, color in panel.getcolors(1 << 24)}
    assert {(200, 0, 0), (0, 100, 0)} <= colors  # the colormap
    inputs["phrases"][0]["entity_indices"] = None
    drawn.clear()
    draw_panel(inputs, answer, "iteration 1", own_masks=True)
    assert drawn[0][0][0]["entity_ids"] == [] and not drawn[0][0][0]["mask"].any()
    assert drawn[0][1] is not None and drawn[1][1] is None


def test_a_period_is_positive(tmp_path):
    with pytest.raises(ValueError, match="VIS_PERIOD is 0"):
        PicturePanel(0, str(tmp_path))


class Stop(HookBase):
    """Ends the run after an iteration, in a way that a checkpoint is written."""

    def after_step(self):
        if self.trainer.iter == 2:
            hook = next(h for h in self.trainer._hooks if isinstance(h, StopOnSignal))
            os.kill(os.getpid(), signal.SIGTERM)
            while hook._watch.received is None:
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


def one_of_two(scenes, folder, zero):
    """One of two processes that train with and without panels; compares and writes down."""
    torch.set_num_threads(1)
    shown = []
    PicturePanel._put = lambda self, picture: shown.append(self.trainer.iter)
    options = ["SOLVER.MAX_ITER", "4", "SOLVER.ZERO.CONFIG", zero]
    plain, _, _ = tiny_run(scenes, folder / "plain", *options)
    losses, _, trainer = tiny_run(scenes, folder / "shown", *options, "VIS_PERIOD", "1")
    model = getattr(trainer.model, "module", trainer.model)
    engine = getattr(model.language_decoder, "engine", None)
    language = model.language_decoder if engine is None else engine.module
    assert losses == plain and all(module.training for module in language.modules())
    (folder / f"rank{comm.get_rank()}").write_text(f"{shown} {len(losses)}")


@pytest.mark.parametrize("zero", ["", "stage3.json"])
def test_all_ranks_make_the_pass_and_the_first_draws(scenes, tmp_path, monkeypatch, zero):
    if zero:
        pytest.importorskip("deepspeed")
        zero = str(ROOT / "configs" / "zero" / zero)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else each process takes a GPU of its own
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(one_of_two, 2, dist_url="auto", args=(scenes, Path(tmp_path), zero))
    main, other = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert main.startswith("[") and not main.startswith("[]") and not main.endswith(" 0")
    assert other.startswith("[]")
