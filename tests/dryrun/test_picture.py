"""The plan's page opens in a real browser, in light and in dark, and shows what the report says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from colrow.dryrun.picture import page
from colrow.dryrun.report import report
from colrow.models.llama import Llama
from colrow.plans.plan import Plan
from helpers.parity import MODELS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        model = Llama(MODELS["kv3"])
    text = page(report(model, Plan.preset("llama"), tp=2, batch_size=2, seq_len=16), "a <model> & its plan")
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_page_is_self_contained_and_escaped(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert "a &lt;model&gt; &amp; its plan" in text
    assert not any(reference in text for reference in ("http:", "https:", "src=", "@import", "url("))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_shows_the_block_and_the_reasons(written: Path, tmp_path: Path) -> None:
    shown = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        options = [*QUIET, f"--blink-settings=preferredColorScheme={number}", f"--user-data-dir={tmp_path / scheme}"]
        picture = tmp_path / f"{scheme}.png"
        for action in ([f"--screenshot={picture}", "--window-size=700,900"], ["--dump-dom"]):
            run = subprocess.run(
                [str(BROWSER), *options, *action, written.as_uri()],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            )
        dom = run.stdout
        assert "self_attn.k_proj" in dom
        assert "all-gather" in dom
        assert "n_kv_heads=3 not divisible by tp=2; gradients summed over tp" in dom
        shown[scheme] = _corner(picture)
    assert sum(shown["dark"]) < 150 < 700 < sum(shown["light"])  # the page's own colours, not the browser's


def _corner(picture: Path) -> tuple[int, ...]:
    from matplotlib.image import imread

    return tuple(round(255 * float(value)) for value in imread(picture)[2, 2, :3])
