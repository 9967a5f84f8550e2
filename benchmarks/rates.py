"""GMACs per second that towers reach, forward and in training: what [cost] of a study's recipe wants to know of a machine.

    python benchmarks/rates.py [--models ViT-B-32 ViT-L-14 ...] [--device cuda --precision bf16] [--json]

The image tower's forward pass under inference mode, and steps of the task's loss through both towers with AdamW (three GMACs for each of a forward pass),
as `kdstore study run --dry-run` times them: random weights, blank images, small batches; the median of a second. One model after the other. `--cpu-time` counts
the seconds of processor time instead, for one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from kdstore.models.cost import cost_of
from kdstore.models.load import pick_device
from kdstore.study.rates import encoding_rate, training_rate

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-T-16", "ViT-S-16", "MobileCLIP2-S0", "scenes-T", "scenes-S", "scenes-L")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="auto: fp32 on the CPU, else mixed")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    forward = "fp32" if args.precision == "auto" else args.precision
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    rows = {}
    for name in args.models:
        cost = cost_of(name)
        encode, train = encoding_rate(name, cost, device, forward, clock=clock), training_rate(name, cost, device, args.precision, clock=clock)
        rows[name] = {
            "gmacs_of_pair": round(cost.image_gmacs + cost.text_gmacs, 3),
            "forward_gmacs_per_second": round(encode, 1),
            "images_per_second": round(encode / cost.image_gmacs, 1),
            "training_gmacs_per_second": round(train, 1),
            "pairs_per_second": round(train / 3 / (cost.image_gmacs + cost.text_gmacs), 1),
        }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if args.json:
        print(json.dumps({"device": where, "rates": rows}))
        return
    print(f"{where}\n\n| model | GMACs a pair | forward, GMAC/s | images/s | training, GMAC/s | pairs/s |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:,.1f}' for value in row.values())} |")


if __name__ == "__main__":
    main()
