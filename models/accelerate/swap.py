"""Walking through a model, and turning its modules into what computes the same by attnc."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

from torch import nn

from attnc.compiler import Operator
from attnc.errors import AttncError, DeclarationError
from attnc.models.accelerate.report import Report, Row

PACKAGE = __name__.rpartition(".")[0]
FAMILIES = {  # where classes are defined: the file of this folder that knows them
    "timm.layers.attention": "timm_vit",
    "timm.models.convit": "timm_convit",
    "timm.models.crossvit": "timm_crossvit",
    "timm.models.davit": "timm_davit",
    "timm.models.efficientvit_msra": "timm_efficientvit_msra",
    "timm.models.gcvit": "timm_gcvit",
    "timm.models.maxxvit": "timm_maxvit",
    "timm.models.shvit": "timm_shvit",
    "timm.models.swin_transformer": "timm_swin",
    "timm.models.swin_transformer_v2": "timm_swin",
    "timm.models.tnt": "timm_tnt",
    "timm.models.vision_transformer": "timm_vit",
    "timm.models.volo": "timm_volo",
    "torchvision.models.swin_transformer": "torchvision_swin",
}
ATTENTION = re.compile("Attention|Attn|MHSA|SHSA|GPSA")  # in the names of classes that compute attention
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Accelerated:
    """What a module becomes: a mixin before the module's own class, whose methods it overrides.

    covers: submodules that are not called any more, because an operator does their work.
    """

    covers: ClassVar[tuple[str, ...]] = ()
    attnc_backend: str

    def refuse(self) -> str:
        """Why this module stays as it is (asked of the original); nothing where nothing speaks against it."""
        return ""

    def build(self) -> tuple[Operator, ...]:
        """Make the operators from the module's settings, keep them as attributes, and return them."""
        raise NotImplementedError

    def remark(self) -> str:
        """In which calls the original's code runs."""
        return ""


_replacements: dict[type, type[Accelerated]] = {}
Class = TypeVar("Class", bound=type[Accelerated])
Model = TypeVar("Model", bound=nn.Module)


def replaces(original: type) -> Any:
    """Register the decorated subclass of `original` (and of `Accelerated`) as what its instances become."""

    def register(cls: Class) -> Class:
        _replacements[original] = cls
        return cls

    return register


def drops(drop: Any) -> bool:
    """Whether this dropout of attention weights does something now, which no operator does."""
    return bool(drop.training and drop.p > 0)


def dropout_remark(p: float) -> str:
    """For `Accelerated.remark`."""
    return f"the original where attention weights are dropped (p = {p:g}, in training)" if p else ""


def accelerate(model: Model, *, backend: str = "auto") -> tuple[Model, Report]:
    """Let attnc compute the attention modules that it knows, in place: same weights, same outputs, gradients as before.

    Args:
        model: of timm (davit, maxvit, gcvit, crossvit, convit, volo, efficientvit_msra, shvit, tnt, swin, swinv2, vit and
            deit) or torchvision (swin, swin v2), or anything that contains such modules.
        backend: of the operators, see `attnc.compile`.

    Returns:
        The model itself, and a report of every attention module in it: what computes it now, or why it was left alone.
        Parameters and buffers stay the same objects under the same names, so checkpoints and optimizers go on working.

    Raises:
        DeclarationError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise DeclarationError(f"accelerate: the model is a {type(model).__name__}, not a torch.nn.Module")
    report = Report(type(model).__name__)
    covered: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        if module in covered or type(module).__module__.startswith("attnc.") and not isinstance(module, Accelerated):
            continue
        kind = _name(type(module))
        try:
            replacement = _replacement(type(module))
            if replacement is not None:
                report.rows.append(_swap(path, kind, module, replacement, backend))
                covered.update(s for name in replacement.covers for s in module.get_submodule(name).modules())
        except AttncError as error:
            report.rows.append(Row(path, kind, reason=str(error)))
            replacement = None
        else:
            if replacement is None and ATTENTION.search(type(module).__name__) and not any(map(_known, _inner(module))):
                report.rows.append(Row(path, kind, reason=_unknown(type(module))))
    return model, report


def _swap(path: str, kind: str, module: nn.Module, replacement: type[Accelerated], backend: str) -> Row:
    """Turn the module into its replacement; the row says how, or why not."""
    original = type(module)
    asked: Any = module
    reason = replacement.refuse(asked)
    for name in replacement.covers:
        hooked = [s for s in module.get_submodule(name).modules() if any(getattr(s, h) for h in HOOKS)]
        if hooked and not reason:
            reason = f"{name} has hooks, which would not be called any more: remove them first"
    if reason:
        return Row(path, kind, reason=reason)
    module.__class__ = replacement
    swapped: Any = module
    swapped.attnc_backend = backend
    try:
        operators = swapped.build()
    except AttncError as error:
        module.__class__ = original
        return Row(path, kind, reason=str(error))
    names = dict.fromkeys(o.source.name for o in operators)
    return Row(path, kind, tuple(names), swapped.remark())


def _replacement(cls: type) -> type[Accelerated] | None:
    """What instances of exactly this class become."""
    if issubclass(cls, Accelerated):
        return cls
    family = FAMILIES.get(cls.__module__)
    if family is not None:
        importlib.import_module(f"{PACKAGE}.{family}")
    return _replacements.get(cls)


def _inner(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if m is not module)


def _known(module: nn.Module) -> bool:
    """Whether a module gets a row of its own."""
    return _replacement(type(module)) is not None or bool(ATTENTION.search(type(module).__name__))


def _unknown(cls: type) -> str:
    """Why instances of this class are left alone."""
    base = next((b for b in cls.__mro__[1:] if _replacement(b) is not None), None)
    if base is not None:
        return f"it is a subclass of {_name(base)}, whose code may differ"
    return "no replacement is known for this class"


def _name(cls: type) -> str:
    """The class that a user knows: of a replacement, the one it replaces."""
    if issubclass(cls, Accelerated):
        cls = next(original for original, replacement in _replacements.items() if replacement is cls)
    return f"{cls.__module__}.{cls.__qualname__}"
