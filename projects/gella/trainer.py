"""Training and evaluation the Detectron2 way: the trainer, its hooks and the optimiser's groups."""

from __future__ import annotations

import logging
import os
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils import comm
from torch import nn

from gella.checkpoint import GellaCheckpointer
from gella.data.dataset_mapper import GroundingMapper
from gella.data.datasets import root_from_environment
from gella.data.entity_choice import choose_entities
from gella.data.exclusion import without_held_out
from gella.data.record_store import Records, concatenated
from gella.data.task_sampling import build_train_loader
from gella.data.unmatched import CountedLoader, UnmatchedPhrases
from gella.evaluation import asked_categories, build_evaluator, merge_datasets, task_for
from gella.evaluation.overlap import OverlappedEvaluator

# Parameters under this attribute of the model take SOLVER.LANGUAGE_MULTIPLIER.
LANGUAGE_PREFIX = "language_decoder."

__all__ = ["GellaTrainer", "GradientClipper", "IterationSeed", "build_optimizer", "load_records"]


class IterationSeed(HookBase):
    """Seed the random generators anew before each training forward pass.

    The seed depends on (``seed``, iteration, rank) alone, so that a resumed run draws the numbers
    of an uninterrupted one although no generator's state is stored. It is set between the data and
    the forward pass because starting a data loader draws a number too, once per start.
    """

    def __init__(self, seed: int) -> None:
        """``seed``: ``cfg.SEED``; a negative one leaves the generators alone, as in Detectron2."""
        self._seed = seed
        self._handle: Any = None

    def before_train(self) -> None:
        """Watch the model's forward passes."""
        if self._seed >= 0:
            self._handle = self.trainer.model.register_forward_pre_hook(self._reseed)

    def after_train(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _reseed(self, model: nn.Module, inputs: Any) -> None:
        if not model.training:
            return
        key = np.random.SeedSequence([self._seed, self.trainer.iter, comm.get_rank()])
        draws = key.generate_state(3)
        torch.manual_seed(int(draws[0]))
        np.random.seed(int(draws[1]))
        random.seed(int(draws[2]))


class GradientClipper(HookBase):
    """Clip gradients after the backward pass as ``SOLVER.CLIP_GRADIENTS`` says; log their norm.

    ``full_model`` scales all gradients by one factor so that their joint norm is at most
    ``CLIP_VALUE``; ``norm`` does so for each parameter alone, ``value`` clamps each number.
    """

    TYPES = ("full_model", "norm", "value")

    def __init__(self, clip_type: str, clip_value: float, norm_type: float) -> None:
        """The three keys of ``SOLVER.CLIP_GRADIENTS``; ValueError for an unknown type."""
        if clip_type not in self.TYPES:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip_type!r}: use one of {self.TYPES}"
            )
        self._type, self._value, self._norm = clip_type, clip_value, norm_type

    def after_backward(self) -> None:
        """Clip, and put ``grad_norm`` (before clipping, over all parameters) into the storage."""
        inner = self.trainer._trainer
        scaler = getattr(inner, "grad_scaler", None)
        if scaler is not None:
            scaler.unscale_(inner.optimizer)  # the limit is meant for the true gradients
        groups = inner.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters], self._norm)
        if self._type == "full_model":
            nn.utils.clip_grads_with_norm_(parameters, self._value, norm)
        elif self._type == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, self._value, self._norm)
        elif self._type == "value":
            nn.utils.clip_grad_value_(parameters, self._value)
        self.trainer.storage.put_scalar("grad_norm", float(norm))


