"""`kdstore extract` beside clip-retrieval's inference: the same photographs and captions, weights, batch and threads, each as the command that a user types.

clip-retrieval asks for NumPy below 2 and so lives in an environment of its own; its Python is named with `--peer`:

    python3.11 -m venv peer && peer/bin/pip install clip-retrieval 'setuptools<70'
    python benchmarks/clip_retrieval.py --peer peer/bin/python --photos FOLDER [--teacher ViT-B-32] [--images 256] [--repeats 3] [--json]

FOLDER holds JPEG images and `metadata.csv` (file_name, captions). Both read webdataset tars of the images with their first captions: in a folder of images and
texts clip-retrieval 2.45 finds no pair. They take turns. Seconds are those of the whole command, imports and loading included. Features are compared as
unit vectors in float32, every row with its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch

from kdstore.data.columns import texts_of
from kdstore.store import open_store


def write_tars(photos: Path, folder: Path, images: int, shards: int) -> None:
    """Write images with a text each as webdataset tars, which both tools read in place."""
    with open(photos / "metadata.csv", newline="") as f:
        rows = list(csv.DictReader(f))[:images]
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in rows[shard::shards]:
                name = Path(row["file_name"])
                caption = texts_of(row.get("captions") or row["caption"])[0].encode()
                tar.add(photos / name, f"{name.stem}.jpg")
                member = tarfile.TarInfo(f"{name.stem}.txt")
                member.size = len(caption)
                tar.addfile(member, io.BytesIO(caption))


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(store_path: Path, peer: Path) -> dict[str, float]:
    """Return the least cosine of a row, by side, rows found by key."""
    store = open_store(store_path)
    row_of = {key: row for row, key in enumerate(store.keys().tolist())}
    named = (pq.read_table(file, columns=["image_path"])["image_path"].to_pylist() for file in sorted((peer / "metadata").glob("*.parquet")))
    rows = np.array([row_of[name] for names in named for name in names])
    assert len(set(rows.tolist())) == store.num_images == store.num_texts, "both have each image once, with one text"
    found = {}
    for side, folder in (("image", "img_emb"), ("text", "text_emb")):
        theirs = np.concatenate([np.load(file) for file in sorted((peer / folder).glob("*.npy"))])
        found[side] = float((unit(store.gather(f"{side}/embedding", rows).reshape(len(rows), -1)) * unit(theirs)).sum(axis=1).min())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the Python of an environment with clip-retrieval")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--teacher", default="ViT-B-32", help="an architecture; its weights are random")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="or processes, that decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tars(args.photos, folder / "pairs", args.images, shards=args.threads)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(args.teacher).state_dict(), weights := folder / "weights.pt")
        ours = [sys.executable, "-m", "kdstore", "extract", "--json", "--teacher", args.teacher, "--pretrained", str(weights), "--data", str(folder / "pairs")]
        ours += ["--out", str(folder / "store"), "--set", f"batch={args.batch}", "--set", f"threads={args.threads}"]
        inference = {
            "input_dataset": str(folder / "pairs" / f"{{00000..{args.threads - 1:05d}}}.tar"),
            "input_format": "webdataset",
            "output_folder": str(folder / "peer"),
            "clip_model": f"open_clip:{args.teacher}/{weights}",
            "batch_size": args.batch,
            "num_prepro_workers": args.threads,
            "use_jit": False,
        }
        program = f"from clip_retrieval.clip_inference.main import main; main(**{inference!r})"
        seconds: dict[str, list[float]] = {"kdstore": [], "clip_retrieval": []}
        ratios = []
        for repeat in range(args.repeats):
            for name in ("kdstore", "clip_retrieval") if repeat % 2 else ("clip_retrieval", "kdstore"):
                command, left = (ours, "store") if name == "kdstore" else ([args.peer, "-c", program], "peer")
                shutil.rmtree(folder / left, ignore_errors=True)
                seconds[name].append(timed(command))
            ratios.append(seconds["clip_retrieval"][-1] / seconds["kdstore"][-1])
        found: dict[str, Any] = {
            "teacher": args.teacher,
            "images": args.images,
            "batch": args.batch,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
            "times_as_fast": round(statistics.median(ratios), 3),
            "least_cosine": cosines(folder / "store", folder / "peer"),
        }
    print(json.dumps(found) if args.json else "\n".join(f"{name:>15}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
