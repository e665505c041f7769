"""Losses and gradients that are not finite: stop or skip, on all ranks, with the images named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from detectron2.engine import HookBase, launch
from detectron2.utils import comm
from toy_run import toy_config, toy_run

from gella.engine.run_control import NonFiniteError, NonFiniteGuard, any_rank


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


def one_of_two(folder, policy):
    """One of two processes, the second of which meets a NaN in iteration 2."""
    cfg = toy_config(folder, iterations=5)
    cfg.SOLVER.NONFINITE = policy
    trainer, record = toy_run(cfg, {4 * 2 + 3: "loss"}), Record()
    trainer.register_hooks([record])
    try:
        trainer.train()
        error = ""
    except NonFiniteError as reason:
        error = str(reason)
    torch.save([record.after, error], folder / f"rank{comm.get_rank()}.pth")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_ranks_agree(tmp_path, monkeypatch, policy):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # else each process takes a GPU of its own
    launch(one_of_two, 2, dist_url="auto", args=(tmp_path, policy))
    (after, error), (other, other_error) = (
        torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2)
    )
    assert error == other_error and len(after) == len(other) == (2 if policy == "stop" else 5)
    assert all(same(a, b) for a, b in zip(after, other, strict=True))
    content = json.loads((tmp_path / "nonfinite_0000002.json").read_text())
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