class _ForwardAfterBackward(HookBase):
    """Hand the inner trainer's ``after_backward`` on to the hooks of the outer trainer.

    Detectron2's default trainer runs its steps in an inner trainer, and registers hooks outside.
    """

    def __init__(self, outer: GellaTrainer) -> None:
        self._outer = weakref.proxy(outer)

    def after_backward(self) -> None:
        self._outer.after_backward()


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each trainable parameter once: its name, itself, and whether it takes weight decay."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # Norms, biases and scales have one dimension or none.
            embedding = isinstance(module, nn.Embedding) or "embed" in leaf
            decays = parameter.ndim > 1 and not embedding
            yield f"{module_name}.{leaf}" if module_name else leaf, parameter, decays


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with up to four groups: language or vision, with or without weight decay.

    Args:
        cfg: ``SOLVER``: ``OPTIMIZER``, ``BASE_LR``, ``BETAS``, ``WEIGHT_DECAY``,
            ``LANGUAGE_MULTIPLIER``, ``VISION_MULTIPLIER``.
        model: parameters below ``language_decoder`` are language, all others vision; frozen ones
            are left out; norms, biases and embeddings do not decay.

    Raises:
        ValueError: another optimiser than ADAMW, or a model without a trainable parameter.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER.upper() != "ADAMW":
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: only ADAMW is known")
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter, decays in _named_parameters(model):
        key = (name.startswith(LANGUAGE_PREFIX), decays)
        members.setdefault(key, []).append(parameter)
    if not members:
        raise ValueError("every parameter of the model is frozen: there is nothing to train")
    groups = [
        {
            "params": parameters,
            "lr": solver.BASE_LR
            * (solver.LANGUAGE_MULTIPLIER if language else solver.VISION_MULTIPLIER),
            "weight_decay": solver.WEIGHT_DECAY if decays else 0.0,
        }
        for (language, decays), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    # One fused update instead of a dozen small ones per tensor: it matters for tiny models.
    return torch.optim.AdamW(groups, lr=solver.BASE_LR, betas=tuple(solver.BETAS), fused=True)


def load_records(names: Any, key: str, cfg: Any = None) -> Records:
    """Records of several registered datasets, in order.

    Args:
        names: dataset names.
        key: the config key that named them, "DATASETS.TRAIN" or "DATASETS.TEST".
        cfg: chooses the entities, see `choose_entities`, and the images that training leaves out
            (``DATASETS.EXCLUDE_REFCOCO_VAL_TEST``); None takes everything as annotated.

    Raises:
        ValueError: no name, no record at all, or images without masks in the chosen source.
        KeyError: a name that no catalog knows.
    """
    if not names:
        raise ValueError(f"{key} is empty: name at least one registered dataset")
    parts = [DatasetCatalog.get(name) for name in names]
    if cfg is not None:
        train = key == "DATASETS.TRAIN"
        if train and cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST:
            root = root_from_environment()
            parts = [without_held_out(part, name, root) for part, name in zip(parts, names)]
        parts = [choose_entities(p, name, cfg, is_train=train) for p, name in zip(parts, names)]
    records = concatenated(parts)
    if not records:
        raise ValueError(f"{key} {tuple(names)} has no record: check the annotation files")
    return records


class GellaTrainer(DefaultTrainer):
    """Detectron2's default trainer with GELLA's data, optimiser, evaluators and checkpoints.

    ``resume_or_load(resume=True)`` and ``train()`` continue an interrupted run to the weights of an
    uninterrupted one: the data order and all random numbers depend on the iteration alone.
    """

    def __init__(self, cfg: Any) -> None:
        """Build everything that ``cfg`` describes.

        Raises:
            ValueError: mixed precision without a CUDA device, and whatever the parts refuse.
        """
        if cfg.SOLVER.AMP.ENABLED and not str(cfg.MODEL.DEVICE).startswith("cuda"):
            raise ValueError(
                f"SOLVER.AMP.ENABLED needs a CUDA device but MODEL.DEVICE is {cfg.MODEL.DEVICE}:"
                " set SOLVER.AMP.ENABLED False"
            )
        super().__init__(cfg)
        self._trainer.register_hooks([_ForwardAfterBackward(self)])
        if cfg.SOLVER.AMP.ENABLED and torch.cuda.is_bf16_supported():
            # bfloat16 has float32's range and needs no loss scaling.
            self._trainer.precision = torch.bfloat16
            self._trainer.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks with seeding and clipping after the timer, over our checkpointer."""
        cfg = self.cfg
        # The base class has just made a checkpointer; the hooks below must see the strict one.
        self.checkpointer = GellaCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            allow_missing=cfg.MODEL.WEIGHTS_ALLOW_MISSING,
            allow_unexpected=cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED,
            trainer=weakref.proxy(self),
        )
        own: list[HookBase] = [IterationSeed(cfg.SEED), UnmatchedPhrases()]
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            own.append(GradientClipper(clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE))
        hooks = super().build_hooks()
        return [*hooks[:1], *own, *hooks[1:]]

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
        """Build the model of ``cfg`` on its device and log how many parameters it trains."""
        model = super().build_model(cfg)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logging.getLogger(__name__).info(
            "Parameters: %s, trained: %s", f"{total:,}", f"{trained:,}"
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Batches of one task each (Table 9), reproducible from (``SEED``, iteration)."""
        records = load_records(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", cfg)
        mapper = GroundingMapper(cfg, is_train=True)
        return build_train_loader(cfg, records=records, mapper=mapper, start_iteration=0)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """``TEST.IMS_PER_BATCH`` images at a time, mapped for the task of the dataset's evaluator.

        Raises:
            ValueError: the dataset's metadata has no evaluator type that is known here.
        """
        records = load_records([dataset_name], "DATASETS.TEST", cfg)
        # The names to ask for, where they are not the dataset's own.
        categories = asked_categories(cfg, dataset_name)
        loader = build_detection_test_loader(
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
        )
        return CountedLoader(loader, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        """The evaluators of the dataset's type; they write below ``OUTPUT_DIR/inference``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        evaluators = build_evaluator(cfg, dataset_name, folder)
        # While a GPU infers the CPU can score; on the CPU alone there is nothing to gain.
        gpu = str(cfg.MODEL.DEVICE).startswith("cuda") and torch.cuda.is_available()
        return OverlappedEvaluator(evaluators) if gpu else evaluators

    @classmethod
    def test(
        cls, cfg: Any, model: nn.Module, evaluators: Any = None
    ) -> dict[str, dict[str, float]]:
        """Evaluate on all of ``DATASETS.TEST``.

        Returns:
            ``{task: {metric: score}}`` over all datasets, on the main process. Where two datasets
            report the same task, the later one's key is ``task@dataset``.
        """
        results = super().test(cfg, model, evaluators)
        if len(cfg.DATASETS.TEST) == 1:
            return dict(results or {})
        return merge_datasets(results)
