"""GQA's metrics against worked examples, the published quirks, and a second writing of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import EvaluationError
from kdstore.evaluate import Scores, gqa_grounding, score_answers
from kdstore.metrics.gqa import num_steps


def ask(question_id: str, answer: str, **extra: Any) -> dict[str, Any]:
    types = {"structural": extra.pop("structural", "query"), "semantic": extra.pop("semantic_type", "attr"), "detailed": extra.pop("detailed", "color")}
    defaults = {"isBalanced": True, "types": types, "groups": {"global": extra.pop("group", None)}, "entailed": [], "semantic": []}
    asked = extra.pop("question", "what color is it")
    return {"question_id": question_id, "question": asked, "answers": [{"answer": answer, "answer_id": 1}], "extra": defaults | extra}


def score(questions: list[dict[str, Any]], answers: str) -> Scores:
    return score_answers("gqa", questions, dict(zip((q["question_id"] for q in questions), answers.split(), strict=True)))


def test_answers_are_compared_as_they_are_and_binary_is_every_structure_but_query() -> None:
    asked = [ask("1", "red"), ask("2", "red"), ask("3", "yes", structural="verify"), ask("4", "left", structural="choose")]
    assert score(asked, "red Red yes right").aggregate == {"accuracy": 50, "binary": 50, "open": 50, "consistency": 0}


def test_only_balanced_questions_count_and_the_mean_of_nothing_is_zero() -> None:
    scores = score([ask("1", "red"), ask("2", "red", isBalanced=False)], "red blue")
    assert (scores.per_question, scores.aggregate["accuracy"], scores.aggregate["binary"]) == ({"1": 100}, 100, 0)
    with pytest.raises(EvaluationError, match="None of 1 questions is balanced"):
        score([ask("1", "red", isBalanced=False)], "red")


def test_a_common_question_takes_color_material_and_shape_as_valid_and_plausible() -> None:
    choices = {"valid": ["red", "blue"], "plausible": ["red"]}
    asked = [ask("1", "red", choices=choices), ask("2", "red", choices=choices), ask("3", "shape", choices=choices, detailed="twoCommon")]
    scores = score(asked, "blue green shape")
    assert (scores.aggregate["validity"], scores.aggregate["plausibility"]) == (66.67, 33.33)
    assert score(asked[2:], "red").aggregate["validity"] == 0
    assert "validity" not in score([*asked, ask("4", "red")], "a b c d").aggregate


def test_consistency_is_taken_over_rightly_answered_balanced_questions_with_entailed_ones_besides_themselves() -> None:
    unbalanced = [ask("u", "yes", isBalanced=False, entailed=["1"]), ask("v", "no", isBalanced=False)]
    asked = [ask("1", "red", entailed=["1", "u", "v"]), ask("2", "red", entailed=["2"]), ask("3", "red", entailed=["u"]), *unbalanced]
    assert score(asked, "red red blue yes yes").aggregate["consistency"] == 50
    assert score(asked, "blue red blue yes yes").aggregate["consistency"] == 0
    assert "consistency" not in score(asked[:3], "red red blue").aggregate  # an entailed question was not asked


def test_distribution_weighs_groups_by_size_skips_null_groups_and_ignores_answers_that_are_never_right() -> None:
    colors = [ask(str(i), gold, group="color") for i, gold in enumerate(["red", "red", "red", "blue"])]
    sizes = [ask("5", "big", group="size"), ask("6", "small", group="size")]
    other = [ask("7", "cup")]
    # color: red 3 -> 2: 1/3; blue 1 -> 0: 1; green is ignored; size: big 1 -> 2: 1; small 1 -> 0: 1
    expected = ((1 / 3 + 1) * 4 + (1 + 1) * 2) / 6 / 100
    assert score(colors + sizes + other, "red green red green big big table").aggregate["distribution"] == round(expected, 2)
    assert score(colors * 1, "red red red blue").aggregate["distribution"] == 0
    assert "distribution" not in score(other, "cup").aggregate


def test_breakdowns_come_with_counts() -> None:
    program = [{"operation": "select", "argument": "cup (1)"}, {"operation": "query", "argument": "name"}]
    asked = [
        ask("1", "red", question="is it  red", semantic=program),
        ask("2", "red", structural="verify", semantic_type="obj", question="really", semantic=program),
    ]
    scores = score(asked, "red blue")
    assert scores.groups == {
        "accuracyPerStructuralType": {"query": 100, "verify": 0},
        "accuracyPerSemanticType": {"attr": 100, "obj": 0},
        "accuracyPerSteps": {"1": 50},
        "accuracyPerLength": {"3": 100, "1": 0},
    }
    assert scores.counts["accuracyPerSteps"] == {"1": 2}
    assert scores.counts["accuracyPerLength"] == {"3": 1, "1": 1}


@pytest.mark.parametrize(
    ("operation", "argument", "steps"),
    [("exist", "?", 0), ("query", "name", 0), ("query", "color", 1), ("choose name", "cup|cat", 0), ("choose", "name", 1), ("select", "existing (3)", 0)],
)
def test_steps_leave_out_whatever_reads_exist_query_name_or_choose_name(operation: str, argument: str, steps: int) -> None:
    assert num_steps([{"operation": operation, "argument": argument}]) == steps


@given(st.data())
def test_all_of_it_equals_a_second_writing_of_the_definitions(data: st.DataObject) -> None:
    ids = [str(i) for i in range(data.draw(st.integers(1, 7)))]
    word = st.sampled_from(["red", "blue", "yes"])
    asked = [
        ask(
            i,
            data.draw(word),
            isBalanced=i == "0" or data.draw(st.booleans()),
            structural=data.draw(st.sampled_from(["query", "verify"])),
            group=data.draw(st.sampled_from([None, "g", "h"])),
            entailed=data.draw(st.lists(st.sampled_from(ids), max_size=3)),
            choices={"valid": data.draw(st.lists(word)), "plausible": data.draw(st.lists(word))},
        )
        for i in ids
    ]
    given_answer = {i: data.draw(word) for i in ids}
    gold = {q["question_id"]: q["answers"][0]["answer"] for q in asked}
    scores: dict[str, list[float]] = {name: [] for name in ("accuracy", "binary", "open", "consistency", "validity", "plausibility")}
    cells: dict[str, dict[str, list[int]]] = {}
    for q in asked:
        i, extra = q["question_id"], q["extra"]
        if not extra["isBalanced"]:
            continue
        hit = float(given_answer[i] == gold[i])
        scores["accuracy"].append(hit)
        scores["open" if extra["types"]["structural"] == "query" else "binary"].append(hit)
        scores["validity"].append(given_answer[i] in extra["choices"]["valid"])
        scores["plausibility"].append(given_answer[i] in extra["choices"]["plausible"])
        others = [e for e in extra["entailed"] if e != i]
        if hit and others:
            scores["consistency"].append(sum(given_answer[e] == gold[e] for e in others) / len(others))
        if extra["groups"]["global"] is not None:
            cell = cells.setdefault(extra["groups"]["global"], {})
            cell.setdefault(gold[i], [0, 0])[0] += 1
            cell.setdefault(given_answer[i], [0, 0])[1] += 1
    expected = {name: sum(values) / len(values) * 100 if values else 0 for name, values in scores.items()}
    if cells:
        sizes = {g: sum(n for n, _ in cell.values()) for g, cell in cells.items()}
        chi = {g: sum((o - n) ** 2 / n for n, o in cell.values() if n) for g, cell in cells.items()}
        expected["distribution"] = sum(chi[g] * sizes[g] for g in cells) / sum(sizes.values()) / 100
    assert score_answers("gqa", asked, given_answer).aggregate == pytest.approx(expected, abs=0.00501)


SCENES = {"7": {"width": 100, "height": 200, "objects": {"a": {"x": 0, "y": 0, "w": 50, "h": 50}, "b": {"x": 0, "y": 0, "w": 100, "h": 200}}}}


def pointing(question: dict[str, str], answer: dict[str, str], **extra: Any) -> dict[str, Any]:
    return ask("1", "red", imageId="7", annotations={"question": question, "answer": {}, "fullAnswer": answer}, **extra)


def test_grounding_counts_attention_on_the_objects_of_question_and_full_answer_with_x_first() -> None:
    attention = np.array([[0.1, 0.2], [0.3, 0.4]])  # left column first
    ground = gqa_grounding([pointing({"0": "a"}, {})], {"1": attention.tolist()}, SCENES, map_size=2)
    assert ground.aggregate == {"grounding": 5.0}  # half the height of the upper left cell
    both = gqa_grounding([pointing({"0": "a"}, {"2": "b"})], {"1": attention.tolist()}, SCENES, map_size=2)
    assert both.per_question == {"1": pytest.approx(105)}  # boxes that overlap count twice
    left = {"7": {"width": 1, "height": 1, "objects": {"a": {"x": 0, "y": 0, "w": 0.5, "h": 1}}}}
    assert gqa_grounding([pointing({"0": "a"}, {})], {"1": attention.tolist()}, left, map_size=2).overall == pytest.approx(30)


def test_grounding_never_adds_the_whole_scene() -> None:
    asked = pointing({}, {}, semantic=[{"operation": "select", "argument": "scene"}])
    assert gqa_grounding([asked], {"1": np.full((7, 7), 1 / 49).tolist()}, SCENES).overall == 0


def test_grounding_refuses_maps_of_another_size_and_objects_that_are_not_there() -> None:
    with pytest.raises(EvaluationError, match=r"attention of question 1 has the shape \(2, 2\); expected finite weights of shape \(7, 7\)"):
        gqa_grounding([pointing({}, {})], {"1": [[0, 0], [0, 0]]}, SCENES)
    with pytest.raises(EvaluationError, match="Question 1 points at objects that scene 7 does not have"):
        gqa_grounding([pointing({"0": "z"}, {})], {"1": np.zeros((7, 7)).tolist()}, SCENES)
    with pytest.raises(EvaluationError, match="question 1 has no prediction"):
        gqa_grounding([pointing({}, {})], {}, SCENES)
