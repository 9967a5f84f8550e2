"""Heads and their packed questions: shapes, masks, and what may depend on the model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdstore.errors import EvaluationError
from kdstore.evaluate.answers import START
from kdstore.evaluate.features import kept_images, on_grid, without_image
from kdstore.evaluate.fit import Lessons, answer_questions, build_head, fit_head, held_out_accuracy
from kdstore.evaluate.heads import HEADS, MAX_WORDS, PackedQuestions, head_parameters, token_places
from kdstore.evaluate.packing import QUESTIONS_PER_ROW, pack_questions, packed_batch
from kdstore.evaluate.protocol import HEADS_VERSION, READS, VqaConfig

CPU = torch.device("cpu")
QUESTIONS = [[3, 4, 5], [6], [3, 7, 8, 9, 4], [5, 5], [], [9, 8, 7]]
IMAGES = [0, 1, 0, 2, 1, 0]


def make_head(kind: str, image_width: int = 20, states: torch.Tensor | None = None, num_images: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = VqaConfig(model="x", head=kind, width=16, attention_heads=2)
    return build_head(config, image_width, 5, num_words=7, states=states, num_images=num_images).eval()


def make_images(kind: str, seed: int = 0, num_images: int = 3, width: int = 20) -> np.ndarray:
    tokens = 1 if READS[kind] == "embedding" else 9
    return np.random.default_rng(seed).normal(size=(num_images, tokens, width)).astype(np.float16)


def logits_by_question(head: nn.Module, image: np.ndarray, questions: list[list[int]], images: list[int] | list[tuple[int, ...]]) -> dict[int, torch.Tensor]:
    rows = pack_questions(questions, [i if isinstance(i, tuple) else (i,) for i in images])
    packed = packed_batch(rows, np.arange(len(rows)), CPU)
    with torch.no_grad():
        logits = head(torch.from_numpy(image)[rows.image_RI].float().flatten(1, 2), packed)
    assert logits.shape == (*packed.start_RP.shape, 5)
    return {int(q): logits[r, p] for (r, p), q in np.ndenumerate(rows.question_RP) if q >= 0}


@pytest.mark.parametrize("kind", HEADS)
def test_a_question_gets_the_same_logits_alone_and_among_others(kind: str) -> None:
    head, image = make_head(kind), make_images(kind)
    together = logits_by_question(head, image, QUESTIONS, IMAGES)
    assert set(together) == set(range(len(QUESTIONS)))
    for q, (words, number) in enumerate(zip(QUESTIONS, IMAGES, strict=True)):
        torch.testing.assert_close(logits_by_question(head, image, [words], [number])[0], together[q], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_what_heads_compute_changes_with_their_version_alone(kind: str) -> None:
    """From the same draw the same logits: where this fails, HEADS_VERSION rises, or rows and results of other heads are taken for these."""
    assert HEADS_VERSION == 2
    logits = logits_by_question(make_head(kind), make_images(kind), [[3, 4, 5]], [0])[0]
    torch.testing.assert_close(logits, torch.tensor(LOGITS[kind]), atol=1e-3, rtol=1e-3)


LOGITS = {
    "coattention": [-0.4279, -0.8441, 0.5380, -0.0211, 0.0527],
    "butd": [-0.9665, 0.5267, 0.5247, 0.4337, 0.0400],
    "pooled": [0.1245, 0.1597, 0.0269, 0.1275, 0.5743],
}


@pytest.mark.parametrize("kind", HEADS)
def test_padding_does_not_change_the_logits(kind: str) -> None:
    head, image = make_head(kind), torch.from_numpy(make_images(kind)).float()
    rows = pack_questions(QUESTIONS, [(i,) for i in IMAGES])
    packed = packed_batch(rows, np.arange(3), CPU)
    longer = {
        name: torch.nn.functional.pad(getattr(packed, name), (0, 5), value=0 if name in ("word_RS", "place_RS") else -1)
        for name in (f.name for f in dataclasses.fields(PackedQuestions))
    }
    with torch.no_grad():
        plain, padded = head(image, packed), head(image, PackedQuestions(**longer))
    asked = packed.start_RP >= 0
    torch.testing.assert_close(padded[:, : plain.shape[1]][asked], plain[asked], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_logits_depend_on_the_image_and_on_the_words(kind: str) -> None:
    head = make_head(kind)
    first = logits_by_question(head, make_images(kind), [[3, 4]], [0])[0]
    assert not torch.allclose(first, logits_by_question(head, make_images(kind, seed=1), [[3, 4]], [0])[0], atol=1e-3)
    assert not torch.allclose(first, logits_by_question(head, make_images(kind), [[4, 3]], [0])[0], atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_question_only_sees_no_image(kind: str) -> None:
    head = make_head(kind)
    blind = [without_image(kept_images(make_images(kind, seed))).take(np.arange(3)).numpy() for seed in (0, 1)]
    assert blind[0].shape == (3, 1, 20)
    assert not blind[0].any()
    first, second = (logits_by_question(head, image, [[3, 4], [3, 4]], [0, 2]) for image in blind)
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[0], first[1])


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_different_models_differ_in_the_projection_alone(kind: str) -> None:
    counts = [head_parameters(make_head(kind, image_width)) for image_width in (20, 33)]
    assert counts[0]["without_projections"] == counts[1]["without_projections"]
    assert counts[1]["total"] - counts[0]["total"] == 13 * 16


@pytest.mark.parametrize("kind", HEADS)
def test_states_of_a_text_tower_stand_in_for_words(kind: str) -> None:
    states = torch.randn(10, 24, dtype=torch.float16)
    head = make_head(kind, states=states)
    words = [[START + 1 + 2, START + 1 + 3], [START + 1 + 9]]
    logits = logits_by_question(head, make_images(kind), words, [0, 1])
    other = make_head(kind, states=torch.cat([states[:9], states[:1]]))
    changed = logits_by_question(other, make_images(kind), words, [0, 1])
    torch.testing.assert_close(logits[0], changed[0])
    assert not torch.allclose(logits[1], changed[1], atol=1e-4)
    assert not head.encoder.words.states.requires_grad


@given(st.lists(st.tuples(st.lists(st.integers(3, 30), max_size=MAX_WORDS + 5), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=40)
def test_packing_keeps_every_question_with_its_image_and_words(asked: list[tuple[list[int], int]]) -> None:
    words, images = [w for w, _ in asked], [(i, 3 - i) for _, i in asked]
    rows = pack_questions(words, images)
    assert sorted(rows.question_RP[rows.question_RP >= 0].tolist()) == list(range(len(asked)))
    assert rows.question_RP.shape[1] <= QUESTIONS_PER_ROW
    for (r, p), q in np.ndenumerate(rows.question_RP):
        if q >= 0:
            mine = rows.segment_RS[r] == p
            assert tuple(rows.image_RI[r]) == images[q]
            assert rows.word_RS[r][mine].tolist() == [START, *words[q]][:MAX_WORDS]
            assert rows.place_RS[r][mine].tolist() == list(range(int(mine.sum())))
            assert np.flatnonzero(mine)[0] == rows.start_RP[r, p]


def test_places_of_a_grid_are_all_different_and_fixed() -> None:
    for num_tokens, width in ((49, 64), (50, 64), (1, 16), (64, 18)):
        places = token_places(num_tokens, width, CPU)
        assert places.shape == (num_tokens, width)
        assert len(np.unique(places.numpy().round(4), axis=0)) == num_tokens


def test_most_of_a_place_is_what_tells_it_from_others_whatever_the_grid() -> None:
    for num_tokens in (16, 49, 196, 576):
        places = token_places(num_tokens, 64, CPU)
        assert places.var(dim=0, correction=0).sum() > 0.6 * places.square().sum(dim=1).mean()


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_learns_from_its_seed_alone(kind: str) -> None:
    """The answer is the sign of one feature: learnable, and learned twice alike."""
    config = VqaConfig(model="x", head=kind, width=16, attention_heads=2, epochs=8, batch_images=8, learning_rate=1e-2)
    image = make_images(kind, num_images=48)
    image[:, :, 0] = np.where(np.arange(48) % 2, 3, -3)[:, None]
    rows = pack_questions([[3, 4]] * 48, [(i,) for i in range(48)])
    lessons = Lessons(kept_images(image), rows, [{q % 2: 1.0} for q in range(48)])
    answers, losses = [], []
    for _ in range(2):
        parts = nn.ModuleDict({"head": make_head(kind)})
        losses.append(fit_head(parts, lessons, config, 0, CPU))
        answers.append(answer_questions(parts, lessons.images, rows, CPU))
    assert losses[0] == losses[1]
    assert (answers[0] == answers[1]).all()
    assert (answers[0] == np.arange(48) % 2).mean() > 0.9


@pytest.mark.parametrize("kind", HEADS)
def test_of_two_images_a_head_knows_which_is_which(kind: str) -> None:
    head, image = make_head(kind, num_images=2), make_images(kind)
    first, second, same = (logits_by_question(head, image, [[3, 4]], [pair])[0] for pair in ((0, 1), (1, 0), (0, 1)))
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, second, atol=1e-4)
    assert not torch.allclose(first, logits_by_question(head, image, [[3, 4]], [(0, 2)])[0], atol=1e-4)
    assert head_parameters(head)["total"] > head_parameters(make_head(kind))["total"]


def test_one_top_down_attention_knows_no_places_and_weighs_tokens_by_the_question() -> None:
    head, image = make_head("butd"), make_images("butd")
    plain = logits_by_question(head, image, [[3, 4]], [0])[0]
    torch.testing.assert_close(plain, logits_by_question(head, image[:, ::-1].copy(), [[3, 4]], [0])[0])
    with torch.no_grad():
        head.weight.weight.zero_()  # all tokens weigh the same
    assert not torch.allclose(plain, logits_by_question(head, image, [[3, 4]], [0])[0], atol=1e-6)


def test_tokens_are_averaged_to_a_grid_or_refused() -> None:
    grid = torch.arange(16.0).reshape(1, 16, 1).half()
    assert on_grid(grid, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert on_grid(grid, None) is grid
    assert on_grid(grid, 4) is grid
    for tokens, said in ((grid, r"16 tokens \(4 x 4\)"), (grid[:, :15], "no square grid")):
        with pytest.raises(EvaluationError, match=said):
            on_grid(tokens, 5)


def test_a_loss_that_is_not_finite_ends_training_with_its_step() -> None:
    config = VqaConfig(model="x", head="pooled", width=16, attention_heads=2, epochs=4, batch_images=2)
    image = make_images("pooled", num_images=8)
    image[3] = np.nan
    lessons = Lessons(kept_images(image), pack_questions([[3]] * 8, [(i,) for i in range(8)]), [{0: 1.0}] * 8)
    with pytest.raises(EvaluationError, match=r"The loss of model is nan at step \d+\."):
        fit_head(nn.ModuleDict({"head": make_head("pooled")}), lessons, config, 0, CPU, stage="model")


def test_weights_that_are_not_finite_after_the_last_step_are_no_result() -> None:
    config = VqaConfig(model="x", head="pooled", width=16, attention_heads=2, epochs=1, batch_images=8, learning_rate=1e300)
    lessons = Lessons(kept_images(make_images("pooled", num_images=8)), pack_questions([[3]] * 8, [(i,) for i in range(8)]), [{0: 1.0}] * 8)
    with pytest.raises(EvaluationError, match=r"The weights of model are not finite at step 1 \(first: head\."):
        fit_head(nn.ModuleDict({"head": make_head("pooled")}), lessons, config, 0, CPU, stage="model")


def test_the_epoch_that_answers_most_of_the_questions_held_out_remains() -> None:
    """Held-out targets that contradict the training make every epoch after the first worse, so training ends and the first remains."""
    config = VqaConfig(model="x", head="pooled", width=16, attention_heads=2, epochs=30, batch_images=8, learning_rate=1e-2, patience=3, early_stopping=0.5)
    image = make_images("pooled", num_images=48)
    image[:, :, 0] = np.where(np.arange(48) % 2, 3, -3)[:, None]
    rows = pack_questions([[3, 4]] * 48, [(i,) for i in range(48)])
    lessons, wrong = (Lessons(kept_images(image), rows, [{(q + k) % 2: 1.0} for q in range(48)]) for k in (0, 1))
    parts = nn.ModuleDict({"head": make_head("pooled")})
    fitted = fit_head(parts, lessons, config, 0, CPU, held=wrong)
    assert fitted["steps"] == 6 * (fitted["epoch"] + 3) < 6 * 30
    assert held_out_accuracy(parts, wrong, CPU) == pytest.approx(fitted["held_out_accuracy"] / 100, abs=1e-4)
    right = fit_head(nn.ModuleDict({"head": make_head("pooled")}), lessons, config, 0, CPU, held=lessons)
    assert right["held_out_accuracy"] > 90
