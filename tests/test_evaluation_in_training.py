"""Evaluation while training: subsets, equal shares, no trace in it, the best checkpoint."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import TrainerBase
from detectron2.evaluation import inference_on_dataset
from PIL import Image
from torch import nn
from toy_run import Seen, toy_config, toy_run

from gella.engine.evaluation_hooks import (
    BestCheckpoint,
    EvaluationInTraining,
    RealSamples,
    build_even_loader,
    evenly_spaced,
    undisturbed,
    with_keys,
)
from gella.engine.trainer import GellaTrainer

# -- which samples ---------------------------------------------------------------------------------


def test_a_subset_takes_whole_images_evenly():
    records = [{"image_id": i, "caption": c} for i in range(10) for c in "ab"]
    images = [r["image_id"] for r in evenly_spaced(records, 4)]
    assert images == [0, 0, 2, 2, 5, 5, 7, 7]
    # the order of the records does not say what belongs together
    mixed = records[::2] + records[1::2]
    assert [r["image_id"] for r in evenly_spaced(mixed, 4)] == [0, 2, 5, 7, 0, 2, 5, 7]
    for everything in (0, 10, 11):
        assert len(evenly_spaced(records, everything)) == 20
    nameless = [{"number": i} for i in range(9)]
    assert [r["number"] for r in evenly_spaced(nameless, 3)] == [0, 3, 6]
    assert [r["image_id"] for r in evenly_spaced(records, 1)] == [0, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_equally_long_and_miss_nothing(world, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: world)
    for size in (1, 2, 3, 7, 8, 9):
        records, real, lengths = [{"image_id": i} for i in range(size)], [], set()
        for rank in range(world):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            loader = build_even_loader(records, dict, batch_size=2, num_workers=0, name="D")
            samples = [sample for batch in loader for sample in batch]
            lengths.add(len(samples))
            share = [s["image_id"] for s in samples if "is_padding" not in s]
            assert share == list(InferenceSampler(size))
            real += share
        assert lengths == {-(-size // world)} and real == list(range(size))


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="without a record"):
        build_even_loader([], dict, batch_size=1, num_workers=0, name="D")


def answers(batch):
    """A model for Seen."""
    return [sample["number"] for sample in batch]


@pytest.mark.parametrize(
    ("rank", "real", "workers"), [(0, [0, 1], 0), (1, [2, 3], 1), (2, [4], 0), (2, [4], 1)]
)
def test_repeated_samples_are_run_but_not_counted(rank, real, workers, monkeypatch, gella_log):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
    loader = build_even_loader(
        [{"image_id": i} for i in range(5)],
        mapper=lambda r: {"number": r["image_id"], "num_grounded": 2, "num_unmatched": 1},
        batch_size=1,
        num_workers=workers,
        name="D",
    )
    assert len(loader) == 2 and loader.batch_size == 1
    run, evaluator = [], Seen()

    def model(batch):
        run.extend(answers(batch))
        return answers(batch)

    results = inference_on_dataset(model, loader, RealSamples(evaluator))
    assert len(run) == 2 and evaluator.numbers == real
    assert evaluator.calls == len(real)  # no empty batch is passed on
    assert results == {"seen": {"n": float(len(real))}}
    assert f"{len(real)} of {2 * len(real)} phrases" in gella_log.text


def test_a_batch_of_real_and_repeated_samples():
    evaluator = Seen()
    evaluator.reset()
    inputs = [{"number": 1}, {"number": 2, "is_padding": True}, {"number": 3}]
    RealSamples(evaluator).process(inputs, [1, 2, 3])
    assert evaluator.numbers == [1, 3]
    with pytest.raises(ValueError, match="shorter"):
        RealSamples(evaluator).process(inputs, [1, 2])


def test_the_test_loader_leads_records_to_their_source(tmp_path, tokenizer_dir, gella_log):
    """A dataset whose masks come from a file that has merged two of three segments."""
    ids = np.zeros((20, 30), np.uint8)
    ids[:8], ids[8:14, :15], ids[8:14, 15:] = 1, 2, 3
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "a.npz", ids=np.minimum(ids, 2).astype(np.int32))
    caption = "a top over one and two"
    phrases = [
        {"text": text, "start": caption.find(text), "end": -1, "segment_ids": list(segment_ids)}
        | {"is_plural": False, "is_thing": True}
        for text, segment_ids in (("a top", (1,)), ("one", (2,)), ("two", (3,)))
    ]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 20,
        "width": 30,
        "entities": {"format": "gray_png", "file_name": str(tmp_path / "ids.png")},
        "caption": caption,
        "phrases": phrases,
        "tasks": ("ground",),
    }
    name = "gella_unmatched_test"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).evaluator_type = "png"
    cfg = toy_config(tmp_path)
    cfg.MODEL.LANGUAGE.TOKENIZER = str(tokenizer_dir)
    cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = (name,), 0
    cfg.INPUT.GELLA.TARGET_IOU = 0.6
    cfg.INPUT.GELLA.ENTITY_SOURCES = [[name, "auto", str(tmp_path / "masks")]]
    try:
        ((mapped,),) = list(GellaTrainer.build_test_loader(cfg, name))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    ids = mapped["entities_full"].segment_ids
    assert [[ids[i] for i in p["entity_indices"]] for p in mapped["phrases"]] == [[1], [], []]
    assert f"{name}: 2 of 3 phrases with segments (66.67 %)" in gella_log.text


# -- no trace --------------------------------------------------------------------------------------


def test_generators_and_training_flags_come_back():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    model.train()
    model[1].eval()  # as a frozen part is
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    with pytest.raises(KeyError), undisturbed(model):
        model.eval()
        torch.rand(5), np.random.rand(5), random.random()
        model.train()
        raise KeyError
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.fixture
def cfg(tmp_path):
    """Ten iterations of the toy, with a test set of six numbers."""
    cfg = toy_config(tmp_path, 10)
    cfg.DATASETS.TEST = ("only",)
    return cfg


def trained(cfg, folder, **test):
    """The losses of a run with these keys below TEST, exactly, and its trainer."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    for key, value in test.items():
        cfg.TEST[key] = value
    trainer = toy_run(cfg)
    trainer.train()
    return [value for value, _ in trainer.storage.history("total_loss").values()], trainer


