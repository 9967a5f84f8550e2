"""`kdstore evaluate zeroshot` and `retrieval` beside clip_benchmark's own functions: the same model, images, class names, templates and captions.

clip_benchmark is imported, not started: it has no way to read these data. Version 1.6.2 wants a NumPy below 2.4, so it lives in an environment of its own:

    python3.11 -m venv peer && peer/bin/pip install -e . 'numpy<2.4' && peer/bin/pip install --no-deps clip_benchmark
    peer/bin/python benchmarks/zeroshot_retrieval.py [--model scenes-S] [--images 1000] [--json]

Both use float32, one batch size, one device. Scores are fractions; a difference beyond 1e-6 ends with an error, for without ties there is none to expect.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch.utils.data import DataLoader

from kdstore.data.source import PROBE
from kdstore.data.sources import open_source
from kdstore.evaluate.protocol import RetrievalConfig, ZeroshotConfig
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.evaluate.zeroshot import evaluate_zeroshot
from kdstore.models.load import Model, load_model

BATCH = 100
TEMPLATES = ("a {c} object", "a picture with something {c}", "the leftmost is {c}")
LIMIT = 1e-6


class Examples:
    """Preprocessed images of a source with what `target` makes of their texts: the data set that clip_benchmark's loader takes."""

    def __init__(self, model: Model, spec: str, target: Callable[[list[str], list[str]], Any], classes: list[str]) -> None:
        self.model, self.source, self.target, self.classes = model, open_source(spec), target, classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        texts = self.source.captions(i)
        target = self.target([c.text for c in texts if c.kind == PROBE], [c.text for c in texts if c.kind != PROBE])
        return self.model.preprocess(self.source.image(i).image), target


def labels_of(spec: str) -> list[str]:
    source = open_source(spec)
    return sorted({caption.text for i in range(len(source)) for caption in source.captions(i) if caption.kind == PROBE})


def of_peer_zeroshot(model: Model, spec: str, several: bool) -> dict[str, float]:
    classes = labels_of(spec)

    def target(labels: list[str], _: list[str]) -> Any:
        return torch.tensor([name in labels for name in classes]).int() if several else classes.index(labels[0])

    loader = DataLoader(Examples(model, spec, target, classes), batch_size=BATCH)
    return zeroshot_classification.evaluate(model.clip, loader, model.tokenizer, classes, list(TEMPLATES), "cpu", amp=False)


def of_peer_retrieval(model: Model, spec: str) -> dict[str, float]:
    def stacked(rows: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([image for image, _ in rows]), [captions for _, captions in rows]

    loader = DataLoader(Examples(model, spec, lambda _, captions: captions, []), batch_size=BATCH, collate_fn=stacked)
    return zeroshot_retrieval.evaluate(model.clip, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])


def compared(name: str, images: int) -> list[dict[str, Any]]:
    """Score every task by both; returns a row per score."""
    model = load_model(name, device="cpu")
    common = {"model": name, "device": "cpu", "encode_batch": BATCH}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        templates = Path(folder) / "templates.txt"
        templates.write_text("\n".join(TEMPLATES))
        for label in ("leftmost-color", "leftmost-shape", "count", "object", "shape"):
            spec = f"scenes/test:{images}?probe={label}"
            ours = evaluate_zeroshot(ZeroshotConfig(**common, data=spec, templates=str(templates))).scores
            rows += paired(f"zero-shot {label}", ours, of_peer_zeroshot(model, spec, label in ("object", "shape")))
        spec = f"scenes/retrieval:{images}"
        ours = evaluate_retrieval(RetrievalConfig(**common, data=spec)).recall
        rows += paired("retrieval", ours, of_peer_retrieval(model, spec))
    return rows


def paired(task: str, ours: dict[str, float], of_peer: dict[str, float]) -> list[dict[str, Any]]:
    """Pair the scores by name, as fractions; what only the peer has must be its NaN for fewer than five classes."""
    assert all(key in ours or of_peer[key] != of_peer[key] for key in of_peer), (ours, of_peer)
    values = [(key, value / 100, of_peer[key]) for key, value in ours.items()]
    return [{"task": task, "score": key, "kdstore": value, "clip_benchmark": peer, "difference": value - peer} for key, value, peer in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-S")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = compared(options.model, options.images)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| task | score | kdstore | clip_benchmark | difference |\n| --- | --- | ---: | ---: | ---: |")
        for row in rows:
            print(f"| {row['task']} | {row['score']} | {row['kdstore']:.6f} | {row['clip_benchmark']:.6f} | {row['difference']:.1e} |")
    if beyond := [row for row in rows if not abs(row["difference"]) <= LIMIT]:
        raise SystemExit(f"{len(beyond)} scores differ by more than {LIMIT}.")


if __name__ == "__main__":
    main()
