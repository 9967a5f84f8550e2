"""Small networks that answer questions from image features: one question encoder, three heads.

The words of all questions on an image lie behind each other in one row, so that an image's keys and values are computed once for all its
questions and hardly anything is padded; a mask keeps questions apart. Heads of different models differ in the projection of their image
features and in nothing else (see `head_parameters`).

`coattention` is METER's head (arXiv 2111.02387) made small: layers of self-attention over words, cross-attention to image tokens and an MLP, then
both pooled states through Linear-LayerNorm-GELU-Linear. Left out on purpose: image tokens do not attend to the words, which would cost a pass over all tokens
per question. Unlike METER's it multiplies: its MLPs are gated (GEGLU, arXiv 2002.05202), and the pooled states meet as a product (arXiv 1610.04325): it learns
sooner at the same cost (docs/results.md). `butd` attends once, from the question's state to tokens without places, and multiplies the two (arXiv 1707.07998,
with the attention of Pythia, arXiv 1807.09956): all that it knows of where things are is in the tokens. `pooled` sees an image as one embedding: weak.

Where a question has two images, the tokens of both lie behind each other, and a learned mark says which image a token is of.

R rows (the images of some questions), S words of a row with padding, P questions of a row with padding, T image tokens (of all I images), W their width,
D width of the head, A answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kdstore.evaluate.answers import PADDING, START

MAX_WORDS = 64
"""Words of a question that are read, with its start; further ones are cut off."""

EMBEDDING_STD = 0.3
"""Of drawn vectors of words; torch's 1 drowns what the first layers add to a word, which no norm makes up for."""


@dataclass(frozen=True)
class PackedQuestions:
    """Questions of R rows behind each other.

    `word_RS` int64 ids (0 pads), `place_RS` int64 place of each word in its question, `segment_RS` int64 number of the question in its row
    (-1 pads), `start_RP` int64 where each question starts (-1 pads).
    """

    word_RS: torch.Tensor
    place_RS: torch.Tensor
    segment_RS: torch.Tensor
    start_RP: torch.Tensor


class WordQuestions(nn.Module):
    """Words as learned vectors: the question encoder's input in the main protocol."""

    def __init__(self, num_ids: int, width: int) -> None:
        super().__init__()
        self.embedding = _embedding(num_ids, width, padding_idx=PADDING)

    def forward(self, word_RS: torch.Tensor) -> torch.Tensor:
        return self.embedding(word_RS)


class TowerQuestions(nn.Module):
    """Frozen states of a text tower as words: id START + 1 + i is row i of `states` [words of all distinct questions, width of the tower]."""

    def __init__(self, states: torch.Tensor, width: int) -> None:
        super().__init__()
        self.states: torch.Tensor
        self.register_buffer("states", states, persistent=False)
        self.special = _embedding(START + 1, width, padding_idx=PADDING)
        self.projection = nn.Linear(states.shape[1], width)

    def forward(self, word_RS: torch.Tensor) -> torch.Tensor:
        state_RSW = self.states[(word_RS - START - 1).clamp_min(0)].float()
        return torch.where((word_RS <= START)[..., None], self.special(word_RS.clamp_max(START)), self.projection(state_RSW))


