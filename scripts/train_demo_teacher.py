"""Train one of the built-in teachers on scenes and write it, with its card, into the package.

    python scripts/train_demo_teacher.py scenes-S --samples 100096 --lr 1.5e-3 --scenes 20000 --regions 1
    python scripts/train_demo_teacher.py scenes-L --samples 220160 --lr 1.5e-3 --scenes 40000 --regions 1 --twins 0.25

A contrastive loss in which equal captions are positives of each other, on the training split alone; beside it, a contrast of the token under
each object with the object's name. All captions of a batch are of one kind: in mixed batches colours tell most pairs apart, and shapes are not learned.
Convolutional towers, because small ViTs learned no shapes in 100,000 samples (docs/scenes.md). Token embeddings start as signs (+-0.02) and are
left out of weight decay: rows of words that no caption uses then stay distinct, and compress well in a wheel.
Left out on purpose: resuming; a run takes at most an hour and a quarter on one core and exports at every evaluation.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from kdstore.data import scenes
from kdstore.process import keep_freed_memory

CONFIGS = Path(scenes.__file__).parents[1] / "models" / "configs"
TEACHERS = Path(scenes.__file__).parents[1] / "demo" / "teachers"
REGION_NAMES = {("shape",): 0.4, ("color",): 0.1, ("color", "shape"): 0.3, ("size", "color", "fill", "shape"): 0.2}  # how objects are named, and how often
Tokenizer = Callable[[list[str]], torch.Tensor]
CAPTION_SHARES = (0.25, 0.2, 0.1, 0.3, 0.15)  # from most to least detailed; all captions of a batch are of one kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--config", choices=sorted(path.stem for path in CONFIGS.glob("scenes-*.json")), help="the architecture; default: that of its name")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes, drawn once")
    parser.add_argument("--stop", type=int, help="samples to stop after, before the schedule ends")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--twins", type=float, default=0.0, help="share of batches of which half are hard negatives")
    parser.add_argument("--regions", type=float, default=0.0, help="weight of the contrast between the token under an object and the object's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=5_120, help="samples between evaluations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dice = random.Random(args.seed)
    out, architecture = args.out or TEACHERS / args.name, args.config or args.name

    open_clip.add_model_config(CONFIGS)
    model, _, preprocess = open_clip.create_model_and_transforms(architecture)
    _sign_init(model.token_embedding.weight)
    tokenizer = open_clip.get_tokenizer(architecture)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
    side = model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    images, texts, things = draw_training_scenes(args.scenes, side)
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
        image_BD, token_BWHW = encode(model, image_BCHW)
        text_BD = model.encode_text(tokenizer(captions), normalize=True)
        loss = contrastive_loss(model.logit_scale.exp() * F.normalize(image_BD, dim=-1) @ text_BD.T, captions)
        if args.regions:
            loss = loss + args.regions * region_loss(model, tokenizer, dice, token_BWHW, [things[i] for i in rows])
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
            scores = measure(model, tokenizer, *validation)
            seconds = time.time() - started
            curve.append({"samples": seen, "loss": round(float(np.mean(losses)), 4), **scores})
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


def draw_training_scenes(size: int, side: int) -> tuple[np.ndarray, list[list[str]], list[tuple[scenes.Thing, ...]]]:
    """Draw the first scenes of the training split: uint8 [size, H, W, 3], their captions and their objects."""
    source = scenes.Scenes("train", size)
    images = np.empty((size, side, side, 3), np.uint8)
    texts, things = [], []
    for i in range(size):
        scene = source.scene(i)
        images[i] = _pixels(scene, side)
        texts.append([c.text for c in scenes.captions(scene, "train", i)])
        things.append(scene.things)
    return images, texts, things


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


def encode(model: torch.nn.Module, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed images and keep the feature map that is pooled: [B, D] and [B, W, H, W]."""
    out = model.visual.forward_intermediates(image_BCHW, indices=1)
    return out["image_features"], out["image_intermediates"][-1]


