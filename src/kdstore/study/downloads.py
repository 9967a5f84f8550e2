"""What a study reads that is not made by it: weights, the files of VQA data sets, pairs. Nothing is fetched here, and no network is asked.

How many images and questions a data set has is its owners' published count, so that a study can be planned before its files are there; docs/vqa-datasets.md
lists the files in full. open_clip knows where weights lie and no licence: that stands on the page which is named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import open_clip
from huggingface_hub.constants import HF_HUB_CACHE

from kdstore.models.cost import Cost
from kdstore.models.names import demo_teachers, resolve

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Asked:
    """Images of a split and the questions about them."""

    images: int
    questions: int


@dataclass(frozen=True)
class Owned:
    """Whose a data set is, which of its files are read, its splits, and whether it asks about COCO's images."""

    owner: str
    files: str
    splits: dict[str, Asked]
    licence: str = "see there"
    on_coco: bool = False


@dataclass(frozen=True)
class Download:
    """Something that a study needs: from where, how many bytes (None: not known here), its licence or where that stands, and whether it lies here already."""

    what: str
    origin: str
    bytes: int | None
    licence: str
    here: bool


def weights_of(name: str, cost: Cost) -> Download | None:
    """Say where the published weights of a model lie, at four bytes a parameter; None for a model that comes from a folder or is built in."""
    if name in demo_teachers() or name.startswith("local-dir:") or Path(name).exists():
        return None
    resolved, size = resolve(name), BYTES_PER_PARAMETER * cost.parameters
    if name.startswith("hf-hub:"):
        return _of_hub(resolved.name, name.removeprefix("hf-hub:"), size)
    if resolved.pretrained is None or Path(resolved.pretrained).is_file():
        return None
    found = open_clip.get_pretrained_cfg(resolved.open_clip_name, resolved.pretrained)
    if found.get("hf_hub"):
        return _of_hub(resolved.name, found["hf_hub"].strip("/"), size)
    return Download(resolved.name, found["url"], size, "see there", False)


def _of_hub(name: str, repository: str, size: int) -> Download:
    return Download(name, f"huggingface.co/{repository}", size, "see there", (Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}").is_dir())


def files_of(datasets: Iterable[str], here: Collection[str]) -> list[Download]:
    """Say which files VQA data sets are read from; of those that are known here. `here` names those whose folder is given."""
    known = {name: OWNED[name] for name in datasets if name in OWNED}
    found = [Download(f"{name}: {owned.files}", owned.owner, None, owned.licence, name in here) for name, owned in known.items()]
    on_coco = [name for name, owned in known.items() if owned.on_coco]
    if on_coco:
        what = f"images train2014 and val2014, of {' and '.join(on_coco)}"
        found.append(Download(what, "cocodataset.org", COCO_BYTES, "see there", all(name in here for name in on_coco)))
    return found


COCO_BYTES = 19_000_000_000  # the owner's page: 13 GB and 6 GB

CC_BY = "CC BY 4.0 by the card of a copy on the Hub"

OWNED: dict[str, Owned] = {
    "vqav2": Owned(
        "visualqa.org",
        "questions and annotations of train2014 and val2014",
        {"train": Asked(82_783, 443_757), "val": Asked(40_504, 214_354)},
        f"annotations: {CC_BY}",
        on_coco=True,
    ),
    "okvqa": Owned(
        "okvqa.allenai.org",
        "questions and annotations of train2014 and val2014",
        {"train": Asked(8_998, 9_009), "val": Asked(5_033, 5_046)},
        on_coco=True,
    ),
    "gqa": Owned(
        "cs.stanford.edu/people/dorarad/gqa",
        "balanced questions of train, val and testdev, images",
        {"train": Asked(72_140, 943_000), "val": Asked(10_234, 132_062), "testdev": Asked(398, 12_578)},
    ),
    "vizwiz": Owned("vizwiz.org", "train.json, val.json, images of train and val", {"train": Asked(20_523, 20_523), "val": Asked(4_319, 4_319)}),
    "textvqa": Owned(
        "textvqa.org",
        "TextVQA_0.5.1_train.json, TextVQA_0.5.1_val.json, train_images",
        {"train": Asked(21_953, 34_602), "val": Asked(3_166, 5_000)},
        CC_BY,
    ),
}
