"""A small GELLA that trains for a few steps, in one process or as one of several.

What is random or differs between a batch and its parts by design (sampled points, batch statistics)
is held fixed, and what jumps with rounding is left out, so that two processes and one must agree.

Called with a JSON list [tokenizer, folder, blocks]; a block is [processes, runs], a run {"name",
"options"} and, where needed, "refusing", or "from", the name of a run: its output folder is copied
as if it had ended after iteration 1, and resumed. A run's folder gets ``report.json`` and, apart
from all checkpoints, whole weights before its first step (``start.pth``) and after iteration 1
(``middle.pth``). Processes of a block with two also generate; see `test_zero.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
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
from gella.engine.evaluation_hooks import undisturbed
from gella.engine.trainer import GellaTrainer
from gella.engine.zero import ZeroHook
from gella.modeling.filling import empty_modules
from gella.modeling.language_decoder import IMAGE_TOKEN_ID, LanguageDecoder
from gella.modeling.meta_arch import GELLA

ROOT = Path(__file__).resolve().parents[1]
RATIOS = [0.34, 0.33, 0.33]
STEPS, MIDDLE = 4, 1
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.IMAGE_ENCODER.WIDTH", 32, "MODEL.IMAGE_ENCODER.LAYERS", 2),
    *("MODEL.RESOBLEND.DIM", 32, "MODEL.MASK_DECODER.HIDDEN_DIM", 32),
    *("MODEL.MASK_DECODER.MASK_DIM", 32, "MODEL.MASK_DECODER.DECODER_LAYERS", 1),
    *("MODEL.LANGUAGE.HIDDEN_SIZE", 32, "MODEL.LANGUAGE.INTERMEDIATE_SIZE", 64),
    *("MODEL.LANGUAGE.NUM_LAYERS", 2, "DATALOADER.NUM_WORKERS", 0),
    *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", STEPS, "SOLVER.WARMUP_ITERS", 2),
    *("SOLVER.BASE_LR", 5e-3, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
    *(
        "SOLVER.STEPS",
        (2,),
        "SOLVER.CHECKPOINT_PERIOD",
        2,
        "SOLVER.WARMUP_FACTOR",
        0.5,
        "SOLVER.WEIGHT_DECAY",
        0.1,
    ),
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


class Watch(HookBase):
    """Keeps the scalars of every step, and whole weights apart from all checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, []

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            self.keep("start")

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.rows.append({k: v for k, (v, _) in latest.items() if not k.endswith("time")})
        if self.trainer.iter == MIDDLE:
            self.keep("middle")

    def keep(self, name: str) -> None:
        trainer: Any = self.trainer

        def save() -> None:
            if comm.is_main_process():
                model = getattr(trainer.model, "module", trainer.model)
                torch.save(model.state_dict(), self.folder / f"{name}.pth")

        save() if trainer._zero is None else trainer._zero.save_whole(save)


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


def run(job: dict[str, Any], tokenizer: str, folder: str) -> None:
    """One run; every process calls it."""
    output = Path(folder, job["name"])
    if comm.is_main_process():
        if "from" in job:
            left_out = shutil.ignore_patterns("model_final.pth", "iter_0000003", "start.pth")
            shutil.copytree(Path(folder, job["from"]), output, ignore=left_out)
        output.mkdir(exist_ok=True)
    comm.synchronize()
    cfg = make_cfg(tokenizer, str(output), job["options"])
    # Every rank and every resumed run starts from other weights: they must become rank 0's, or
    # those of the checkpoint.
    torch.manual_seed((50 if "from" in job else 5) + comm.get_rank())
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gella").addHandler(handler)
    resume = "from" in job
    trainer = (RefusingTrainer if job.get("refusing") else SteadyTrainer)(cfg, resume=resume)
    watch = Watch(output)
    trainer.register_hooks([watch])
    empty = len(empty_modules(getattr(trainer.model, "module", trainer.model)))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    logging.getLogger("gella").removeHandler(handler)
    report = {"rows": watch.rows, "notes": notes, "start": trainer.start_iter, "empty": empty}
    if trainer._zero is not None:
        module = trainer._zero.engine.module
        report["training"] = all(part.training for part in module.modules())
        report["dtype"] = str(next(module.parameters()).dtype)
        report["buffers"] = sorted({str(b.dtype) for b in module.buffers()})
        shares = [
            (getattr(p, "ds_tensor", p).numel(), getattr(p, "ds_numel", p.numel()))
            for p in module.parameters()
        ]
        report["shares"] = sum(own for own, _ in shares) / sum(whole for _, whole in shares)
    if comm.is_main_process():
        (output / "report.json").write_text(json.dumps(report))
    comm.synchronize()