class Attention(nn.Module):
    """Multi-head attention of x to a context."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_RSD: torch.Tensor, context_RTD: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(context_RTD).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(heads(self.query(x_RSD)), heads(key), heads(value), attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """An MLP whose hidden units are products of two maps, one of them through GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x_RSD: torch.Tensor) -> torch.Tensor:
        gate, value = self.gate_value(x_RSD).chunk(2, dim=-1)
        return self.out(F.gelu(gate) * value)


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a context, MLP; each on normalised input and added to the stream."""

    def __init__(self, width: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width) if cross else nn.Identity()
        self.cross_attention = Attention(width, num_heads) if cross else None
        self.mlp = nn.Sequential(nn.LayerNorm(width), GatedMlp(width, 2 * width))

    def forward(self, x_RSD: torch.Tensor, mask: torch.Tensor, context_RTD: torch.Tensor | None = None) -> torch.Tensor:
        y_RSD = self.self_norm(x_RSD)
        x_RSD = x_RSD + self.self_attention(y_RSD, y_RSD, mask)
        if self.cross_attention is not None:
            x_RSD = x_RSD + self.cross_attention(self.cross_norm(x_RSD), context_RTD)
        return x_RSD + self.mlp(x_RSD)


class QuestionEncoder(nn.Module):
    """Words and their places, then one layer of self-attention within each question."""

    def __init__(self, words: nn.Module, width: int, num_heads: int) -> None:
        super().__init__()
        self.words = words
        self.place = _embedding(MAX_WORDS, width)
        self.layer = Layer(width, num_heads, cross=False)

    def forward(self, questions: PackedQuestions, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(self.words(questions.word_RS) + self.place(questions.place_RS), mask)


@dataclass(frozen=True)
class HeadShape:
    """What a head is built for: width of the image features, images of a question, answers; its own width, layers and attention heads."""

    image_width: int
    num_images: int
    num_answers: int
    width: int
    layers: int
    attention_heads: int


class ImageInput(nn.Module):
    """Project normalised features to the head's width, and mark of which image each is."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.image_projection = nn.Linear(shape.image_width, shape.width)
        self.mark = nn.Embedding(shape.num_images, shape.width) if shape.num_images > 1 else None

    def forward(self, image_RTW: torch.Tensor) -> torch.Tensor:
        image_RTD: torch.Tensor = self.image_projection(F.layer_norm(image_RTW, image_RTW.shape[-1:]))
        if self.mark is None:
            return image_RTD
        return image_RTD + self.mark.weight.repeat_interleave(image_RTD.shape[1] // len(self.mark.weight), dim=0)


class CoAttentionHead(nn.Module):
    """Question words attend to image tokens; answers from the product of the question's state and the image tokens pooled by it."""

    def __init__(self, shape: HeadShape, encoder: QuestionEncoder) -> None:
        super().__init__()
        self.num_images = shape.num_images
        self.encoder = encoder
        self.image = ImageInput(shape)
        self.image_norm = nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.attention_heads, cross=True) for _ in range(shape.layers))
        self.state_norm = nn.LayerNorm(shape.width)
        self.pool = Attention(shape.width, shape.attention_heads)
        self.from_state, self.from_image = (nn.Linear(shape.width, 2 * shape.width) for _ in range(2))
        self.answers = _answer_layers(2 * shape.width, shape.num_answers)

    def forward(self, image_RTW: torch.Tensor, questions: PackedQuestions) -> torch.Tensor:
        """Return logits [R, P, A]."""
        image_RTD = self.image(image_RTW)
        places = token_places(image_RTD.shape[1] // self.num_images, image_RTD.shape[2], image_RTD.device)
        image_RTD = self.image_norm(image_RTD + places.repeat(self.num_images, 1))
        mask = question_mask(questions)
        x_RSD = self.encoder(questions, mask)
        for layer in self.layers:
            x_RSD = layer(x_RSD, mask, image_RTD)
        state_RPD = self.state_norm(_question_states(x_RSD, questions))
        return self.answers(self.from_state(state_RPD) * self.from_image(self.pool(state_RPD, image_RTD)))


class TopDownHead(nn.Module):
    """One attention of the question's state over image tokens, then the product of both: bottom-up and top-down attention, without its regions.

    A token's weight is the softmax of w * (relu(V token) . relu(Q state)).
    """

    def __init__(self, shape: HeadShape, encoder: QuestionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.image = ImageInput(shape)
        self.image_norm = nn.LayerNorm(shape.width)
        self.state_norm = nn.LayerNorm(shape.width)
        self.attend_image, self.attend_state = _rectified(shape.width), _rectified(shape.width)
        self.weight = nn.Linear(shape.width, 1, bias=False)
        self.from_image, self.from_state = _rectified(shape.width), _rectified(shape.width)
        self.answers = _answer_layers(shape.width, shape.num_answers)

    def forward(self, image_RTW: torch.Tensor, questions: PackedQuestions) -> torch.Tensor:
        """Return logits [R, P, A]."""
        image_RTD = self.image_norm(self.image(image_RTW))
        x_RSD = self.encoder(questions, question_mask(questions))
        state_RPD = self.state_norm(_question_states(x_RSD, questions))
        weight_RPT = ((self.attend_state(state_RPD) * self.weight.weight) @ self.attend_image(image_RTD).mT).softmax(dim=-1)
        return self.answers(self.from_state(state_RPD) * self.from_image(weight_RPT @ image_RTD))


class PooledHead(nn.Module):
    """One embedding of each image beside the question's state, through an MLP."""

    def __init__(self, shape: HeadShape, encoder: QuestionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.image = ImageInput(shape)
        self.state_norm = nn.LayerNorm(shape.width)
        self.answers = _answer_layers((1 + shape.num_images) * shape.width, shape.num_answers)

    def forward(self, image_RTW: torch.Tensor, questions: PackedQuestions) -> torch.Tensor:
        """Return logits [R, P, A]; each image is one row of `image_RTW`."""
        x_RSD = self.encoder(questions, question_mask(questions))
        state_RPD = self.state_norm(_question_states(x_RSD, questions))
        image_RE = self.image(image_RTW).flatten(1)
        return self.answers(torch.cat([state_RPD, image_RE[:, None].expand(-1, state_RPD.shape[1], -1)], dim=-1))


def question_mask(questions: PackedQuestions) -> torch.Tensor:
    """Let each word see the words of its own question; additive float32 [R, 1, S, S]."""
    same_RSS = questions.segment_RS[:, :, None] == questions.segment_RS[:, None, :]
    return torch.zeros(same_RSS.shape, device=same_RSS.device).masked_fill_(~same_RSS, -math.inf)[:, None]


def token_places(num_tokens: int, width: int, device: torch.device) -> torch.Tensor:
    """Return fixed sines and cosines of each token's row and column [T, D]: no parameters, so that all grids have the same number of them.

    The waves make a quarter of a turn to four turns over the whole image, whatever its grid: those for sequences are nearly constant over a few rows, so that
    places are hardly heard beside what is there. Tokens that are no square grid count as one row.
    """
    side = math.isqrt(num_tokens)
    rows, columns = (side, side) if side * side == num_tokens else (1, num_tokens)
    place_T = torch.arange(num_tokens, device=device)
    share_T2 = torch.stack([(place_T // columns + 0.5) / rows, (place_T % columns + 0.5) / columns], dim=1)
    angle_T2F = math.pi / 2 * share_T2[..., None] * 16 ** torch.linspace(0, 1, width // 4, device=device)
    return F.pad(torch.cat([angle_T2F.sin(), angle_T2F.cos()], dim=-1).flatten(1), (0, width % 4))


def head_parameters(head: nn.Module) -> dict[str, int]:
    """Count the trained parameters, in all and without the projections of model features (the only part that depends on the model)."""
    total = sum(p.numel() for p in head.parameters())
    projections = sum(p.numel() for name, p in head.named_parameters() if name.split(".")[-2] in ("image_projection", "projection"))
    return {"total": total, "without_projections": total - projections}


def _embedding(num_ids: int, width: int, padding_idx: int | None = None) -> nn.Embedding:
    """Draw vectors of EMBEDDING_STD."""
    embedding = nn.Embedding(num_ids, width, padding_idx=padding_idx)
    with torch.no_grad():
        embedding.weight.mul_(EMBEDDING_STD)
    return embedding


def _question_states(x_RSD: torch.Tensor, questions: PackedQuestions) -> torch.Tensor:
    index_RP1 = questions.start_RP.clamp_min(0)[..., None]
    return x_RSD.gather(1, index_RP1.expand(-1, -1, x_RSD.shape[2]))


def _answer_layers(width: int, num_answers: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, num_answers))


def _rectified(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


HEADS: dict[str, Callable[[HeadShape, QuestionEncoder], nn.Module]] = {"coattention": CoAttentionHead, "butd": TopDownHead, "pooled": PooledHead}
"""Name -> what builds it; what each reads: `protocol.READS`."""
