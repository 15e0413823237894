"""Model zoo: one paper per file, every attention computed by operators compiled from :mod:`attnc.patterns`.

>>> from attnc.models import create_model
>>> model = create_model("davit_tiny", num_classes=10)

A file of this folder registers itself when it is imported (:mod:`attnc.models.registry`) and is imported when
one of its names is asked for, so that this package costs nothing until it is used. With timm installed, every
variant is also ``timm.create_model("attnc_<name>")``, whichever of the two packages was imported first.
"""

from __future__ import annotations

from attnc.models import timm_bridge
from attnc.models.official import load_official
from attnc.models.registry import create_model, list_models
from attnc.models.timm_names import from_timm

__all__ = ["create_model", "from_timm", "list_models", "load_official", "timm_bridge"]
