"""The table of sizes and costs in docs/sharing.md: bytes per pair (an image and one caption) for some teachers and encodings.

    python scripts/store_sizes.py [--price 0.023]        # dollars per GB and month

Widths and numbers of tokens come from models built on the meta device (no weights), bytes from the arrays that an extraction would write, with shard indexes,
checksums and validity; keys, captions and the index of the rows come on top (some 100 bytes and the captions, compressed).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import open_clip
import torch
from open_clip.utils import to_2tuple

from kdstore.data.source import Caption
from kdstore.store import ArraySpec, Plan, embedding_array, parse_chain, scalar_array, token_array
from kdstore.store.plan import SIDES

TEACHERS = {
    "ViT-B-32": "ViT-B-32",
    "ViT-L-14": "ViT-L-14",
    "ViT-H-14": "ViT-H-14",
    "ViT-bigG-14": "ViT-bigG-14",
    "SigLIP2-SO400M": "ViT-SO400M-14-SigLIP2",
    "DFN-H": "ViT-H-14-quickgelu",
}
ENCODINGS = {  # what is encoded, and by which codec
    "embeddings float16": ("embedding", "float16"),
    "embeddings int8": ("embedding", "int8"),
    "tokens float16": ("tokens", "float16"),
    "tokens int8": ("tokens", "int8"),
    "tokens pca256+int8": ("tokens", "pca256+int8"),
    "tokens pool7+pq64": ("tokens", "pool7+pq64"),
}
PAIRS = {"1 M": 10**6, "12.8 M": 12_800_000, "1.28 B": 1_280_000_000}
UNIT_ROWS = 16_384
ROWS = 4 * UNIT_ROWS  # of the plan that is measured: whole units, so that bytes per pair are those of any large store


def forms(architecture: str) -> tuple[int, tuple[int, int]]:
    """Return the width of the embeddings, and number and width of the image tokens without class and register tokens."""
    visual = open_clip.create_model(architecture, device="meta").visual.eval()
    image = torch.empty(1, 3, *to_2tuple(visual.image_size), device="meta")
    with torch.no_grad():
        tokens = visual.forward_intermediates(image, indices=1, normalize_intermediates=True, output_fmt="NLC")["image_intermediates"][-1]
    return open_clip.get_model_config(architecture)["embed_dim"], (tokens.shape[1], tokens.shape[2])


def arrays(plan: Plan, dim: int, tokens: tuple[int, int], what: str, codec: str) -> Iterator[ArraySpec]:
    """Yield the arrays of an encoding: both sides' embeddings with what is valid, or the tokens of the images."""
    chain = parse_chain(codec)
    if what == "tokens":
        yield token_array(plan, "image", *chain.shapes(tokens)[-1], dtype=chain.dtype)
        return
    for side in SIDES:
        yield embedding_array(plan, side, *chain.shapes((dim,))[-1], dtype=chain.dtype)
        yield scalar_array(plan, f"{side}/valid", "uint8")


def bytes_per_pair(plan: Plan, specs: Iterator[ArraySpec]) -> float:
    """Return the bytes of all shards and checks per row."""
    return sum(sum(spec.plain_shard_bytes(number) for number in range(spec.num_shards)) + 4 * spec.num_chunks for spec in specs) / plan.num_images


def in_words(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=0.023, help="dollars per GB (10^9 bytes) and month")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes per pair by teacher and encoding")
    args = parser.parse_args()
    plan = Plan.freeze(((str(i), (Caption(""),)) for i in range(ROWS)), unit_rows=UNIT_ROWS)
    table: dict[str, dict[str, float]] = {}
    for name, architecture in TEACHERS.items():
        dim, tokens = forms(architecture)
        sizes = {what: bytes_per_pair(plan, arrays(plan, dim, tokens, *codecs)) for what, codecs in ENCODINGS.items()}
        table[f"{name} ({dim}; {tokens[0]} x {tokens[1]})"] = sizes
    if args.json:
        print(json.dumps(table))
        return
    print(f"| teacher (embedding; tokens) | pairs | {' | '.join(ENCODINGS)} |\n| --- | --- |" + " ---: |" * len(ENCODINGS))
    for teacher, sizes in table.items():
        rows = {"1, bytes": [f"{size:,.0f}" for size in sizes.values()]}
        rows |= {said: [in_words(size * pairs) for size in sizes.values()] for said, pairs in PAIRS.items()}
        rows["12.8 M, dollars a month"] = [f"{size * PAIRS['12.8 M'] / 1e9 * args.price:,.2f}" for size in sizes.values()]
        for said, cells in rows.items():
            print(f"| {teacher} | {said} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
