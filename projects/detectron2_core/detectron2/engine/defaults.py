"""Command line, set-up of a job, and the trainer that is built from a config."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import weakref
from collections import OrderedDict

import torch
from detectron2 import evaluation
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import hooks
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase


def create_ddp_model(model: nn.Module, **kwargs) -> nn.Module:
    """Wrap the model for data parallel training; with one process it is returned as it is.

    ``kwargs`` go to ``DistributedDataParallel``; ``device_ids`` defaults to the local rank for a
    model on a GPU.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    kwargs.setdefault("device_ids", [comm.get_local_rank()] if on_gpu else None)
    return DistributedDataParallel(model, **kwargs)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the usual training options; what follows them goes to ``opts``."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=form)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="YAML config")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate, do not train")
    add("--num-gpus", type=int, default=1, help="GPUs (processes) per machine")
    add("--num-machines", type=int, default=1, help="machines in all")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # One port per user: a process left over from an earlier job shows as an occupied port.
    user = os.getuid() if hasattr(os, "getuid") else 1
    url = f"tcp://127.0.0.1:{2**15 + 2**14 + user % 2**14}"
    add("--dist-url", default=url, help="where rank 0 listens, or 'auto'")
    add("opts", nargs=argparse.REMAINDER, default=None, help="config changes: KEY VALUE ...")
    return parser


def default_setup(cfg, args: argparse.Namespace) -> None:
    """Make OUTPUT_DIR, start logging to it, save ``config.yaml``, seed by rank.

    Logs environment, arguments and full config. Sets cuDNN's benchmark mode (not for evaluation)
    and the float32 matrix product's precision as the config says.
    """
    rank, output_dir = comm.get_rank(), cfg.OUTPUT_DIR
    if comm.is_main_process() and output_dir:
        PathManager.mkdirs(output_dir)
    setup_logger(output_dir or None, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir or None, distributed_rank=rank)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    if comm.is_main_process() and output_dir:
        with PathManager.open(os.path.join(output_dir, "config.yaml"), "w") as file:
            file.write(cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION and torch.cuda.is_available():
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


def default_writers(output_dir: str, max_iter: int | None = None) -> list:
    """Return writers to the log, to ``metrics.json`` and to TensorBoard, both in the folder."""
    PathManager.mkdirs(output_dir)
    json = JSONWriter(os.path.join(output_dir, "metrics.json"))
    return [CommonMetricPrinter(max_iter), json, TensorboardXWriter(output_dir)]


class DefaultTrainer(TrainerBase):
    """The usual training, built from a config by the classmethods ``build_*``.

    A subclass must override ``build_optimizer`` and ``build_train_loader``, and to be evaluated
    ``build_test_loader`` and ``build_evaluator``. Attributes: ``cfg``, ``model``, ``optimizer``,
    ``data_loader``, ``scheduler``, ``checkpointer``, ``start_iter``, ``max_iter``.
    """

    def __init__(self, cfg) -> None:
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        reference, ranks = cfg.SOLVER.REFERENCE_WORLD_SIZE, comm.get_world_size()
        if reference not in (0, ranks):
            raise ValueError(f"SOLVER.REFERENCE_WORLD_SIZE {reference} != {ranks} ranks: set 0")
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        trainer = weakref.proxy(self)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=trainer)
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint of OUTPUT_DIR, or else load only MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1  # the stored iteration was completed

    def build_hooks(self) -> list[HookBase]:
        """Return timer, learning rate, checkpoints, evaluation and writers, in this order.

        Checkpoints come before the evaluation, which may fail; writers last, to see its results.
        """
        cfg = self.cfg
        if cfg.TEST.PRECISE_BN.ENABLED:
            raise ValueError("TEST.PRECISE_BN.ENABLED True needs the full Detectron2: set False")

        def evaluate() -> dict:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        built = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process():
            built.append(
                hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            )
        built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return built

    def build_writers(self) -> list:
        """Return ``default_writers`` for OUTPUT_DIR."""
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> OrderedDict | None:
        """Train; with TEST.EXPECTED_RESULTS, verify and return the last results on rank 0."""
        super().train(self.start_iter, self.max_iter)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            evaluation.verify_results(self.cfg, self._last_eval_results)
            return self._last_eval_results
        return None

    def run_step(self) -> None:
        """Let the inner trainer do its step."""
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self) -> dict:
        """Add the inner trainer's state."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the inner trainer's state as well."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """Build and log the model."""
        model = build_model(cfg)
        logging.getLogger(__name__).info(f"Model:\n{model}")
        return model

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer: torch.optim.Optimizer):
        """Build the schedule."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def _missing(cls, cfg, *args):
        """Stands for what a subclass must override (``build_evaluator`` only to be evaluated)."""
        raise NotImplementedError(f"{cls.__name__}: override the build_* method called here")

    build_optimizer = build_train_loader = build_test_loader = build_evaluator = _missing

    @classmethod
    def test(
        cls, cfg, model: nn.Module, evaluators: list[evaluation.DatasetEvaluator] | None = None
    ):
        """Evaluate on every set of DATASETS.TEST, by the given evaluators or ``build_evaluator``.

        Returns ``{dataset: results}``, or the results alone if there is one dataset.
        """
        names = cfg.DATASETS.TEST
        if isinstance(evaluators, evaluation.DatasetEvaluator):
            evaluators = [evaluators]
        if evaluators is not None and len(evaluators) != len(names):
            raise AssertionError(f"{len(names)} DATASETS.TEST but {len(evaluators)} evaluators")
        logger = logging.getLogger(__name__)
        results: OrderedDict = OrderedDict()
        for index, name in enumerate(names):
            loader = cls.build_test_loader(cfg, name)
            try:
                evaluator = evaluators[index] if evaluators else cls.build_evaluator(cfg, name)
            except NotImplementedError:
                logger.warning(f"No evaluator for {name}: pass one or override build_evaluator.")
                results[name] = {}
                continue
            results[name] = evaluation.inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info(f"Evaluation results for {name} in csv format:")
                evaluation.print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results


for _name in ("model", "data_loader", "optimizer"):  # of the inner trainer
    _get = functools.partial(lambda name, self: getattr(self._trainer, name), _name)
    _set = functools.partial(lambda name, self, value: setattr(self._trainer, name, value), _name)
    setattr(DefaultTrainer, _name, property(_get, _set))
