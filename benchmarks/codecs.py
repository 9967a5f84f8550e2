"""What encoding a teacher's features costs a student: bytes per image, the stated error on rows held out, and the recall of students distilled from each.

One extraction per codec; students are those of the demo (scenes-T), paired by seed: equal initialisation, batches and samples. Embeddings teach by
`clip-kd-free`, tokens by `clip + theia`. A row without a teacher shows what there is to lose. Stores, runs and results stay in `--out`, and what is there is
not computed again.

    python benchmarks/codecs.py --out DIR [--features tokens] [--teacher scenes-S] [--images 6000] [--samples 16000] [--seeds 0 1 2] [--codecs ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.evaluate.protocol import RetrievalConfig
from kdstore.evaluate.results import read_result
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json
from kdstore.store import open_store, store_stats

CODECS = {
    "embedding": ("float32", "float16", "int8", "pca32+int8", "pca16+int8", "pq12", "pq4", "pq1"),
    "tokens": ("float16", "int8", "pool2+int8", "pca32+int8", "pca16+pq4"),
}
LOSSES = {"embedding": "clip-kd-free", "tokens": "clip + theia"}


def student_recall(args: argparse.Namespace, store: Path | None, name: str, seed: int) -> float:
    """Distil a student and return the mean of its recall@1 in both directions, in percent."""
    run, result = args.out / "runs" / f"{name}-{seed}", args.out / "results" / f"{name}-{seed}.json"
    settings: dict[str, Any] = {
        "cache": str(store) if store else None,
        "data": f"scenes/train:{args.images}",
        "loss": LOSSES[args.features] if store else "none",
    }
    config = DistillConfig(
        student="scenes-T", out=str(run), samples=args.samples, batch_size=64, lr=2e-3, seed=seed, projector="always", resume=True, device="cpu", **settings
    )
    distill(config)
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        evaluate_retrieval(RetrievalConfig(model=str(run), out=str(result), device="cpu"))
    scores = read_result(result)["rows"][0]["scores"]
    return (scores["image_retrieval_recall@1"] + scores["text_retrieval_recall@1"]) / 2


def row_of(args: argparse.Namespace, codec: str | None) -> dict[str, Any]:
    name = codec or "none"
    if codec is None:
        recalls = [student_recall(args, None, name, seed) for seed in args.seeds]
        return {"codec": "no teacher", "recall": recalls}
    store = args.out / "store" / name
    array, option = f"image/{args.features}", "encode" if args.features == "embedding" else "reduce"
    encoding: dict[str, Any] = {"dtype": codec} if codec.startswith("float") else {option: codec}
    tokens = "image" if args.features == "tokens" else "none"
    extract(ExtractConfig(teacher=args.teacher, data=f"scenes/train:{args.images}", out=str(store), tokens=tokens, device="cpu", **encoding))
    if args.features == "tokens":
        store_stats(store)  # which `theia` standardises by
    spec = open_store(store).arrays[array]
    held_out = read_json(store / "run.json")["codecs"].get(array, {}).get("held_out", {})
    cosine = held_out.get("cosine", {})
    return {
        "codec": codec,
        "bytes_per_image": spec.row_bytes,
        "cosine_mean": cosine.get("mean", 1.0),
        "cosine_min": cosine.get("min", 1.0),
        "logit_error_mean": held_out.get("logit_error_mean", 0.0),
        "top1_agreement": held_out.get("top1_agreement_image_to_text", 1.0),
        "recall": [student_recall(args, store, name, seed) for seed in args.seeds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", default="embedding", choices=("embedding", "tokens"))
    parser.add_argument("--teacher", default="scenes-S")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--samples", type=int, default=16000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--codecs", nargs="+", help=f"default: {CODECS}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    args.out /= args.features
    rows = [row_of(args, codec) for codec in (*(args.codecs or CODECS[args.features]), None)]
    if args.json:
        print(json.dumps(rows))
        return
    print("| codec | bytes | cosine mean | least | logit error | top-1 agreement | recall@1 of students |\n| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        recalls = f"{statistics.mean(row['recall']):.1f} ({', '.join(f'{recall:.1f}' for recall in row['recall'])})"
        if "bytes_per_image" in row:
            numbers = f"{row['cosine_mean']:.5f} | {row['cosine_min']:.5f} | {row['logit_error_mean']:.3f} | {row['top1_agreement']:.3f}"
            print(f"| {row['codec']} | {row['bytes_per_image']} | {numbers} | {recalls} |")
        else:
            print(f"| {row['codec']} | - | - | - | - | - | {recalls} |")


if __name__ == "__main__":
    main()
