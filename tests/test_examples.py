"""The examples run, and the demo stops loudly when an attention is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnc

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL: dict[str, Any] = {
    "embed_dims": (16, 16, 24, 32),
    "num_heads": (2, 4, 3, 4),
    "window_size": 3,
    "mlp_ratio": 2.0,
    "num_classes": 10,
    "backend": "torch",
}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The demo on a small network and a small image, in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import demo

    create = attnc.models.create_model
    monkeypatch.setattr(attnc.models, "create_model", lambda name, **o: create(name, **{**o, **SMALL}))
    monkeypatch.setattr(demo, "photo", lambda: torch.randn(1, 3, 43, 64, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(demo, "times_ms", lambda *calls: [float(bool(f() is not None)) for f in calls])
    monkeypatch.setattr(demo, "DEVICE", "cpu")
    monkeypatch.setattr(demo, "GRID", (14, 14))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--backend", "torch"])
    return demo


def test_declare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import declare

    declare.main()
    said = capsys.readouterr().out
    assert "gradient of its table (4, 7, 7)" in said
    assert "inside torch.compile      True" in said


def test_demo(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    report = json.loads(Path("demo/report.json").read_text())
    assert len(report["layers"]) == 1 + 2 * 12
    assert all(r["ok"] and r["error"] < 1e-4 and r["backend"] == "torch" for r in report["layers"])
    assert {r["strategy"] for r in report["layers"]} == {"banded", "grouped", "channel"}
    assert Path("demo/pattern.png").stat().st_size > 10_000
    assert "def attention(" in Path("demo/module.py").read_text()
    assert "every error is within twice that of eager float32" in capsys.readouterr().out


def test_demo_fails_loudly(demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watched = demo.recorded

    def wrong(model: torch.nn.Module, image: torch.Tensor) -> Any:
        calls = watched(model, image)
        calls[6].output = calls[6].output * 1.001
        return calls

    monkeypatch.setattr(demo, "recorded", wrong)
    assert demo.main() == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "error above twice" in line]
    assert "main_blocks.2.1.0.attn" in line


def test_train_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs of few images, the second one in another start; both backends' first losses agree; the bar is not reached."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_digits

    train, test = train_digits.digits()
    assert (len(train[0]), len(test[0]), train[0].shape[1:]) == (1347, 450, (1, 32, 32))
    monkeypatch.setattr(train_digits, "digits", lambda: tuple((x[:64], y[:64]) for x, y in (train, test)))
    monkeypatch.setattr(train_digits, "BATCH", 16)
    reports = []
    for epochs in ("1", "2"):
        words = ["train_digits.py", "--epochs", epochs, "--check", "2", "--backend", "torch", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        assert train_digits.main() == 1
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert [r["network"] for r in reports[1]] == ["window", "neighbourhood", "channel"]
    for first, second in zip(*reports, strict=True):
        assert second["curve"][0] == first["curve"][0]
        assert len(second["curve"]) == 2
        assert second["curve"][1]["loss"] < first["curve"][0]["loss"] * 1.2
        assert second["difference"] < 1e-4
        assert list(second["first"]) == ["torch", "eager"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "largest difference to the eager losses" in capsys.readouterr().out


def test_super_resolution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps on small photos, in two starts; before the first one the network is bicubic interpolation."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import super_resolution

    photos = super_resolution.photos()
    assert [p.shape for p in photos] == [(1, 3, 426, 640)] * 2
    small = [p[..., 100:156, 200:260].contiguous() for p in photos]
    monkeypatch.setattr(super_resolution, "photos", lambda: small)
    monkeypatch.setattr(super_resolution, "BATCH", 2)
    model = super_resolution.Doubled("torch").eval()
    with torch.no_grad():
        half = super_resolution.shrunk(small[1])
        torch.testing.assert_close(model(half).clamp(0, 1), super_resolution.bicubic(half), rtol=0, atol=1e-5)
    reports = []
    for steps in ("1", "3"):
        monkeypatch.setattr(sys, "argv", ["super_resolution.py", "--steps", steps, "--backend", "torch", "--out", str(tmp_path)])
        super_resolution.main()
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert [r["steps"] for r in reports] == [1, 3]
    assert reports[1]["losses"][:1] == reports[0]["losses"]
    assert reports[1]["psnr"]["bicubic"] == pytest.approx(reports[0]["psnr"]["bicubic"])
    assert 10 < reports[1]["psnr"]["HAT"] < 60
    assert (tmp_path / "photo.png").stat().st_size > 10_000
    assert "dB on the held-out photo" in capsys.readouterr().out


def test_the_demo_s_meaning_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves keys out by the relation as written, so it must equal attnc.reference exactly but for the order of sums."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from paper import recorded

    torch.manual_seed(0)
    model = attnc.models.create_model("davit_tiny", **SMALL).eval()
    with torch.no_grad():
        calls = recorded(model, torch.randn(1, 3, 43, 64))
        assert [c.operator for c in calls] == ["attend", "channel"] * 6
        for c in calls:
            q, k, v, *rest = c.args
            wide = [t.double() for t in (q, k, v)]
            if c.operator == "attend":
                pads = dict(zip(("pad_k", "pad_v"), (t.double() for t in rest[0]), strict=True))
                op = attnc.reference(attnc.patterns.window(3), pad="multiple", layout="b h y x d")
                expected = op(*wide, scale=rest[1], **pads)
            else:
                expected = attnc.reference(attnc.patterns.channel(), layout="b h x d")(*wide, scale=rest[0])
            torch.testing.assert_close(c.meaning(), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(c.eager().double(), expected, rtol=1e-4, atol=1e-5)


def test_the_library_s_page_is_what_the_library_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "docs"))
    import make_patterns

    monkeypatch.setattr(make_patterns, "HERE", tmp_path)
    make_patterns.main()
    page = EXAMPLES.parent / "docs" / "patterns.md"
    assert (tmp_path / "patterns.md").read_text() == page.read_text(), "run python docs/make_patterns.py"
    pictures = {p.name for p in (tmp_path / "img").iterdir()}
    assert pictures <= {p.name for p in (page.parent / "img").iterdir()}
    documented = {name for name in attnc.patterns.__all__ if f"`{name}(" in page.read_text()}
    assert documented == set(attnc.patterns.__all__)
