"""Train one of the built-in teachers on scenes and write it, with its card, into the package.

    python scripts/train_demo_teacher.py scenes-S --samples 200000 --batch 128 --lr 2e-3 --scenes 20000
    python scripts/train_demo_teacher.py scenes-L --samples 180000 --batch 128 --twins 0.25 --patch-dropout 0.5 --scenes 30000

A contrastive loss in which equal captions are positives of each other, on the training split alone. All captions of a batch are of one
kind: in mixed batches colours tell most pairs apart, and after 160,000 samples such a model had learned nothing of shapes. Token embeddings start as signs
(+-0.02) and are left out of weight decay: rows of words that no caption uses then stay distinct, and compress well in a wheel.
Left out on purpose: resuming; a run takes under two hours on two cores and exports at every evaluation.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from kdstore.data import scenes

CONFIGS = Path(scenes.__file__).parents[1] / "models" / "configs"
TEACHERS = Path(scenes.__file__).parents[1] / "demo" / "teachers"
CAPTION_SHARES = (0.25, 0.2, 0.1, 0.3, 0.15)  # from most to least detailed; all captions of a batch are of one kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes, drawn once")
    parser.add_argument("--stop", type=int, help="samples to stop after, before the schedule ends")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--twins", type=float, default=0.0, help="share of batches of which half are hard negatives")
    parser.add_argument("--patch-dropout", type=float, default=0.0, help="share of patches dropped in the first 70 %% of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=20_480, help="samples between evaluations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Large tensors come and go every step; without this glibc returns them to the system each time.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dice = random.Random(args.seed)
    out = args.out or TEACHERS / args.name

    open_clip.add_model_config(CONFIGS)
    model, _, preprocess = open_clip.create_model_and_transforms(args.name)
    _sign_init(model.token_embedding.weight)
    tokenizer = open_clip.get_tokenizer(args.name)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
    side = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    images, texts = draw_training_scenes(args.scenes, side)
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and n != "token_embedding.weight"]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "token_embedding.weight"]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True)
    steps = args.samples // args.batch
    validation = read_validation(mean, std, side)
    started, curve, losses = time.time(), [], []
    order: list[int] = []
    by_kind: dict[int, list[float]] = collections.defaultdict(list)
    for step in range(steps):
        lr = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        dropping = isinstance(getattr(model.visual, "patch_dropout", None), open_clip.transformer.PatchDropout)
        wanted = args.patch_dropout if step < 0.7 * steps else 0.0
        if wanted and not dropping:
            model.visual.patch_dropout = open_clip.transformer.PatchDropout(wanted)
        elif dropping and not wanted:
            model.visual.patch_dropout = torch.nn.Identity()
        rows, num_twins = [], args.batch // 2 if dice.random() < args.twins else 0
        while len(rows) < args.batch - num_twins:
            if not order:
                order = dice.sample(range(args.scenes), args.scenes)
            rows.append(order.pop())
        pictures = images[rows]
        kind = dice.choices(range(len(CAPTION_SHARES)), CAPTION_SHARES)[0]
        captions = [texts[i][kind] for i in rows]
        if num_twins:
            pictures, captions = with_twins(dice, pictures, captions, rows, side)
        image_BCHW = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
        image_BD = model.encode_image(image_BCHW, normalize=True)
        text_BD = model.encode_text(tokenizer(captions), normalize=True)
        logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T
        loss = contrastive_loss(logits_BB, captions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        by_kind[kind].append(loss.item())
        seen = (step + 1) * args.batch
        stopping = step == steps - 1 or (args.stop is not None and seen >= args.stop)
        if seen % args.every < args.batch or stopping:
            recalls = recall(model, tokenizer, *validation)
            seconds = time.time() - started
            curve.append({"samples": seen, "loss": round(float(np.mean(losses)), 4), **recalls})
            losses.clear()
            print({k: round(float(np.mean(v[-30:])), 3) for k, v in sorted(by_kind.items())}, flush=True)
            print(json.dumps({**curve[-1], "seconds": round(seconds), "scale": round(model.logit_scale.exp().item(), 1)}), flush=True)
            export(model, args, out, curve, seconds)
        if stopping:
            break


def _sign_init(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(torch.where(torch.rand_like(weight) < 0.5, -0.02, 0.02))


def _pixels(scene: scenes.Scene, side: int) -> np.ndarray:
    """Draw a scene at the size that a model reads, as its preprocessing does."""
    return np.asarray(scenes.draw(scene).resize((side, side), Image.Resampling.BICUBIC))


def draw_training_scenes(size: int, side: int) -> tuple[np.ndarray, list[list[str]]]:
    """Draw the first scenes of the training split: uint8 [size, H, W, 3] and their captions."""
    source = scenes.Scenes("train", size)
    images = np.empty((size, side, side, 3), np.uint8)
    texts = []
    for i in range(size):
        scene = source.scene(i)
        images[i] = _pixels(scene, side)
        texts.append([c.text for c in scenes.captions(scene, "train", i)])
    return images, texts


def with_twins(dice: random.Random, pictures: np.ndarray, captions: list[str], rows: list[int], side: int) -> tuple[np.ndarray, list[str]]:
    """Double a half batch by a twin of every scene, all under the full caption; a scene that has no twin stands twice."""
    twins, names = [], []
    for k, i in enumerate(rows):
        scene = scenes.make_scene("train", i)
        other = scenes.twin(scene, "swapped") if dice.random() < 0.5 else None
        other = other or scenes.twin(scene, "mirrored") or scene
        captions[k] = scenes.captions(scene, "train", i)[0].text
        twins.append(_pixels(other, side))
        names.append(scenes.captions(other, "train", i)[0].text)
    return np.concatenate([pictures, np.stack(twins)]), captions + names


def contrastive_loss(logits_BB: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """CLIP's symmetric cross-entropy with a target that is uniform over equal captions."""
    ids: dict[str, int] = {}
    label_B = torch.tensor([ids.setdefault(c, len(ids)) for c in captions])
    target_BB = (label_B[:, None] == label_B[None, :]).float()
    target_BB /= target_BB.sum(1, keepdim=True)
    return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2