@pytest.mark.parametrize("seed", [7, -1])
def test_losses_do_not_depend_on_evaluations(cfg, tmp_path, seed, monkeypatch):
    cfg.SEED = seed
    plain, one = trained(cfg, tmp_path / "plain", EVAL_PERIOD=0)
    often, two = trained(cfg, tmp_path / "often", EVAL_PERIOD=2, SUBSET=3)
    assert plain == often and len(plain) == 10
    state, other = one.model.state_dict(), two.model.state_dict()
    assert [k for k in state if not torch.equal(state[k], other[k])] == []
    assert two._last_eval_results == {"seen": {"n": 6.0}}  # the last takes all
    if seed < 0:  # the test is able to fail: unprotected, the same evaluations do change it
        monkeypatch.setattr("gella.engine.trainer.undisturbed", lambda model: torch.no_grad())
        assert trained(cfg, tmp_path / "rude", EVAL_PERIOD=2)[0] != plain


def test_scores_are_stored_under_names_of_their_own(cfg, tmp_path):
    trained(cfg, tmp_path, EVAL_PERIOD=5, SUBSET=2, BEST_METRIC="seen/n")
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    stored = {k: v for row in rows for k, v in row.items() if "seen/" in k}
    assert stored == {"subset/seen/n": 2.0, "seen/n": 6.0}
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["value"], best["iteration"]) == (2.0, 4)  # the first of equal scores stays
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["iteration"] == 4 and "language_decoder.weight" in saved["model"]


def test_with_keys_leaves_the_config_alone(cfg):
    cfg.freeze()
    changed = with_keys(cfg, {"TEST.SUBSET": 5})
    assert (changed.TEST.SUBSET, cfg.TEST.SUBSET) == (5, 0) and changed.is_frozen()


# -- when, and what is best ------------------------------------------------------------------------


class Steps(TrainerBase):
    """A loop without a model; its iteration is all that hooks may look at."""

    def run_step(self):
        pass

    def fail(self, at):
        """Let iteration ``at`` raise."""
        self.run_step = lambda: (_ for _ in ()).throw(KeyboardInterrupt) if self.iter == at else 0


def evaluations(max_iter=10, start=0, fail_at=None, scores=None, **options):
    """(iteration, number of images) of each evaluation in a run of the hook."""
    trainer, calls = Steps(), []

    def evaluate(num_images):
        calls.append((trainer.iter, num_images))
        return {"png": {"AR": (scores or {}).get(trainer.iter, 1.0)}}

    trainer.register_hooks([EvaluationInTraining(evaluate=evaluate, **options)])
    if fail_at is not None:
        trainer.fail(fail_at)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(start, max_iter)
    else:
        trainer.train(start, max_iter)
    return calls