def run_all(jobs: list[dict[str, Any]], tokenizer: str, folder: str) -> None:
    """One run after the other; every process calls it."""
    torch.set_num_threads(1)
    for job in jobs:
        run(job, tokenizer, folder)
    if comm.get_world_size() > 1:
        answer_together(folder)


# -- answers of unequal length ---------------------------------------------------------------------


def tiny_decoder() -> nn.Module:
    """A model that is nothing but a tiny language decoder, with room for 20 tokens."""
    cfg = get_cfg()
    add_gella_config(cfg)
    node = cfg.MODEL.LANGUAGE
    node.VOCAB_SIZE, node.HIDDEN_SIZE, node.INTERMEDIATE_SIZE, node.INIT_STD = 50, 16, 32, 0.5
    node.NUM_LAYERS, node.NUM_HEADS, node.NUM_KEY_VALUE_HEADS = 2, 2, 2
    node.MAX_POSITIONS, node.PROJECTOR = 20, "linear"
    torch.manual_seed(3)
    model = nn.Module()
    model.language_decoder = LanguageDecoder(cfg, 8)
    return model.eval()


def generate(model: Any, lengths: list[int], most: int) -> list[list[int]]:
    """Answers to prompts of these lengths, image tokens included; no end token ends one."""
    ids = [torch.tensor([1, *[IMAGE_TOKEN_ID] * 4, *range(5, n)]) for n in lengths]
    grid = torch.full((len(ids), 8, 2, 2), 0.1 + comm.get_rank())
    options = dict(max_new_tokens=most, eos_token_id=60, pad_token_id=0, snippets=[[7, 8, 9]])
    return [x.tolist() for x in model.language_decoder.generate(grid, ids, **options)]


def all_answers(model: nn.Module) -> list[list[int]]:
    """First answers of unequal length; then one rank has a prompt that leaves room for 8 only."""
    rank = comm.get_rank()
    first = generate(model, [6 + rank], (3, 9)[rank])
    return [*first, *generate(model, ([6], [6, 12])[rank], 10)]


def answer_together(folder: str) -> None:
    """Each process generates, before the engine of stage 3 and under it, and writes what it got.

    Without the switch of ``undisturbed`` the longer answer waits for ever.
    """
    model, rank = tiny_decoder(), comm.get_rank()
    model.norm = nn.BatchNorm1d(2)
    model.norm.running_mean.fill_(1.0 + rank)
    before = all_answers(model)
    optimizer = torch.optim.AdamW(model.language_decoder.parameters())
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    hook = ZeroHook(model, "language_decoder", optimizer, optimizer.param_groups, config)
    hook.before_train()
    with torch.no_grad(), undisturbed(model):
        after = all_answers(model)
        assert model.norm.running_mean.tolist() == [1.0, 1.0]  # rank 0's, on both
    assert model.norm.running_mean.tolist() == [1.0 + rank] * 2
    decoder = hook.engine.module
    assert "generate" not in vars(decoder) and "generate" not in vars(decoder.llama)
    Path(folder, f"answers{rank}.json").write_text(json.dumps([before, after]))


if __name__ == "__main__":
    TOKENIZER, FOLDER, BLOCKS = json.loads(sys.argv[1])
    for processes, jobs in BLOCKS:
        launch(run_all, processes, dist_url="auto", args=(jobs, TOKENIZER, FOLDER))
