"""Known attention modules of a timm or torchvision model computed by attnc, with the model's own weights.

>>> model, report = attnc.accelerate(timm.create_model("swin_tiny_patch4_window7_224"))
>>> print(report)

A module is not exchanged but becomes an instance of a subclass of its own class (`swap.Accelerated`): parameters, buffers,
submodules, hooks and state dict stay the same objects under the same names, and what the original computes is still there
for the calls that attnc does not take over. One file per family says what its modules become; it is imported when a model
has such a module, so that timm and torchvision stay optional.
"""

from __future__ import annotations

from attnc.models.accelerate.report import Report, Row
from attnc.models.accelerate.swap import accelerate

__all__ = ["Report", "Row", "accelerate"]
