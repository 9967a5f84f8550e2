"""The layers hold: import-linter reads pyproject.toml; what a fresh interpreter loads is the second opinion."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_arrows_point_down():
    done = subprocess.run([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kdstore.store", {"torch", "open_clip"}),
        ("kdstore.metrics.vqa", {"torch", "zarr", "open_clip"}),
        ("kdstore.config", {"torch", "zarr", "numpy"}),
        ("kdstore.evaluate.protocol, kdstore.evaluate.score, kdstore.evaluate.compare", {"torch", "zarr", "open_clip"}),
    ],
)
def test_a_layer_loads_nothing_from_above(module, absent):
    loaded = subprocess.run([sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)


def test_every_loss_has_its_heading_in_the_docs():
    from kdstore.distill.losses import LOSSES

    lines = (ROOT / "docs" / "losses.md").read_text().splitlines()
    assert {f"### `{name}`" for name in LOSSES} <= set(lines)
