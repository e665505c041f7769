"""Training and evaluation the Detectron2 way: the trainer joins data, step and hooks."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, defaults
from detectron2.utils import comm
from torch import nn

from gella.data.mapper import GroundingMapper
from gella.data.records import Records, as_records, concatenated
from gella.data.refcoco import without_held_out
from gella.data.register import choose_entities, dataset_records, root_from_environment
from gella.data.sampling import build_train_loader
from gella.engine.checkpoint import FOLDER, CheckpointStore
from gella.engine.evaluation_hooks import (
    BestCheckpoint,
    EvaluationInTraining,
    RealSamples,
    build_even_loader,
    evenly_spaced,
    undisturbed,
    with_keys,
)
from gella.engine.hooks import GradientClipper, NonFiniteGuard, RunScalars, StopOnSignal
from gella.engine.memory import count_parameters
from gella.engine.optimizer import build_optimizer, split_language, with_epochs
from gella.engine.picture_panel import PicturePanel
from gella.engine.preflight import config_problems
from gella.engine.resume import RunCheckpoints
from gella.engine.step import StepTrainer
from gella.engine.zero import ZeroHook, hide_from_ddp, read_config
from gella.evaluation import TASKS, asked_categories, build_evaluator, merge_datasets, task_for
from gella.evaluation.results import amp_dtype
from gella.modeling.filling import built_empty, empty_modules
from gella.weights.checkpoint import load_weights

# The child of the model that SOLVER.ZERO.CONFIG puts under DeepSpeed.
LANGUAGE = "language_decoder"


def load_datasets(names: Any, key: str, cfg: Any = None) -> list[Records]:
    """Records of each of several registered datasets.

    Args:
        names: dataset names.
        key: the config key that named them, "DATASETS.TRAIN" or "DATASETS.TEST".
        cfg: chooses the entities, see `choose_entities`, and the images that training leaves out
            (``DATASETS.EXCLUDE_REFCOCO_VAL_TEST``); None takes everything as annotated.

    Raises:
        ValueError: no name or an unknown one, no record at all, a record without what the tasks
            need, or images without masks in the chosen source.
    """
    if not names:
        raise ValueError(f"{key} is empty: name at least one registered dataset")
    train = key == "DATASETS.TRAIN"
    kinds = ["" if train else MetadataCatalog.get(name).get("evaluator_type") for name in names]
    parts: list[Any] = [
        dataset_records(name, (), TASKS.get(kind, "")) for name, kind in zip(names, kinds)
    ]
    if cfg is not None:
        if train and cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST:
            root = root_from_environment()
            parts = [without_held_out(part, name, root) for part, name in zip(parts, names)]
        parts = [choose_entities(p, name, cfg, is_train=train) for p, name in zip(parts, names)]
    if not any(map(len, parts)):
        raise ValueError(f"{key} {tuple(names)} has no record: check the annotation files")
    return [as_records(part) for part in parts]


def load_records(names: Any, key: str, cfg: Any = None) -> Records:
    """The records of :func:`load_datasets`, one dataset after the other."""
    return concatenated(load_datasets(names, key, cfg))


class GellaTrainer(DefaultTrainer):
    """Detectron2's default trainer with GELLA's data, optimiser, evaluators and checkpoints.

    ``resume_or_load(resume=True)`` and ``train()`` continue an interrupted run to the weights of an
    uninterrupted one: the data order and all random numbers depend on the iteration alone.
    """

    cfg: Any
    _trainer: Any

    def __init__(self, cfg: Any, *, resume: bool = False) -> None:
        """Build everything that ``cfg`` describes.

        Where there are weights to load, ``MODEL.WEIGHTS`` or with ``resume`` a checkpoint, the
        language decoder is built empty, and :meth:`resume_or_load` must follow.

        Raises:
            ValueError: mixed precision without a CUDA device, a batch that cannot be divided, and
                whatever the parts refuse.
            ImportError: ``SOLVER.ZERO.CONFIG`` without DeepSpeed.
        """
        for problem in config_problems(cfg, comm.get_world_size()):
            raise ValueError(problem)
        self._zero: ZeroHook | None = None
        wrap = defaults.create_ddp_model
        if not str(cfg.MODEL.DEVICE).startswith("cuda"):
            # Detectron2's wrapper names a GPU unless told otherwise, which its trainer does not.
            defaults.create_ddp_model = functools.partial(wrap, device_ids=None)
        store = CheckpointStore(os.path.join(cfg.OUTPUT_DIR, FOLDER))
        loads = bool(cfg.MODEL.WEIGHTS) or (resume and bool(store.found()[0]))
        try:
            # Wrong records end the run before minutes of building the model.
            loader = self.build_train_loader(cfg)
            self.__dict__["build_train_loader"] = lambda cfg: loader
            with built_empty(loads):
                super().__init__(cfg)
        finally:
            defaults.create_ddp_model = wrap

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks in their order, Detectron2's among them by name.

        The base class calls it last, so everything that it built is replaced here.
        """
        self._compute_epochs()
        self._replace_step()
        cfg, solver, test = self.cfg, self.cfg.SOLVER, self.cfg.TEST
        detectron2 = {type(hook).__name__: hook for hook in super().build_hooks()}
        clip = solver.CLIP_GRADIENTS
        clipper = clip.ENABLED and GradientClipper(
            *(clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE),
            language_value=clip.LANGUAGE_VALUE,
            zero=self._zero,
        )
        guard = NonFiniteGuard(solver.NONFINITE, solver.NONFINITE_LIMIT, cfg.OUTPUT_DIR)
        self._trainer.guard = guard
        self.checkpoints = RunCheckpoints(cfg, zero=self._zero, loader=self._trainer.data_loader)
        best = test.BEST_METRIC and BestCheckpoint(
            self.checkpoints.save, cfg.OUTPUT_DIR, test.BEST_METRIC, test.BEST_MODE
        )
        hooks = [
            detectron2["IterationTimer"],
            self._zero,  # starts the engine, which the others save, clip and evaluate
            RunScalars(),  # the rates of this step: before the scheduler
            clipper,
            guard,  # looks at the norms that the clipper has put down
            detectron2["LRScheduler"],
            # From here on behind the scheduler, whose state is saved.
            StopOnSignal(self.checkpoints.save),  # before what takes time
            PicturePanel(cfg.VIS_PERIOD, cfg.OUTPUT_DIR) if cfg.VIS_PERIOD > 0 else None,
            detectron2.get("PreciseBN"),
            self.checkpoints,  # before a long evaluation
            EvaluationInTraining(
                test.EVAL_PERIOD,
                lambda images: self.test(with_keys(cfg, {"TEST.SUBSET": images}), self.model),
                subset=test.SUBSET,
                best=best or None,
            ),
            detectron2.get("PeriodicWriter"),  # of the main process; last, so that scores count
        ]
        return [hook for hook in hooks if hook]

    def _compute_epochs(self) -> None:
        """Set ``MAX_ITER`` and ``STEPS`` from ``SOLVER.EPOCHS``, now that the data are known."""
        records = getattr(self.data_loader, "dataset", ())
        cfg = with_epochs(self.cfg, len(records))
        if cfg is self.cfg:
            return
        self.cfg, self.max_iter = cfg, cfg.SOLVER.MAX_ITER
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        logging.getLogger(__name__).info(
            "%g epochs of %s images (%s) in batches of %d: SOLVER.MAX_ITER %d, SOLVER.STEPS %s",
            *(cfg.SOLVER.EPOCHS, f"{cfg.SOLVER.EPOCH_SIZE or len(records):,}"),
            "SOLVER.EPOCH_SIZE" if cfg.SOLVER.EPOCH_SIZE else "one per training record",
            *(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS),
        )

    def _replace_step(self) -> None:
        """Put our step in the place of Detectron2's, and the language decoder under ZeRO."""
        old, solver = self._trainer, self.cfg.SOLVER
        precision = amp_dtype(self.cfg)
        scaler = old.grad_scaler if precision is torch.float16 else None
        step = StepTrainer(
            old.model,
            old.data_loader,
            old.optimizer,
            accumulate=solver.ACCUMULATE,
            seed=self.cfg.SEED,
            precision=precision,
            grad_scaler=scaler,
        )
        step.outer = weakref.proxy(self)
        if solver.ZERO.CONFIG:
            if precision is torch.float16:
                raise ValueError("SOLVER.ZERO.CONFIG with SOLVER.AMP needs a GPU with bfloat16")
            parts = solver.ACCUMULATE * comm.get_world_size()
            config = read_config(
                solver.ZERO.CONFIG,
                micro_batch=solver.IMS_PER_BATCH // parts,
                accumulate=solver.ACCUMULATE,
                bf16=precision is not None,
            )
            model = getattr(old.model, "module", old.model)
            language, sources = split_language(old.optimizer)
            self._zero = ZeroHook(model, LANGUAGE, language, sources, config)
            step.zero = self._zero
        self._trainer = step

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the newest complete checkpoint of ``OUTPUT_DIR``, or load MODEL.WEIGHTS.

        Raises:
            ValueError: there are checkpoints and none is complete, or the files do not fit, or
                there is nothing to load and ``MODEL.FROM_SCRATCH`` is off.
        """
        newest = self.checkpoints.store.newest() if resume else None
        if newest:
            self.checkpoints.resume(newest.path)
            self.start_iter = self.iter + 1  # the stored iteration was completed
        elif self.cfg.MODEL.WEIGHTS:
            divider = self._zero and self._zero.divider()
            load_weights(self.model, self.cfg.MODEL.WEIGHTS, self.cfg, divider)
        elif not self.cfg.MODEL.FROM_SCRATCH:
            raise ValueError(
                "MODEL.WEIGHTS is empty: name the weights to start from, or set MODEL.FROM_SCRATCH"
                " True to train a model of random ones"
            )

    def train(self) -> dict[str, dict[str, float]] | None:
        """Train from ``start_iter`` to the end.

        Returns:
            ``{task: {metric: score}}`` of the final evaluation on the main process, or None.
        """
        # The loader draws batch i from (seed, i), so a resumed run sees what it had not seen.
        self._trainer.data_loader.start_iteration = self.start_iter
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Build the model of ``cfg`` on its device and log how many parameters it trains.

        A language decoder that is built empty has the precision that it trains in: bfloat16 where
        ZeRO keeps its weights so (``SOLVER.AMP``), else ``MODEL.LANGUAGE.DTYPE``.
        """
        model = super().build_model(cfg)
        decoders, bf16 = empty_modules(model).values(), False
        if cfg.SOLVER.ZERO.CONFIG:
            hide_from_ddp(model, LANGUAGE)
            config = read_config(cfg.SOLVER.ZERO.CONFIG, bf16=cfg.SOLVER.AMP.ENABLED)
            bf16 = bool(config.get("bf16", {}).get("enabled"))
        for decoder in decoders:
            if not cfg.SOLVER.ZERO.CONFIG:
                # DistributedDataParallel takes the parameters' memory as it finds it.
                decoder.allocate(torch.device(cfg.MODEL.DEVICE))
            for parameter in decoder.parameters() if bf16 else ():
                parameter.data = parameter.data.bfloat16()
        counts = (f"{count:,}" for count in count_parameters(model))
        logging.getLogger(__name__).info("Parameters: %s, trained: %s", *counts)
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Batches of one task (Table 9) and dataset, reproducible from (``SEED``, iteration)."""
        datasets = load_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", cfg)
        mapper = GroundingMapper(cfg, is_train=True)
        return build_train_loader(cfg, datasets=datasets, mapper=mapper, start_iteration=0)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """``TEST.IMS_PER_BATCH`` images at a time, mapped for the task of the dataset's evaluator.

        Raises:
            ValueError: the dataset's metadata has no evaluator type that is known here.
        """
        records = load_records([dataset_name], "DATASETS.TEST", cfg)
        records = evenly_spaced(records, cfg.TEST.SUBSET)
        # The names to ask for, where they are not the dataset's own.
        categories = asked_categories(cfg, dataset_name)
        return build_even_loader(
            records,
            mapper=GroundingMapper(
                cfg,
                is_train=False,
                dataset_names=[dataset_name],
                task=task_for(cfg, dataset_name),
                **({} if categories is None else {"categories": categories}),
            ),
            batch_size=cfg.TEST.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            name=dataset_name,
        )

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        """The evaluators of the dataset's type; they write below ``OUTPUT_DIR/inference``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return RealSamples(build_evaluator(cfg, dataset_name, folder))

    @classmethod
    def test(
        cls, cfg: Any, model: nn.Module, evaluators: Any = None
    ) -> dict[str, dict[str, float]]:
        """Evaluate on ``DATASETS.TEST``, of each set ``TEST.SUBSET`` images, in the precision of
        training; the model and the random generators are left as they were.

        Returns:
            ``{task: {metric: score}}`` over all datasets, on the main process. Where two datasets
            report the same task, the later one's key is ``task@dataset``.
        """
        device, dtype = str(cfg.MODEL.DEVICE).split(":")[0], amp_dtype(cfg)
        with undisturbed(model), torch.autocast(device, dtype, enabled=dtype is not None):
            results = super().test(cfg, model, evaluators)
        if len(cfg.DATASETS.TEST) == 1:
            return dict(results or {})
        return merge_datasets(results)
