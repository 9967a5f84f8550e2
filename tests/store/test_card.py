"""The card: valid where catalogues look, true to the store, silent of the machine, and no part of the store."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard

from kdstore.errors import ConfigError
from kdstore.jsonfile import write_json
from kdstore.store import open_store, verify_store, withdraw_rows
from kdstore.store.card import CardConfig, write_card

SAID = {"licence": "cc-by-4.0", "teacher_licence": "MIT", "source_licence": "as their authors say", "citation": "@misc{us, title={Ours}}"}
GOLDEN = Path(__file__).parent / "golden"


def test_the_card_changes_neither_digest_nor_verdict_and_has_what_a_stranger_needs(copied: Path) -> None:
    digest = open_store(copied).digest
    made = write_card(copied, CardConfig(**SAID, name="ours", mirrors=("hf://datasets/lab/ours", "https://lab.org/ours")))
    assert made.digest == open_store(copied).digest == digest
    assert verify_store(copied).ok
    card = DatasetCard.load(copied / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.mirrors == ["hf://datasets/lab/ours", "https://lab.org/ours"]
    assert [config["data_files"] for config in card.data.configs] == ["index/image/*.parquet", "index/text/*.parquet"]
    assert all(list(copied.glob(config["data_files"])) for config in card.data.configs)
    counts = f"44 images and {open_store(copied).num_texts} captions"
    for needed in (digest, *SAID.values(), "hf://datasets/lab/ours", "https://lab.org/ours", counts, "scenes-S", "kdstore store join", "`image/tokens`"):
        assert needed in card.content, needed


def test_croissant_is_valid_and_its_records_are_the_index(copied: Path) -> None:
    write_card(copied, CardConfig(**SAID, mirrors=("https://lab.org/ours",)))
    program = (  # in a process of its own: it logs, warns and imports for itself
        "import sys, json, mlcroissant; d = mlcroissant.Dataset(sys.argv[1]); i = d.metadata.issues\n"
        "rows = [r for r in d.records('images')]\n"
        "print(json.dumps([sorted(i.errors), sorted(i.warnings), len(rows), rows[7]['images/key'].decode(), len(list(d.records('texts')))]))"
    )
    done = subprocess.run([sys.executable, "-c", program, copied / "croissant.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = open_store(copied)
    assert json.loads(done.stdout) == [[], [], store.num_images, store.keys()[7], store.num_texts]
    assert "WARNING" not in done.stderr


def test_measured_fidelity_and_withdrawn_rows_are_told(pristine: Path, sample: Any, tmp_path: Path) -> None:

    coded = Path(shutil.copytree(GOLDEN / "format-1-codes", tmp_path / "coded"))
    write_card(coded, CardConfig(**SAID))
    held = next(iter(open_store(coded).codecs.values()))
    assert f"codec `{held.chain}`" in (coded / "README.md").read_text()
    withdraw_rows(pristine, tmp_path / "later", keys=[sample.rows[3][0]])
    write_card(tmp_path / "later", CardConfig(**SAID))
    assert "1 were withdrawn" in (tmp_path / "later/README.md").read_text()
    assert json.loads((tmp_path / "later/croissant.json").read_text())["version"] == "1.1.0"


def test_nothing_of_the_machine_is_in_the_card_and_what_run_json_says_is_told(copied: Path) -> None:
    write_json(copied / "run.json", {"source": "/home/somebody/photos", "host": socket.gethostname()})
    made = write_card(copied, CardConfig(**SAID, name="ours"))
    assert "/home/somebody/photos" in made.notices[0]
    written = (copied / "README.md").read_text() + (copied / "croissant.json").read_text()
    for own in (str(copied), os.getcwd(), "/home/", f"{socket.gethostname()}-", str(Path.home())):
        assert own not in written, own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "needs --licence"),
        ({"citation": " ", "teacher_licence": None}, "--teacher-licence, --citation"),
        ({"licence": "Creative Commons"}, "Unknown licence of the Hub 'Creative Commons'. For another one, give an https:// link"),
        ({"licence": "cc-by-40"}, "Did you mean cc-by-4.0"),
        ({"mirrors": ("https://user:secret@lab.org/x",)}, "no public address"),
        ({"mirrors": ("https://lab.org/x?X-Amz-Signature=secret",)}, "no public address"),
    ],
)
def test_what_only_a_publisher_knows_is_asked_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CardConfig(**{**SAID, **changes})


def test_a_licence_of_ones_own_is_a_link(copied: Path) -> None:
    write_card(copied, CardConfig(**{**SAID, "licence": "https://lab.org/licence"}))
    data = DatasetCard.load(copied / "README.md").data
    assert (data.license, data.license_link) == ("other", "https://lab.org/licence")
