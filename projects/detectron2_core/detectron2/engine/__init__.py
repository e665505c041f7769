"""Training loop, hooks, defaults and the start of processes."""

from . import hooks
from .defaults import DefaultTrainer, create_ddp_model, default_argument_parser, default_setup
from .defaults import default_writers as default_writers
from .launch import DEFAULT_TIMEOUT, launch
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

__all__ = ["AMPTrainer", "DEFAULT_TIMEOUT", "DefaultTrainer", "HookBase", "SimpleTrainer"]
__all__ += ["TrainerBase", "create_ddp_model", "default_argument_parser", "default_setup"]
__all__ += ["default_writers", "hooks", "launch"]
