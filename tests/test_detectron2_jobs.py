"""Detectron2's metrics, logging, inference loop and start of jobs.

Every test holds for the small core and for the real Detectron2 alike (run with either first on
the path), which is what makes the core a stand-in. Expected values are written out, not computed
by the code under test.
"""

from __future__ import annotations

import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import (
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    launch,
)
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)
from detectron2.utils.logger import log_every_n_seconds, setup_logger
from detectron2_toys import Loader, SumEvaluator, ToyModel
from torch import nn

from gella.engine.launch import leave_process_group


def test_event_storage_and_json_writer(tmp_path):
    assert not has_event_storage()
    with pytest.raises(AssertionError):
        get_event_storage()
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path), window_size=3)
    with EventStorage(10) as storage:
        assert get_event_storage() is storage and has_event_storage()
        for i, value in enumerate([5.0, 1.0, 9.0, 2.0]):
            storage.iter = 10 + i
            storage.put_scalar("loss", value)
            storage.put_scalars(lr=value / 10, smoothing_hint=False)
        storage.put_scalar("early", 7.0, cur_iter=11)
        writer.write()
        writer.write()  # nothing new, nothing written
        assert storage.latest()["loss"] == (2.0, 13)
        assert storage.history("loss").latest() == 2.0 and set(storage.histories()) >= {"lr"}
        assert storage.count_samples("loss", 3) == 3
        assert storage.latest_with_smoothing_hint(3)["loss"] == (2.0, 13)  # median of 1, 9, 2
        with pytest.raises(KeyError):
            storage.history("absent")
        with pytest.raises(AssertionError):
            storage.put_scalar("lr", 0.1)  # with the other hint
        storage.iter = 14
        storage.put_scalar("loss", 8.0)
        writer.write()
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(rows, key=lambda row: row["iteration"]) == [
        {"early": 7.0, "iteration": 11},
        {"iteration": 13, "loss": 2.0, "lr": 0.2},
        {"iteration": 14, "loss": 8.0},
    ]


def test_printer_and_tensorboard(tmp_path, caplog):
    logger = logging.getLogger("detectron2.utils.events")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    board = TensorboardXWriter(str(tmp_path / "board"))
    with EventStorage(4) as storage:
        storage.put_scalars(total_loss=1.5, loss_mask=0.25, time=2.0, data_time=0.5, accuracy=9.0)
        storage.put_scalar("lr", 1e-3, smoothing_hint=False)
        CommonMetricPrinter(max_iter=35).write()
        board.write()
        line = caplog.messages[-1]
        for part in ("eta: 0:01:00", "iter: 4", "total_loss: 1.5", "loss_mask: 0.25", "lr: 0.001"):
            assert part in line
        assert "accuracy" not in line
        storage.iter = 35
        count = len(caplog.messages)
        CommonMetricPrinter(max_iter=35).write()  # the training has ended
        assert len(caplog.messages) == count
    board.close()
    logger.removeHandler(caplog.handler)
    assert any("tfevents" in name for name in os.listdir(tmp_path / "board"))


def test_loggers_write_files_once_per_rank(tmp_path):
    logger = setup_logger(str(tmp_path), name="core_test_log")
    assert setup_logger(str(tmp_path), name="core_test_log") is logger and len(logger.handlers) == 2
    other = setup_logger(str(tmp_path), distributed_rank=1, name="core_test_log.rank")
    other.info("from one")
    logger.debug("from zero")
    for handler in [*logger.handlers, *other.handlers]:
        handler.flush()
    text = (tmp_path / "log.txt").read_text()
    assert text.count("from zero") == 1 and "from one" not in text and "core_test_log" in text
    assert "from one" in (tmp_path / "log.txt.rank1").read_text()


def test_log_every_n_seconds_is_per_line_of_code(caplog):
    with caplog.at_level(logging.INFO, logger="core_test_rate"):
        for _ in range(3):
            log_every_n_seconds(logging.INFO, "often", n=1000, name="core_test_rate")
        log_every_n_seconds(logging.INFO, "other line", n=1000, name="core_test_rate")
    assert caplog.messages == ["often", "other line"]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_inference_sees_every_sample_once_in_eval_mode(count):
    model = ToyModel(None)
    loader = build_detection_test_loader(
        [{"v": i} for i in range(count)], mapper=lambda d: torch.tensor(float(d["v"])), batch_size=2
    )
    assert len(loader) == (count + 1) // 2
    seen = []

    class Check(SumEvaluator):
        def process(self, inputs, outputs):
            assert not model.training and not torch.is_grad_enabled()
            seen.extend(x.item() for x in inputs)
            super().process(inputs, outputs)

    results = inference_on_dataset(model, loader, Check())
    assert seen == list(range(count)) and model.training
    assert results["sum"]["count"] == count
    total = sum(range(count)) * model.weight.sum().item()
    assert results["sum"]["total"] == pytest.approx(total, abs=1e-4)
    assert inference_on_dataset(lambda batch: batch, loader, None) == {}


def test_inference_merges_evaluators_and_refuses_equal_keys():
    loader = build_detection_test_loader([torch.ones(1)], mapper=None)

    class Other(SumEvaluator):
        def evaluate(self):
            return {"other": {"x": 1.0}}

    class Silent(DatasetEvaluator):
        pass

    model = ToyModel(None)
    results = inference_on_dataset(model, loader, [SumEvaluator(), Other(), Silent()])
    assert set(results) == {"sum", "other"}
    assert inference_on_dataset(model, loader, Silent()) == {}
    with pytest.raises(AssertionError):
        inference_on_dataset(model, loader, DatasetEvaluators([Other(), Other()]))
    model.eval()
    with inference_context(model):
        assert not model.training
    assert not model.training


