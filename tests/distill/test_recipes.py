"""The recipes that ship: each reads, and those of a distillation say a loss that there is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kdstore.config import make_config, read_recipe
from kdstore.distill.config import DistillConfig
from kdstore.distill.losses import parse_loss
from kdstore.distill.teachers import check_loss

ROOT = Path(__file__).parents[2]
RECIPES = [
    path for path in sorted((ROOT / "recipes").glob("*.toml")) if not path.name.startswith("study-") and "[distill]" in path.read_text()
]  # those of studies: tests/study


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_distillation_reads(path: Path) -> None:
    config = make_config(DistillConfig, read_recipe(path, {"distill"})["distill"])
    assert parse_loss(config.loss)
    check_loss(config)


def test_the_clip_kd_inversion_has_the_published_numbers() -> None:
    config = make_config(DistillConfig, read_recipe(ROOT / "recipes" / "inversion-clip-kd.toml", {"distill"})["distill"])
    assert parse_loss(config.loss) == {"clip": 1, "crd": 1, "icl": 1, "fd": 2000}
    assert (config.student, config.batch_size, config.epochs, config.lr, config.weight_decay) == ("ViT-T-16", 1024, 32, 1e-3, 0.1)


def test_the_inversion_on_scenes_trains_every_student_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("inversion_scenes", ROOT / "scripts" / "inversion_scenes.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    config = make_config(script.InversionConfig, read_recipe(ROOT / "recipes" / "inversion-scenes.toml", {"inversion"})["inversion"])
    runs = [script.run_of(config, cell) for cell in script.cells(config)]
    assert len({run.out for run in runs}) == len(runs) == 3 * 2 * (1 + 2 * 3)
    assert all(run.projector == "always" for run in runs)
    fixed = {cell: {"no teacher": 10.0 + cell.seed, "scenes-L": 20.0}.get(cell.teacher, 30.0) for cell in script.cells(config)}
    table = list(script.lines(config, {cell: {"T→I": score, "I→T": score} for cell, score in fixed.items()}, {}))
    assert "| clip-kd | 8,000 | scenes-L - scenes-S | 3 | -10.0 ± 0.0 | -10.0 ± 0.0 |" in table
    assert "| clip-kd | 8,000 | scenes-L - no teacher | 3 | 9.0 ± 2.5 | 9.0 ± 2.5 |" in table
