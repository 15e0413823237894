"""Official modules by paper: our implementation under the official class name, arguments, names and call.

A paper's file puts ``@official("davit", "SpatialBlock")`` on a function that takes the official constructor's
arguments, and the call arguments that a golden fixes, and returns the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnc.errors import DeclarationError, ShapeError
from attnc.models.registry import call, discover


@dataclass(frozen=True, slots=True)
class Official:
    """How to build an official class, and which of its inputs and buffers follow from the config."""

    build: Callable[..., nn.Module]
    ignores: frozenset[str]
    derived: tuple[str, ...]


_officials: dict[tuple[str, str], Official] = {}
Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def official(
    slug: str, module: str, *, ignores: tuple[str, ...] = (), derived: tuple[str, ...] = ()
) -> Callable[[Builder], Builder]:
    """Register the decorated builder for the official class `module` of the paper `slug`.

    Args:
        slug: the paper, e.g. ``"davit"``; the file that registers it is named alike (``-`` becomes ``_``).
        module: the official class, e.g. ``"SpatialBlock"``.
        ignores: arguments of the official constructor or call that change nothing here, or follow from the
            config. They are accepted and dropped, as are `H`, `W`, `size`, wherever our signature lacks them.
        derived: name patterns (``"*.num_batches_tracked"``) of official buffers that follow from the config:
            a state dict may lack them, and one that we do not keep is dropped.
    """

    def register(build: Builder) -> Builder:
        if (slug, module) in _officials:
            raise DeclarationError(f"official module {slug}/{module} is registered twice")
        _officials[slug, module] = Official(build, frozenset(ignores) | {"H", "W", "size"}, derived)
        return build

    return register


def load_official(
    slug: str,
    module: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    backend: str = "auto",
) -> nn.Module:
    """Build our module for an official class and load the official weights into it.

    Args:
        slug: the paper, e.g. ``"davit"``.
        module: the official class name, e.g. ``"SpatialBlock"``.
        config: the official constructor's arguments, and call arguments that are fixed (such as ``size``).
        state_dict: the official state dict; parameters keep these names in ``named_parameters()``.
        backend: of the attnc operators; reaches builders that have an argument of this name.

    Returns:
        The module in evaluation mode, with the dtype and on the device of the state dict. Its forward takes
        the official inputs by name and returns a tensor, or a dict of them by output name.

    Raises:
        DeclarationError: the class is unknown, or the config does not fit it.
        ShapeError: the state dict lacks a key, has one too many, or one of another shape; each is named.
    """
    discover(slug.replace("-", "_"))
    if (slug, module) not in _officials:
        discover()
    entry = _officials.get((slug, module))
    if entry is None:
        known = [m for s, m in _officials if s == slug]
        papers = sorted({s for s, _ in _officials})
        have = f"{slug} has {', '.join(known)}" if known else f"papers: {', '.join(papers)}"
        raise DeclarationError(f"no official module {module!r} of {slug!r} is implemented; {have}")
    what = f"official module {slug}/{module}"
    taken = signature(entry.build).parameters
    arguments = {name: value for name, value in config.items() if name in taken or name not in entry.ignores}
    if "backend" in taken:
        arguments["backend"] = backend
    built = call(entry.build, arguments, what)
    _load(built, state_dict, entry.derived, what)
    ignored = entry.ignores.difference(signature(built.forward).parameters)
    built.register_forward_pre_hook(partial(_drop_inputs, ignored), with_kwargs=True)
    return built.eval()


def on_tokens(module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Let a module on maps ``[B, H, W, C]`` be called on tokens ``x [B, H*W, C]``, as official ones are."""
    module.register_forward_pre_hook(partial(_to_map, (size[0], size[1])), with_kwargs=True)
    module.register_forward_hook(_to_tokens)
    return module


def tokens(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`build` for official modules on tokens ``[B, H*W, C]`` where ours are on maps, see `on_tokens`.

    The result takes the arguments of `build` and `H`, `W`, the size of the call's map; `input_resolution`, which many
    official constructors take, stands in for them.
    """
    own = signature(build)

    def built(*, H: int | None = None, W: int | None = None, **arguments: Any) -> nn.Module:
        if "input_resolution" in arguments:
            arguments["input_resolution"] = tuple(arguments["input_resolution"])
        rows, columns = arguments.get("input_resolution", (None, None))
        size = (H if H is not None else rows, W if W is not None else columns)
        if None in size:
            raise DeclarationError("the size of the map is not given: H and W, or input_resolution")
        if "input_resolution" not in own.parameters:
            arguments.pop("input_resolution", None)
        return on_tokens(build(**arguments), (size[0], size[1]))

    extra = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("H", "W", "input_resolution")]
    extra = [p for p in extra if p.name not in own.parameters]
    built.__signature__ = Signature([*own.parameters.values(), *extra])  # type: ignore[attr-defined]
    return built


def _load(module: nn.Module, state: Mapping[str, Tensor], derived: tuple[str, ...], what: str) -> None:
    own = module.state_dict()

    def given(name: str) -> bool:
        return not any(fnmatchcase(name, pattern) for pattern in derived)

    faults = [f"{name!r} is missing" for name in own if name not in state and given(name)]
    faults += [f"{name!r} is not one of its keys" for name in state if name not in own and given(name)]
    faults += [
        f"{name!r} has shape {list(value.shape)} instead of {list(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ShapeError(f"{what}: the state dict does not fit: {shown}; check it against the config")
    floating = [value for value in state.values() if value.is_floating_point()]
    if floating:
        module.to(floating[0].device, floating[0].dtype)
    module.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _drop_inputs(drop: frozenset[str], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    return args, {name: value for name, value in kwargs.items() if name not in drop}


def _to_map(size: tuple[int, int], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    x, *rest = (kwargs.pop("x"), *args) if "x" in kwargs else args
    if x.shape[1] != size[0] * size[1]:
        raise ShapeError(f"x has {x.shape[1]} tokens, its size {size} says {size[0] * size[1]}")
    return (x.unflatten(1, size), *rest), kwargs


def _to_tokens(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
    return torch.flatten(out, 1, 2)
