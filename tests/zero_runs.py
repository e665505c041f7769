"""A small GELLA that trains for a few steps, in one process or as one of several.

What is random or differs between a batch and its parts by design (sampled points, batch statistics)
is held fixed, and what jumps with rounding is left out, so that two processes and one must agree.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase, launch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from torch import nn

from gella import add_gella_config
from gella.data.sampling import task_at
from gella.engine.trainer import GellaTrainer
from gella.modeling.meta_arch import GELLA

ROOT = Path(__file__).resolve().parents[1]
RATIOS = [0.34, 0.33, 0.33]
STEPS = 3
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.IMAGE_ENCODER.WIDTH", 32, "MODEL.IMAGE_ENCODER.LAYERS", 2),
    *("MODEL.RESOBLEND.DIM", 32, "MODEL.MASK_DECODER.HIDDEN_DIM", 32),
    *("MODEL.MASK_DECODER.MASK_DIM", 32, "MODEL.MASK_DECODER.DECODER_LAYERS", 1),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", 32, "MODEL.LANGUAGE.INTERMEDIATE_SIZE", 64),
    *("MODEL.LANGUAGE.NUM_LAYERS", 2, "DATALOADER.NUM_WORKERS", 0),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", STEPS, "SOLVER.WARMUP_ITERS", 2),
    *("SOLVER.BASE_LR", 5e-3, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *("SOLVER.STEPS", (2,), "SOLVER.WARMUP_FACTOR", 0.5, "SOLVER.WEIGHT_DECAY", 0.1),
    *("SOLVER.HEADS_MULTIPLIER", 3.0, "DATASETS.TEST", ()),
]


def _look_everywhere(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    # Masked attention cuts at a probability of 0.5, which rounding can cross.
    return args, {**kwargs, "attn_mask": torch.zeros_like(kwargs["attn_mask"])}


@META_ARCH_REGISTRY.register()
class SteadyGELLA(GELLA):
    """GELLA without chance in its losses: fixed points, batch norms that use what they know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ticks = (torch.arange(12) + 0.5) / 12
        points = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).flatten(0, 1)
        self.criterion.terms.sample_points_using_uncertainty = lambda logits, *_: points.expand(
            len(logits), -1, -1
        )
        hungarian = self.criterion._hungarian

        def steady_hungarian(*args: Any) -> Any:
            torch.manual_seed(0)  # of the points at which masks are compared
            return hungarian(*args)

        self.criterion._hungarian = steady_hungarian
        for layer in self.mask_decoder.transformer.decoder.layers:
            layer.cross_attn.register_forward_pre_hook(_look_everywhere, with_kwargs=True)
        for name, parameter in self.named_parameters():
            if name.endswith("sampling_offsets.bias"):
                # Deformable attention starts by sampling at pixel centres, where the slope of
                # bilinear interpolation jumps.
                parameter.data += 0.37

    def train(self, mode: bool = True) -> SteadyGELLA:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class SteadyTrainer(GellaTrainer):
    """Steps in which the size of a gradient matters, and its rounding does not."""

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["eps"] = 1e-3  # Adam's default makes steps of full length out of rounding
        return optimizer


@META_ARCH_REGISTRY.register()
class PartlyFrozenGELLA(SteadyGELLA):
    """As for a decoder of billions: frozen CLIP and words, activations computed twice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_encoder.requires_grad_(False)
        llama = self.language_decoder.llama
        llama.get_input_embeddings().requires_grad_(False)
        llama.model.layers[0].requires_grad_(False)
        llama.gradient_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = llama.is_gradient_checkpointing


class Refusals(HookBase):
    """Says no to the last micro batch of iteration 0, and to the finished gradient of 2."""

    def before_train(self) -> None:
        self.trainer._trainer.guard = self

    def losses_ok(self, losses: Any, batch: Any) -> bool:
        inner = self.trainer._trainer
        return self.trainer.iter != 0 or inner.micro_step < inner.accumulate - 1

    def after_backward(self) -> None:
        self.trainer._trainer.drop_step |= self.trainer.iter == 2


class RefusingTrainer(SteadyTrainer):
    """Throws two of its steps away."""

    def build_hooks(self) -> list[Any]:
        return [*super().build_hooks(), Refusals()]


class Record(HookBase):
    """Keeps the scalars of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.rows.append({k: v for k, (v, _) in latest.items() if not k.endswith("time")})


def seed_of_all_tasks(steps: int = STEPS) -> int:
    """A seed whose first steps train every task."""
    return next(s for s in range(999) if len({task_at(s, i, RATIOS) for i in range(steps)}) == 3)


def make_cfg(tokenizer: str, output: str, options: list[Any]) -> Any:
    """The small config; ``options`` are appended keys and values."""
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "gella_tiny_shapes.yaml"))
    cfg.merge_from_list([*SMALL, "MODEL.META_ARCHITECTURE", "SteadyGELLA"])
    cfg.merge_from_list(["MODEL.LANGUAGE.TOKENIZER", tokenizer, "OUTPUT_DIR", output])
    cfg.merge_from_list(["DATALOADER.TASK_RATIOS", RATIOS, "SEED", seed_of_all_tasks()])
    cfg.merge_from_list(options)
    cfg.freeze()
    return cfg


def train(cfg: Any, trainer_class: type = SteadyTrainer) -> tuple[Any, list[dict[str, float]]]:
    """Train to the end; returns the trainer and the scalars of every step."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    # Every rank starts from other weights: they must become those of rank 0.
    torch.manual_seed(5 + comm.get_rank())
    trainer = trainer_class(cfg)
    record = Record()
    trainer.register_hooks([record])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer, record.rows


def run_all(runs: dict[str, dict[str, Any]], tokenizer: str, folder: str) -> None:
    """Train once per entry of ``runs``; each of several processes calls it."""
    torch.set_num_threads(1)
    for name, run in runs.items():
        cfg = make_cfg(tokenizer, f"{folder}/{name}", run["options"])
        trainer, rows = train(cfg, RefusingTrainer if run.get("refusing") else SteadyTrainer)
        report = {"rows": rows}
        if trainer._zero is not None:
            module = trainer._zero.engine.module
            report["dtype"] = str(next(module.parameters()).dtype)
            report["buffers"] = sorted({str(b.dtype) for b in module.buffers()})
            report["shares"] = sum(
                getattr(p, "ds_tensor", p).numel() for p in module.parameters()
            ) / sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
        if comm.is_main_process():
            Path(folder, name, "report.json").write_text(json.dumps(report))
        comm.synchronize()


def weights(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return torch.load(Path(folder, name, "model_final.pth"), weights_only=True)["model"]


if __name__ == "__main__":
    ONE, TWO, TOKENIZER, FOLDER = json.loads(sys.argv[1])
    run_all(ONE, TOKENIZER, FOLDER)
    launch(run_all, 2, dist_url="auto", args=(TWO, TOKENIZER, FOLDER))