def test_when_it_evaluates(tmp_path):
    assert evaluations(period=0) == [(10, 0)]
    assert evaluations(period=4, subset=7) == [(3, 7), (7, 7), (10, 0)]
    assert evaluations(period=5) == [(4, 0), (10, 0)]  # not twice at the end
    assert evaluations(period=4, subset=7, fail_at=5) == [(3, 7)]
    best = BestCheckpoint(lambda iteration, name: None, tmp_path, "png/AR", "max")
    # the last weights may be the best too, judged on what the others were judged on
    expected = [(3, 7), (7, 7), (9, 7), (10, 0)]
    assert evaluations(period=4, subset=7, best=best) == expected
    assert evaluations(period=4, best=best) == [(3, 0), (7, 0), (9, 0)]
    assert evaluations(period=4, best=best, start=10)[-1][1] == 0  # a finished run, resumed


def best_of(folder, metric="png/AR", mode="max"):
    """A BestCheckpoint and the list of the iterations that it saved."""
    saved = []

    def save(iteration, name):
        assert name == "model_best"
        saved.append(iteration)

    return BestCheckpoint(save, folder, metric, mode), saved


@pytest.mark.parametrize(("mode", "expected"), [("max", [3, 5]), ("min", [3, 9])])
def test_the_best_is_kept(tmp_path, mode, expected):
    best, saved = best_of(tmp_path, mode=mode)
    scores = {1: float("nan"), 3: 1.0, 5: 3.0, 7: 2.0, 9: 0.5}
    evaluations(period=2, scores=scores, best=best)
    assert saved == expected
    content = json.loads((tmp_path / "best.json").read_text())
    assert content == {
        **{"metric": "png/AR", "mode": mode, "checkpoint": "model_best"},
        **{"iteration": expected[-1], "value": scores[expected[-1]]},
    }


def test_a_resumed_run_goes_on_from_the_best(tmp_path):
    first, _ = best_of(tmp_path)
    evaluations(period=2, scores={1: 9.0, 3: 2.0}, max_iter=4, best=first)
    second, saved = best_of(tmp_path)
    evaluations(period=2, scores={5: 8.0, 7: 10.0}, start=4, best=second)
    assert saved == [7]
    # a best of iterations that the run has gone back behind does not count
    third, saved = best_of(tmp_path)
    evaluations(period=2, scores={5: 8.0, 7: 10.0, 9: 0.0}, start=4, best=third)
    assert saved == [5, 7]
    # a new run in the folder, another metric, a damaged file: the best is looked for anew
    for start, metric in ((0, "png/AR"), (8, "png/acc")):
        fresh, _ = best_of(tmp_path, metric)
        fresh.start(start)
        assert fresh.value is None
    (tmp_path / "best.json").write_text('{"metric": "png/AR"')
    fresh, _ = best_of(tmp_path)
    fresh.start(8)
    assert fresh.value is None


def test_an_unknown_metric_is_named_and_does_not_end_the_run(tmp_path, gella_log):
    best, saved = best_of(tmp_path, "png/ARR")
    evaluations(period=5, best=best)
    assert saved == [] and not (tmp_path / "best.json").exists()
    assert "TEST.BEST_METRIC png/ARR is none of the scores (png/AR)" in gella_log.text


def test_wrong_keys(cfg, tmp_path):
    def refused(message, **test):
        changed = cfg.clone()
        for key, value in test.items():
            changed.TEST[key] = value
        with pytest.raises(ValueError, match=message):
            toy_run(changed)

    refused("TEST.BEST_MODE is 'most'", BEST_METRIC="a/b", BEST_MODE="most", EVAL_PERIOD=1)
    refused("TEST.EVAL_PERIOD is 0, so nothing is compared", BEST_METRIC="a/b")
    refused("TEST.SUBSET -1", SUBSET=-1)
    refused("TEST.EVAL_PERIOD is -2", EVAL_PERIOD=-2)
    hook = EvaluationInTraining(1, lambda n: {"a": {"b": "much"}})
    hook.trainer = SimpleNamespace(iter=0, max_iter=3)
    with pytest.raises(ValueError, match="a/b is 'much', not a number"):
        hook.after_step()
