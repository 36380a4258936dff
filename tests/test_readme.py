"""The README is true: its code runs, its commands exist, its files are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain import Trainer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_code_runs_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(max_epochs=1, device="cpu", default_callbacks=False)
    names: dict[str, Any] = {"trainer": trainer, "__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert list((tmp_path / "runs" / "Regression" / "version_0").glob("events.out.*"))
    # The classes that the blocks define work in a run too.
    harder, warmup, anomalies = names["ClipHarderLater"](), names["Warmup"](), names["DetectAnomalies"]()
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        Trainer(max_epochs=1, device="cpu", callbacks=[harder, warmup, anomalies], default_callbacks=False).fit(
            names["Regression"](), torch.randn(4, 2, 8)
        )
    trainer.fit(names["Regression"](), torch.randn(4, 2, 8))
    assert capsys.readouterr().out.startswith("0 {'loss': tensor(")
    Trainer(max_epochs=3, device="cpu", callbacks=[names["PrintLosses"]()], default_callbacks=False).fit(
        names["Regression"](), torch.randn(1, 2, 8)
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "0"]


def test_the_first_example_has_twelve_lines() -> None:
    body = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) == 12


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/events.md", "docs/coming-from-lightning.md"])
def test_the_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
