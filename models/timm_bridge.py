"""Every variant under timm's own roof: ``timm.create_model("attnc_davit_tiny")``.

timm has no plug-in mechanism, and importing it costs seconds, so it is never imported from here: the names
are entered at once where timm is loaded already, otherwise right after somebody imports it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attnc.errors import UnsupportedError
from attnc.models import registry

if TYPE_CHECKING:
    from torch import nn

PREFIX = "attnc_"
# What timm.create_model passes to every entry point and means nothing without hosted weights.
_TIMM_ONLY = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def install() -> None:
    """Register with timm now, or as soon as it is imported. Calling it again changes nothing."""
    if sys.modules.get("timm") is not None:  # None is how an import is blocked
        register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def register() -> None:
    """Enter every variant that timm does not have yet into its registry."""
    timm_registry = importlib.import_module("timm.models")
    for name in registry.list_models():
        if not timm_registry.is_model(PREFIX + name):
            entry = _entry_point(name)
            globals()[entry.__name__] = entry  # timm lists it in this module's __all__
            timm_registry.register_model(entry)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **overrides: Any) -> nn.Module:
        if pretrained:
            raise UnsupportedError(
                f"{PREFIX}{name}: attnc hosts no weights; create it with pretrained=False and "
                "load those of timm through attnc.models.from_timm"
            )
        return registry.create_model(name, **{k: v for k, v in overrides.items() if k not in _TIMM_ONLY})

    entry.__name__ = entry.__qualname__ = PREFIX + name
    entry.__doc__ = f"attnc's {name}; see attnc.models.create_model."
    return entry


class _AfterTimm(MetaPathFinder):
    """Finds timm where everybody else does, and has `register` run once its import is done.

    It stays until timm is really imported: many packages only look whether there is a spec.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _AfterTimm))
        spec = next((s for finder in others if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A loader that is the one it wraps, plus `register` at the end."""

    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.wrapped  # resources and reloads go to the real loader
        module.__loader__ = self.wrapped
        self.wrapped.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterTimm)]
        register()