def read_validation(mean: torch.Tensor, std: torch.Tensor, side: int, size: int = 1000) -> tuple[torch.Tensor, list[str]]:
    source = scenes.Scenes("retrieval", size)
    pictures = np.stack([_pixels(source.scene(i), side) for i in range(size)])
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std, [source.captions(i)[0].text for i in range(size)]


@torch.inference_mode()
def recall(model: torch.nn.Module, tokenizer: object, image_NCHW: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """Recall@1 and @5 of the full caption among 1,000 images of the retrieval split, and back."""
    model.eval()
    image_ND = torch.cat([model.encode_image(x, normalize=True) for x in image_NCHW.split(250)])
    text_ND = torch.cat([model.encode_text(tokenizer(texts[i : i + 250]), normalize=True) for i in range(0, len(texts), 250)])
    similarity = text_ND @ image_ND.T
    diagonal = similarity.diag()
    ranks = {"t2i": (similarity > diagonal[:, None]).sum(1), "i2t": (similarity > diagonal[None, :]).sum(0)}
    return {f"{way}@{k}": round((rank < k).float().mean().item(), 4) for way, rank in ranks.items() for k in (1, 5)}


def export(model: torch.nn.Module, args: argparse.Namespace, out: Path, curve: list[dict[str, float]], seconds: float) -> None:
    """Write open_clip's local-dir layout and the card."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((CONFIGS / f"{args.name}.json").read_text())
    preprocess = dict(model.visual.preprocess_cfg.items())
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n")
    save_file({k: v.detach().half().contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(args).items() if v is not None and k not in ("name", "out", "every", "threads"))
    card = {
        "name": args.name,
        "command": f"python scripts/train_demo_teacher.py {args.name} {options}",
        "seed": args.seed,
        "hardware": f"{args.threads} CPU thread(s)",
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "curve": curve,
        "data": f"scenes/train:{args.scenes}",
        "measured on": "scenes/retrieval:1000, full caption",
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
