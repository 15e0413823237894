"""Programs that `make fuzz` once found wrong, each on the backend that was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import strategies as draws

from attnc.patterns import window

FOUND = sorted(fuzz.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", [p for p in FOUND if not p.stem.startswith("triton")], ids=lambda p: p.stem)
def test_found_once(path: Path) -> None:
    kept = fuzz.Kept(**json.loads(path.read_text()))
    draws.hold(kept.restored(), kept.backend)


@pytest.mark.parametrize("constants", [8, 0], ids=["sizes known", "sizes open"])
@pytest.mark.parametrize("path", [p for p in FOUND if p.stem.startswith("triton")], ids=lambda p: p.stem)
def test_found_once_interpreted(path: Path, constants: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    text = f"from attnc.runtime import triton; triton.CONSTANT_GRIDS = {constants}; import test_fuzzed as t; "
    text += f"t.draws.hold(t.fuzz.Kept(**t.json.loads({path.read_text()!r})).restored(), 'triton')"
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_kept_program_is_the_program(tmp_path: Path) -> None:
    p = draws.Problem(draws.decay() & window(2), (5, 4), d=3, strides="guarded", pad=((1, 0), (0, 2)))
    kept = fuzz.Kept(**json.loads(json.dumps(fuzz.asdict(fuzz.Kept.of(p, "torch", "")))))
    again = kept.restored()
    assert draws.replace_pads(again) == draws.replace_pads(p)
    draws.hold(again, "torch")


def test_the_fuzzer_sees_a_wrong_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from attnc.codegen import torch as portable

    plain = portable.forward

    def wrong(call, q, k, v):  # type: ignore[no-untyped-def]
        out, lse = plain(call, q, k, v)
        return out * 1.01, lse

    monkeypatch.setattr(portable, "forward", wrong)
    monkeypatch.setattr(fuzz, "FOLDER", tmp_path / "fuzzed")
    counts = fuzz.fuzz("torch", 3)
    assert counts["wrong"]
    assert list((tmp_path / "fuzzed").glob("torch-*.json"))


def test_more_draws_forgive_no_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that one draw misses is asked of several draws together; a backend that errs in each misses it."""
    from attnc.codegen import torch as portable

    plain = portable.backward

    def wrong(call, *rows):  # type: ignore[no-untyped-def]
        dq, dk, dv, tables = plain(call, *rows)
        return dq, dk, dv, {n: t * 1.15 for n, t in tables.items()}

    p = draws.Problem(draws.decay(), (6, 1), heads=1, kv_heads=1, d=1, dv=17, dtype=draws.torch.bfloat16, seed=66)
    draws.hold(p, "torch")
    monkeypatch.setattr(portable, "backward", wrong)
    with pytest.raises(AssertionError, match="rate"):
        draws.hold(p, "torch")