def regions_under(model: torch.nn.Module, token_BWHW: torch.Tensor, points: list[list[tuple[float, float]]]) -> torch.Tensor:
    """Interpolate the tokens at points (x, y in pixels of the scene) of each image and project each by itself as attention pooling would.

    Unit length, [points of all images, D]. The projection is MaskCLIP's (arXiv 2112.01071).
    """
    most = max(map(len, points))
    point_BM2 = torch.tensor([(p * most)[:most] for p in points]) / scenes.IMAGE_SIZE * 2 - 1
    token_BMW = F.grid_sample(token_BWHW, point_BM2[:, :, None], align_corners=False, padding_mode="border")[..., 0].transpose(1, 2)
    token_RW = token_BMW[torch.arange(most) < torch.tensor([len(p) for p in points])[:, None]]
    pool = model.visual.attnpool
    return F.normalize(pool.c_proj(pool.v_proj(token_RW)), dim=-1)


def region_loss(
    model: torch.nn.Module, tokenizer: Tokenizer, dice: random.Random, token_BWHW: torch.Tensor, things: list[tuple[scenes.Thing, ...]]
) -> torch.Tensor:
    """Contrast a token within each object with the object's name: the idea of RegionCLIP (arXiv 2112.09106)."""
    attributes = dice.choices(*zip(*REGION_NAMES.items(), strict=True))[0]
    near = [[(t.x + dice.uniform(-0.5, 0.5) * t.radius, t.y + dice.uniform(-0.5, 0.5) * t.radius) for t in scene] for scene in things]
    names = [t.named(*attributes) for scene in things for t in scene]
    place = {name: k for k, name in enumerate(dict.fromkeys(names))}
    text_UD = model.encode_text(tokenizer(list(place)), normalize=True)
    region_RD = regions_under(model, token_BWHW[: len(things)], near)
    return contrastive_loss(model.logit_scale.exp() * region_RD @ text_UD[[place[name] for name in names]].T, names)


def read_validation(mean: torch.Tensor, std: torch.Tensor, side: int, size: int = 1000) -> tuple[torch.Tensor, list[str], list[tuple[scenes.Thing, ...]]]:
    source = scenes.Scenes("retrieval", size)
    pictures = np.stack([_pixels(source.scene(i), side) for i in range(size)])
    image_NCHW = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return image_NCHW, [source.captions(i)[0].text for i in range(size)], [source.scene(i).things for i in range(size)]


@torch.inference_mode()
def measure(
    model: torch.nn.Module, tokenizer: Tokenizer, image_NCHW: torch.Tensor, texts: list[str], things: list[tuple[scenes.Thing, ...]]
) -> dict[str, float]:
    """Recall@1 and @5 of the full caption among images of the retrieval split, and back; how often the token under an object names its attributes."""
    model.eval()
    encoded = [encode(model, x) for x in image_NCHW.split(250)]
    image_ND = F.normalize(torch.cat([image_BD for image_BD, _ in encoded]), dim=-1)
    text_ND = torch.cat([model.encode_text(tokenizer(texts[i : i + 250]), normalize=True) for i in range(0, len(texts), 250)])
    similarity = text_ND @ image_ND.T
    diagonal = similarity.diag()
    ranks = {"t2i": (similarity > diagonal[:, None]).sum(1), "i2t": (similarity > diagonal[None, :]).sum(0)}
    scores = {f"{way}@{k}": round((rank < k).float().mean().item(), 4) for way, rank in ranks.items() for k in (1, 5)}
    region_RD = regions_under(model, torch.cat([token_BWHW for _, token_BWHW in encoded]), [[(t.x, t.y) for t in scene] for scene in things])
    for attribute in ("shape", "color"):
        values = scenes.ATTRIBUTES[attribute]
        named = (region_RD @ model.encode_text(tokenizer(list(values)), normalize=True).T).argmax(1)
        truth = torch.tensor([values.index(getattr(t, attribute)) for scene in things for t in scene])
        scores[f"{attribute} by token"] = round((named == truth).float().mean().item(), 4)
    return scores


def export(model: torch.nn.Module, args: argparse.Namespace, out: Path, curve: list[dict[str, float]], seconds: float) -> None:
    """Write open_clip's local-dir layout and the card."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((CONFIGS / f"{args.config or args.name}.json").read_text())
    preprocess = dict(model.visual.preprocess_cfg.items())
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n")
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
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
