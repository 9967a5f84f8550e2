"""Several teachers, their families and temperatures: what is summed, averaged, masked, split and refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdstore.distill.config import DistillConfig
from kdstore.distill.encoded import Encoded, Supervision, TeacherRows, map_rows
from kdstore.distill.losses import LOSSES, Term, needs_of, parse_loss
from kdstore.distill.objective import Objective, Teacher
from kdstore.distill.teachers import check_loss, describe_teachers, scale_of_entropy
from kdstore.distill.tokens import Standard
from kdstore.errors import ConfigError, KdstoreError, MissingFeature

STUDENT, TOKENS = 6, 4
SCALE = torch.tensor(9.0, dtype=torch.float64)
BIAS = torch.tensor(-2.0, dtype=torch.float64)
joint = [name for name, entry in LOSSES.items() if isinstance(entry, Term) and entry.joint]
separate = [name for name, entry in LOSSES.items() if isinstance(entry, Term) and entry.needs and not entry.joint]


def teacher(dim: int, weight: float = 1.0, scale: float = 20.0, bias: float | None = -3.0) -> Teacher:
    standard = Standard(np.zeros(dim), np.ones(dim))
    return Teacher(dim=dim, scale=scale, bias=bias, weight=weight, num_tokens=9, token_standard=standard, image_standard=standard)


def rows(dim: int, B: int, seed: int, valid: Sequence[int] | None = None) -> TeacherRows:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mask = None if valid is None else torch.isin(torch.arange(B), torch.tensor(valid))
    uniform = torch.rand(B, generator=draw, dtype=torch.float64)
    return TeacherRows(normal(B, dim), normal(B, dim), mask, normal(B, dim), normal(B, 9, dim), uniform)


def student(B: int) -> Encoded:
    draw = torch.Generator().manual_seed(99)
    shapes = ((B, STUDENT), (B, STUDENT), (B, STUDENT), (B, 4, TOKENS))
    return Encoded(*(torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes))


def objective(loss: str, teachers: Sequence[Teacher]) -> Objective:
    return Objective(loss, teachers, student_dim=STUDENT, token_width=TOKENS).double()


def value(made: Objective, encoded: Encoded, ids: Sequence[int], taught: Sequence[TeacherRows]) -> torch.Tensor:
    names = torch.tensor(ids)
    return made(encoded, SCALE, BIAS, Supervision(names, names, tuple(taught)))[0]


@pytest.mark.parametrize("name", separate)
def test_a_term_is_the_weighted_sum_over_teachers_of_different_widths(name: str) -> None:
    both = objective(name, [teacher(5, 0.25), teacher(8, 2.0, scale=70.0)])
    encoded, ids, taught = student(5), [0, 1, 0, 2, 3], [rows(5, 5, 1), rows(8, 5, 2)]
    expected = 0.0
    for k, (dim, weight, scale) in enumerate([(5, 0.25, 20.0), (8, 2.0, 70.0)]):
        alone = objective(name, [teacher(dim, scale=scale)])
        alone.heads[0].load_state_dict(both.heads[k].state_dict())
        expected += weight * value(alone, encoded, ids, [taught[k]]).item()
    assert value(both, encoded, ids, taught).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", separate)
def test_what_a_teacher_lacks_is_no_row_and_no_column_of_its_terms(name: str) -> None:
    valid = [0, 2, 3, 5]
    made, ids, taught = objective(name, [teacher(7)]), [0, 1, 0, 2, 3, 2], rows(7, 6, 3, valid)
    encoded = student(6)
    masked = value(made, encoded, ids, [taught])
    masked.backward()
    fewer = map_rows(lambda t: t.detach()[valid].requires_grad_(), encoded)
    there = map_rows(lambda t: t[valid], TeacherRows(taught.image_BD, taught.text_BD, None, taught.synthetic_BD, taught.tokens_BTW, taught.draw_B))
    expected = value(made, fewer, [ids[i] for i in valid], [there])
    expected.backward()
    assert masked.item() == pytest.approx(expected.item(), rel=1e-9)
    for whole, part in ((encoded.image_BS, fewer.image_BS), (encoded.text_BS, fewer.text_BS)):
        if part.grad is not None:
            torch.testing.assert_close(whole.grad[valid], part.grad)
            assert (whole.grad[[1, 4]] == 0).all(), "a row that the teacher lacks is not moved by it"


@pytest.mark.parametrize("name", separate)
def test_a_batch_of_which_a_teacher_has_nothing_or_too_little_adds_nothing(name: str) -> None:
    made, encoded = objective(name, [teacher(7)]), student(4)
    for valid in ([], [2]) if LOSSES[name].rows > 1 else ([],):  # type: ignore[union-attr]
        loss = value(made, encoded, [0, 1, 2, 3], [rows(7, 4, 3, valid)])
        loss.backward()
        assert loss.item() == 0
        assert encoded.image_BS.grad is not None
        assert (encoded.image_BS.grad == 0).all()


def test_an_ensemble_is_averaged_after_the_softmax_and_by_weights() -> None:
    made, encoded, taught = objective("reinforced", [teacher(5, 1.0, 40.0), teacher(8, 3.0, 10.0)]), student(4), [rows(5, 4, 1), rows(8, 4, 2)]

    def unit(x: torch.Tensor | None) -> np.ndarray:
        assert x is not None
        return (x / x.norm(dim=1, keepdim=True)).detach().numpy()

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    expected = 0.0
    for text, theirs in ((encoded.text_BS, [r.text_BD for r in taught]), (encoded.synthetic_BS, [r.synthetic_BD for r in taught])):
        z = 9 * unit(encoded.image_BS) @ unit(text).T
        logits = [g * unit(r.image_BD) @ unit(t).T for g, r, t in zip((40, 10), taught, theirs, strict=True)]
        for way in (lambda a: a, np.transpose):
            target = softmax(way(logits[0])) / 4 + softmax(way(logits[1])) * 3 / 4
            np.testing.assert_allclose(target.sum(axis=1), 1)
            expected -= (target * np.log(softmax(way(z)))).sum(axis=1).mean() / 2
    assert value(made, encoded, [0, 1, 2, 3], taught).item() == pytest.approx(expected, rel=1e-9)


def test_siglip_labels_are_averaged_after_the_sigmoid() -> None:
    made, encoded, taught = objective("siglip-kd", [teacher(5), teacher(5, scale=90.0)]), student(4), [rows(5, 4, 1), rows(5, 4, 2)]
    single = [objective("siglip-kd", [teacher(5, scale=scale)]) for scale in (20.0, 90.0)]
    mean = sum(value(one, encoded, [0, 1, 2, 3], [r]).item() for one, r in zip(single, taught, strict=True)) / 2
    assert value(made, encoded, [0, 1, 2, 3], taught).item() < mean, "log sigmoid is concave, so a mean of labels is less than a mean of losses"


def test_the_minimum_of_siglip_ce_is_the_teacher_and_that_of_siglip_kd_is_not() -> None:
    theirs = rows(STUDENT, 5, 4)
    assert theirs.image_BD is not None
    assert theirs.text_BD is not None
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    for name, at_rest in (("siglip-ce", True), ("siglip-kd", False)):
        encoded = Encoded(theirs.image_BD.clone().requires_grad_(), theirs.text_BD.clone().requires_grad_())
        loss, _ = objective(name, [teacher(STUDENT)])(encoded, scale, bias, Supervision(torch.arange(5), teachers=(theirs,)))
        gradients = torch.autograd.grad(loss, (encoded.image_BS, encoded.text_BS, scale, bias))
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients) == at_rest


def test_unic_keeps_the_worst_teacher_of_each_sample_and_counts_what_is_left_equally() -> None:
    made, encoded, taught = objective("unic", [teacher(5), teacher(8), teacher(4)]), student(6), [rows(d, 6, d) for d in (5, 8, 4)]
    alone = []
    for k, dim in enumerate((5, 8, 4)):
        one = objective("unic", [teacher(dim)])
        one.heads[0].load_state_dict(made.heads[k].state_dict())
        alone.append(
            [value(one, map_rows(lambda t, i=i: t[i : i + 1], encoded), [0], [map_rows(lambda t, i=i: t[i : i + 1], taught[k])]).item() for i in range(6)]
        )
    total, kept = 0.0, 0
    for i in range(6):
        worst = int(np.argmax([of_teacher[i] for of_teacher in alone]))
        for k in range(3):
            draw = taught[k].draw_B
            assert draw is not None
            if k == worst or draw[i] >= 0.5:
                total, kept = total + alone[k][i], kept + 1
    assert 6 < kept < 18
    assert value(made, encoded, list(range(6)), taught).item() == pytest.approx(total / kept, rel=1e-9)


@pytest.mark.parametrize("name", ["crd", "teacher-ce", "reinforced", "dist", "cross-kd", "gd-true"])
def test_a_given_temperature_is_the_scale_of_a_softmax_term(name: str) -> None:
    encoded, taught = student(4), [rows(7, 4, 1)]
    fixed, own = objective(name, [dataclasses.replace(teacher(7), softmax_scale=55.0)]), objective(name, [teacher(7, scale=55.0)])
    assert value(fixed, encoded, [0, 1, 2, 3], taught) == value(own, encoded, [0, 1, 2, 3], taught)
    if name == "crd":
        ce = objective("siglip-ce", [dataclasses.replace(teacher(7), softmax_scale=55.0)])
        assert value(ce, encoded, [0, 1, 2, 3], taught) == value(objective("siglip-ce", [teacher(7)]), encoded, [0, 1, 2, 3], taught)


@given(st.floats(0.01, 0.99), st.integers(2, 12), st.integers(0, 99))
def test_a_matched_scale_gives_the_entropy_that_was_asked_for(share: float, B: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, B, 7))) for _ in range(3)]
    sample = [(image[: 1 + B // 2], text) for image, text in pairs]
    entropy = share * math.log(B)
    scale = scale_of_entropy(sample, entropy)
    found = []
    for image, text in sample:
        p = np.exp(scale * (image @ text.T - (image @ text.T).max(axis=1, keepdims=True)))
        p /= p.sum(axis=1, keepdims=True)
        found.append(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1))
    assert np.mean(found) == pytest.approx(entropy, abs=1e-6)


def test_captions_that_are_all_equal_have_no_scale_of_low_entropy() -> None:
    row = np.ones((4, 3)) / math.sqrt(3)
    with pytest.raises(ConfigError, match="No scale up to"):
        scale_of_entropy([(row, row)], 0.5)


class Known:
    """Targets of which only what is known before a batch is asked."""

    def __init__(self, bias: float | None = None, scale: float | None = 20.0, tokens: int = 9) -> None:
        self.name, self.logit_scale, self.logit_bias, self.tokens = "known", scale, bias, tokens

    def shape(self, array: str) -> tuple[int, ...]:
        return (self.tokens, 8) if array.endswith("tokens") else (8,)

    def image(self, array: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is read before the first step")

    def text(self, array: str, rows: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is read before the first step")

    def standard(self, array: str, kind: str) -> Standard:
        return Standard(np.zeros(8), np.ones(8))


SOFTMAX, SIGMOID = Known(), Known(bias=-10.0)


@pytest.mark.parametrize(
    ("loss", "targets", "settings", "error", "said"),
    [
        ("clip-kd", [SIGMOID], {}, ConfigError, "known was trained with a sigmoid (its logit bias is -10), and crd takes the softmax"),
        ("affinity", [SOFTMAX, SIGMOID], {}, ConfigError, "trained with a sigmoid"),
        ("siglip-ce", [SOFTMAX], {}, MissingFeature, "siglip-ce needs a teacher's logit bias"),
        ("siglip-kd", [SOFTMAX, SIGMOID], {"sigmoid_teacher": "allow"}, MissingFeature, "trained with a softmax"),
        ("crd", [SIGMOID], {"sigmoid_teacher": "split"}, ConfigError, "No teacher is left for crd"),
        ("crd", [SOFTMAX, SIGMOID], {"sigmoid_teacher": "split"}, ConfigError, "known takes part in no term"),
        ("crd", [Known(scale=None)], {}, MissingFeature, "logit scale, which crd needs"),
        ("siglip-ce", [Known(scale=None, bias=-1.0)], {"teacher_temperature": 50.0}, MissingFeature, "logit scale, which siglip-ce needs"),
        ("fd", [SOFTMAX], {"cache_weights": (1.0, 2.0)}, ConfigError, "cache_weights has 2 numbers for 1 teachers"),
        ("crd", [SOFTMAX, SOFTMAX], {"teacher_temperature": (70.0,)}, ConfigError, "teacher_temperature has 1 numbers for 2 teachers"),
        ("clip + reinforced", [SOFTMAX], {"cache_weights": (2.0,)}, ConfigError, "cache_weights would do nothing"),
        ("theia", [Known(tokens=10)], {}, MissingFeature, "10 tokens, which are no square grid"),
    ],
)
def test_a_bad_combination_is_named(loss: str, targets: list[Known], settings: dict[str, object], error: type[KdstoreError], said: str) -> None:
    with pytest.raises(error) as refused:
        describe_teachers(DistillConfig(loss=loss, **settings), targets)  # type: ignore[arg-type]
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "rkd", "batch_size": 2}, "rkd-a compares at least 3 pairs"),
        ({"batch_size": 1}, "compares at least 2 pairs"),
        ({"teacher_temperature": "warm"}, "teacher_temperature 'warm' is none"),
        ({"loss": "clip + fd", "teacher_temperature": 50.0}, "teacher_temperature would do nothing"),
        ({"loss": "affinity + siglip-ce", "teacher_temperature": "entropy:1"}, "teacher_temperature would do nothing"),
        ({"token_standard": "phi-s"}, "token_standard would do nothing"),
        ({"teacher_temperature": "entropy:9"}, r"below 5\.55, that of 256 equal numbers"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_loss(DistillConfig(**settings))  # type: ignore[arg-type]


def test_families_are_split_when_asked_for_and_allowed_when_asked_for() -> None:
    mixed = DistillConfig(loss="clip + crd + siglip-ce + fd", sigmoid_teacher="split")
    assert [t.families for t in describe_teachers(mixed, [SOFTMAX, SIGMOID])] == [("", "softmax"), ("", "sigmoid")]
    (allowed,) = describe_teachers(DistillConfig(loss="clip-kd", sigmoid_teacher="allow"), [SIGMOID])
    assert allowed.bias == -10
    assert describe_teachers(DistillConfig(loss="pvl + fd + icl"), [SIGMOID]), "terms without the softmax of image-text logits take any teacher"


def test_split_terms_hear_the_teachers_of_their_own_kind_alone() -> None:
    softmax, sigmoid = dataclasses.replace(teacher(5), families=("", "softmax")), dataclasses.replace(teacher(8), families=("", "sigmoid"))
    encoded, ids, taught = student(4), [0, 1, 2, 3], [rows(5, 4, 1), rows(8, 4, 2)]
    for name, k in (("crd", 0), ("siglip-ce", 1), ("siglip-kd", 1)):
        alone = objective(name, [(teacher(5), teacher(8))[k]])
        assert value(objective(name, [softmax, sigmoid]), encoded, ids, taught) == value(alone, encoded, ids, [taught[k]])


def test_beside_a_teacher_there_is_only_what_its_own_terms_train() -> None:
    softmax, sigmoid = dataclasses.replace(teacher(5), families=("", "softmax")), dataclasses.replace(teacher(8), families=("", "sigmoid"))
    made = objective("clip + cross-kd + siglip-ce + pvl", [softmax, sigmoid])
    names = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in made.named_parameters()}
    assert names == {"heads.0.image_projector", "heads.0.text_projector", "heads.0.cross_scale", "heads.1.image_projector"}


def test_every_teacher_has_its_own_projectors_and_the_first_those_of_a_run_of_its_own() -> None:
    two, one = objective("clip-kd", [teacher(5), teacher(8)]), objective("clip-kd", [teacher(5)])
    names = dict(two.named_parameters())
    assert names["heads.1.image_projector.weight"].shape == (8, STUDENT)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, names[name])
    assert sorted(needs_of(parse_loss("clip-kd"))) == ["image/embedding", "logit_scale", "text/embedding"]
