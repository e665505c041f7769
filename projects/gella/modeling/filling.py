"""Modules that are built without memory for their parameters, and get it with their values.

A language model of billions of parameters is otherwise filled with random numbers first, which
takes minutes, and is in memory twice while its weights are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_building_empty: ContextVar[bool] = ContextVar("building_empty", default=False)


@contextlib.contextmanager
def built_empty(empty: bool = True) -> Iterator[None]:
    """A :class:`Fillable` that is built in this block is empty, unless ``empty`` is False."""
    token = _building_empty.set(empty)
    try:
        yield
    finally:
        _building_empty.reset(token)


class Fillable(nn.Module):
    """A module that can be built empty: its parameters are on the meta device until :meth:`fill`.

    Buffers are real: no file of weights has those that follow from the configuration. A subclass
    makes its parts inside ``with self.building()``, and says how they are initialised.

    Attributes:
        is_empty: :meth:`fill` is still due.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_empty = _building_empty.get()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Parameters made in this block are on meta if this module is empty."""

        def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Tensor | None:
            if parameter is None or parameter.is_meta:
                return None  # as it is: what is tied stays tied
            return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

        with contextlib.ExitStack() as stack:
            if self.is_empty:
                stack.callback(register_module_parameter_registration_hook(to_meta).remove)
            yield

    def device_of(self, name: str, device: torch.device) -> torch.device:
        """Where the submodule of this name is to be, if the whole goes to ``device``."""
        return device

    def initialise(self, name: str, module: nn.Module) -> None:
        """Give a submodule's own parameters the values that the constructor gives them."""
        raise NotImplementedError

    def allocate(self, device: torch.device) -> None:
        """Give all parameters memory without values, for what must find it before it is filled.

        They stay the same objects, also to an optimiser that has them.
        """
        for name, module in self.named_modules():
            for parameter in module.parameters(recurse=False):
                _allocate(parameter, self.device_of(name, device))

    @torch.no_grad()
    def fill(
        self,
        weights: Mapping[str, Tensor] | None,
        device: torch.device,
        *,
        seed: int,
        settle: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        """Give all parameters memory and values, one submodule at a time.

        Args:
            weights: by the keys of ``state_dict()`` and of its shapes; mapped files are read as
                they are copied. What they lack is initialised. None: the values follow later, until
                then they are NaN.
            device: where the parameters are to be.
            seed: of what is initialised; the random generators are left as they were.
            settle: gets each parameter once it has its value; may divide it among processes.
        """
        keys: dict[int, list[str]] = {}  # two, where matrices are tied
        for key, tensor in self.state_dict(keep_vars=True).items():
            keys.setdefault(id(tensor), []).append(key)
        given = {i: weights[k] for i, ks in keys.items() for k in ks if weights and k in weights}
        done: set[int] = set()
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(seed)
            for name, module in self.named_modules():
                own = [p for p in module.parameters(recurse=False) if id(p) not in done]
                for parameter in own:
                    _allocate(parameter, self.device_of(name, device))
                    if weights is None:
                        parameter.fill_(torch.nan)
                if weights is not None and any(id(p) not in given for p in own):
                    self.initialise(name, module)
                for tensor in (*own, *module.buffers(recurse=False)):
                    if id(tensor) in given:
                        tensor.copy_(given[id(tensor)])
                for parameter in own:
                    done.add(id(parameter))
                    if settle is not None:
                        settle(parameter)
        self.is_empty = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # What has no memory yet cannot be moved.
        return super()._apply(lambda x: x if self.is_empty and x.is_meta else fn(x), recurse)


def empty_modules(model: nn.Module) -> dict[str, Fillable]:
    """What in a model waits for :meth:`Fillable.fill`, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Fillable)}
    return {name: module for name, module in found.items() if module.is_empty}


def _allocate(parameter: nn.Parameter, device: torch.device) -> None:
    if parameter.is_meta:
        memory = torch.empty_like(parameter, device=device)
        torch.utils.swap_tensors(parameter, nn.Parameter(memory, parameter.requires_grad))