def test_results_are_flattened_printed_and_verified(caplog):
    results = {"a": {"b": 1.0, "c": {"d": 2.0}}, "e": {}}
    assert flatten_results_dict(results) == {"a/b": 1.0, "a/c/d": 2.0}
    logger = logging.getLogger("detectron2.evaluation.testing")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        print_csv_format({"task": {"AP": 12.34567, "AP-cat": 1.0, "AR": 5.0}})
    logger.removeHandler(caplog.handler)
    lines = list(dict.fromkeys(caplog.messages))
    assert lines == ["copypaste: Task: task", "copypaste: AP,AR", "copypaste: 12.3457,5.0000"]
    cfg = get_cfg()
    assert verify_results(cfg, {})
    cfg.TEST.EXPECTED_RESULTS = [["task", "AP", 12.0, 0.5]]
    assert verify_results(cfg, {"task": {"AP": 12.4}})
    for wrong in ({"AP": 12.6}, {"AP": math.nan}, {}):
        with pytest.raises(SystemExit):
            verify_results(cfg, {"task": wrong})


def test_argument_parser_and_setup(tmp_path):
    args = default_argument_parser().parse_args(
        ["--config-file", "", "--num-gpus", "2", "--resume", "SEED", "7"]
    )
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (2, 1, 0)
    assert args.resume and not args.eval_only and args.opts == ["SEED", "7"]
    assert args.dist_url.startswith("tcp://127.0.0.1:")
    cfg = get_cfg()
    cfg.merge_from_list(args.opts + ["OUTPUT_DIR", str(tmp_path / "out")])
    default_setup(cfg, args)
    first = (torch.rand(2).tolist(), np.random.rand())
    saved = get_cfg()
    saved.merge_from_file(str(tmp_path / "out" / "config.yaml"))
    assert saved.SOLVER == cfg.SOLVER and saved.SEED == 7
    assert (tmp_path / "out" / "log.txt").exists()
    default_setup(cfg, args)
    assert (torch.rand(2).tolist(), np.random.rand()) == first
    for name in ("detectron2", "fvcore"):  # other tests shall not write to this file
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def test_one_process_needs_no_group():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process() and comm.get_local_size() == 1
    assert comm.gather("x") == ["x"] and comm.all_gather("x") == ["x"]
    comm.synchronize()
    assert 0 <= comm.shared_random_seed() < 2**31
    model = nn.Linear(1, 1)
    assert create_ddp_model(model) is model
    called = []
    launch(lambda *args: called.append(args), 1, args=(1, "a"))
    assert called == [(1, "a")]


def _two_processes(folder):
    """Runs in each of two processes; what they see goes to files."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    np.random.seed(rank)
    model = ToyModel(None)
    ddp = create_ddp_model(model, device_ids=None)
    checkpointer = DetectionCheckpointer(ddp, folder)
    checkpointer.save("ddp")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    trainer = SimpleTrainer(ddp, Loader(rank), optimizer)
    trainer.train(0, 1)
    total = trainer.storage.latest().get("total_loss", (None,))[0]
    loader = build_detection_test_loader([torch.tensor(float(i)) for i in range(5)], mapper=None)
    values = [batch[0].item() for batch in loader]
    report = {
        "sizes": [comm.get_world_size(), comm.get_local_size(), comm.get_local_rank()],
        "main": comm.is_main_process(),
        "gather": comm.gather(rank),
        "all_gather": comm.all_gather({"rank": rank}),
        "seed": int(comm.shared_random_seed()),
        "weight": model.weight.tolist(),
        "total_loss": total,
        "values": values,
        "samplers": [list(InferenceSampler(n)) for n in (1, 2, 3)],
    }
    comm.synchronize()
    with open(os.path.join(folder, f"rank{rank}.json"), "w") as file:
        json.dump(report, file)
    leave_process_group()  # the original would leave the group to the end of the interpreter


@pytest.mark.skipif(
    0 < torch.cuda.device_count() < 2, reason="launch gives each process its own GPU, here is one"
)
def test_launch_two_processes(tmp_path):
    launch(_two_processes, 2, dist_url="auto", args=(str(tmp_path),))
    zero, one = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert zero["sizes"] == [2, 2, 0] and one["sizes"] == [2, 2, 1]
    assert zero["main"] and not one["main"]
    assert zero["gather"] == [0, 1] and one["gather"] == []
    assert zero["all_gather"] == one["all_gather"] == [{"rank": 0}, {"rank": 1}]
    assert zero["seed"] == one["seed"]
    assert zero["values"] == [0, 1, 2] and one["values"] == [3, 4]
    assert zero["samplers"] == [[0], [0], [0, 1]] and one["samplers"] == [[], [1], [2]]
    # gradients are averaged, so the step equals one on the mean of both losses
    start = ToyModel(None).weight.detach()
    targets = [0.0, (7 % 5 + 1) / 2]
    step = sum(2 * (start - target) + start.sign() for target in targets) / 2
    assert zero["weight"] == one["weight"] == pytest.approx((start - 0.1 * step).tolist())
    losses = [((start - t) ** 2).sum() + start.abs().sum() for t in targets]
    assert zero["total_loss"] == pytest.approx(float(sum(losses)) / 2) and one["total_loss"] is None
    assert set(torch.load(tmp_path / "ddp.pth", weights_only=True)["model"]) == {
        "weight",
        "pixel_mean",
    }
