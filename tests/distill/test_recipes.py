"""The recipes that ship: each reads, and says a loss that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdstore.config import make_config, read_recipe
from kdstore.distill.config import DistillConfig
from kdstore.distill.losses import parse_loss
from kdstore.distill.teachers import check_loss

RECIPES = [path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")) if "[distill]" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_distillation_reads(path: Path) -> None:
    config = make_config(DistillConfig, read_recipe(path, {"distill"})["distill"])
    assert parse_loss(config.loss)
    check_loss(config)
