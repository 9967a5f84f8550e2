"""Recall against brute force, its rule for ties, and the ceiling of repeated captions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import EvaluationError
from kdstore.metrics.neighbours import list_search, nearest, others_nearest, share_found, top_k
from kdstore.metrics.retrieval import recall_ceiling, retrieval_recall


def signs(rng: np.random.Generator, rows: int, width: int = 16) -> np.ndarray:
    """Rows of 1 and -1: their norm is a power of two, so similarities are exact and tie often."""
    return rng.choice(np.float32([-1, 1]), size=(rows, width))


def brute_force_recall(image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray, k: int) -> tuple[float, float]:
    similarity = (text / np.linalg.norm(text, axis=1, keepdims=True)) @ (image / np.linalg.norm(image, axis=1, keepdims=True)).T
    images = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    texts = np.argsort(-similarity.T, axis=1, kind="stable")[:, :k]
    image_hits = [image_of_text[t] in images[t] for t in range(len(text))]
    text_hits = [i in image_of_text[texts[i]] for i in range(len(image))]
    return 100 * float(np.mean(image_hits)), 100 * float(np.mean(text_hits))


@given(seed=st.integers(0, 2**32 - 1), num_images=st.integers(1, 30), extra=st.integers(0, 40), width=st.sampled_from([1, 4, 16]))
def test_recall_equals_brute_force_even_where_similarities_tie(seed: int, num_images: int, extra: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    image_of_text = rng.permutation(np.r_[np.arange(num_images), rng.integers(0, num_images, extra)])
    image, text = signs(rng, num_images, width), signs(rng, len(image_of_text), width)
    recall = retrieval_recall(image, text, image_of_text)
    for k in (1, 5, 10):
        expected = brute_force_recall(image, text, image_of_text, k)
        assert (recall[f"image_retrieval_recall@{k}"], recall[f"text_retrieval_recall@{k}"]) == pytest.approx(expected, abs=1e-9)


def test_recall_equals_brute_force_on_real_valued_embeddings() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(300, 24))
    image_of_text = np.repeat(np.arange(300), 5)
    text = image[image_of_text] + 1.5 * rng.normal(size=(1500, 24))
    recall = retrieval_recall(image, text, image_of_text)
    assert 10 < recall["image_retrieval_recall@1"] < 90
    for k in (1, 5, 10):
        assert (recall[f"image_retrieval_recall@{k}"], recall[f"text_retrieval_recall@{k}"]) == pytest.approx(brute_force_recall(image, text, image_of_text, k))


def test_of_equal_candidates_the_lower_row_comes_first() -> None:
    candidate = np.ones((4000, 7), np.float32) / 3
    candidate[17] = 0
    assert top_k(np.ones((3, 7), np.float32), candidate, 5).tolist() == [[0, 1, 2, 3, 4]] * 3
    assert top_k(np.ones((1, 7), np.float32), candidate, 4000)[0].tolist() == [*range(17), *range(18, 4000), 17]


def test_ties_between_different_candidates_are_not_cut_off() -> None:
    candidate = np.eye(64, dtype=np.float32)[::-1]  # every one has similarity 1 to the query
    assert top_k(np.ones((2, 64), np.float32), candidate, 10).tolist() == [list(range(10))] * 2


def test_the_nearest_others_leave_the_row_itself_out_even_among_its_equals() -> None:
    assert others_nearest(np.eye(3)[[0, 0, 0, 1]], 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    with pytest.raises(EvaluationError, match="need more than 4 rows, found 4"):
        others_nearest(np.eye(4), 4)


def test_lists_find_what_they_look_at_and_say_what_they_miss() -> None:
    rng = np.random.default_rng(0)
    candidate = rng.normal(size=(3000, 16)).astype(np.float32)
    candidate /= np.linalg.norm(candidate, axis=1, keepdims=True)
    candidate[1500:1600] = candidate[:100]
    query = candidate[rng.permutation(3000)[:300]]
    everything = nearest(query, candidate, 5, list_search(probes=10**6))[1]
    assert share_found(everything, query, candidate) == 100
    found = nearest(query, candidate, 5, list_search(probes=2))[1]
    shares = [len(set(of_query) & set(exact)) / 5 for of_query, exact in zip(found.tolist(), top_k(query, candidate, 5).tolist(), strict=True)]
    assert share_found(found, query, candidate) == pytest.approx(100 * float(np.mean(shares)))
    assert 20 < share_found(found, query, candidate) < 90
    assert retrieval_recall(query, candidate[:300], np.arange(300), search=list_search(10**6)) == retrieval_recall(query, candidate[:300], np.arange(300))


def test_what_an_index_does_not_find_is_no_hit() -> None:
    candidate = np.eye(4, dtype=np.float32)

    def blind(_):
        return lambda query, depth: (np.full((len(query), depth), -1e38, np.float32), np.full((len(query), depth), -1))

    assert set(retrieval_recall(candidate, candidate, np.arange(4), search=blind).values()) == {0}


def test_k_beyond_the_candidates_looks_at_all_of_them() -> None:
    assert top_k(np.eye(3), np.eye(3), 10).shape == (3, 3)
    recall = retrieval_recall(np.eye(3), np.eye(3)[::-1], np.arange(3), ks=(1, 10))
    assert (recall["image_retrieval_recall@1"], recall["image_retrieval_recall@10"], recall["text_retrieval_recall@10"]) == (pytest.approx(100 / 3), 100, 100)


def test_any_caption_of_an_image_is_a_hit() -> None:
    image = np.eye(2)
    text = np.array([[1, 0], [0, 1], [0, 1.0]])  # the second caption of image 0 lies on image 1
    recall = retrieval_recall(image, text, np.array([0, 0, 1]), ks=(1,))
    assert recall == {"image_retrieval_recall@1": pytest.approx(200 / 3), "text_retrieval_recall@1": pytest.approx(50)}  # the tie goes to row 1


def test_ceiling_is_100_without_repeated_captions() -> None:
    assert set(recall_ceiling(["a", "b", "c"], np.array([0, 0, 1])).values()) == {100}


def test_ceiling_of_shared_captions() -> None:
    ceiling = recall_ceiling(["x"] * 20 + ["own"], np.r_[np.arange(20), 19], ks=(1, 5, 10))
    assert ceiling["image_retrieval_recall@1"] == pytest.approx(100 * (20 * 0.05 + 1) / 21)
    assert ceiling["image_retrieval_recall@10"] == pytest.approx(100 * (20 * 0.5 + 1) / 21)
    assert ceiling["text_retrieval_recall@5"] == pytest.approx(100 * (19 * 0.25 + 1) / 20)  # image 19 has a caption of its own


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=7), st.integers(1, 3))
def test_ceiling_equals_the_mean_over_all_orders_of_equal_captions(pairs: list[tuple[str, int]], k: int) -> None:
    rows = {image: i for i, image in enumerate(sorted({image for _, image in pairs}))}
    captions, image_of_text = [c for c, _ in pairs], np.array([rows[image] for _, image in pairs])
    ceiling = recall_ceiling(captions, image_of_text, ks=(k,))
    by_image = []
    for image in range(len(rows)):
        chances = []
        for caption in {c for c, i in zip(captions, image_of_text, strict=True) if i == image}:
            equal = [i for c, i in zip(captions, image_of_text, strict=True) if c == caption]
            orders = list(itertools.permutations(equal))
            chances.append(np.mean([image in order[:k] for order in orders]))
        by_image.append(max(chances))
    assert ceiling[f"text_retrieval_recall@{k}"] == pytest.approx(100 * float(np.mean(by_image)))
    by_text = [min(1, k / len({i for c, i in zip(captions, image_of_text, strict=True) if c == caption})) for caption in captions]
    assert ceiling[f"image_retrieval_recall@{k}"] == pytest.approx(100 * float(np.mean(by_text)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_a_model_that_only_reads_captions_reaches_the_ceiling_on_average(words: list[int], seed: int) -> None:
    """One caption per image, embeddings equal where captions are: the tie rule then gives exactly the expected share in image retrieval."""
    embedding = np.eye(4, dtype=np.float32)[words]
    ceiling = recall_ceiling([str(w) for w in words], np.arange(len(words)))
    recall = retrieval_recall(embedding, embedding, np.arange(len(words)))
    for k in (1, 5, 10):
        assert recall[f"image_retrieval_recall@{k}"] == pytest.approx(ceiling[f"image_retrieval_recall@{k}"])


def test_bad_input_gets_one_clear_line() -> None:
    image, pairs = np.eye(2), np.array([0, 1])
    with pytest.raises(EvaluationError, match="1 of 2 text embeddings are not finite"):
        retrieval_recall(image, np.array([[np.nan, 0], [0, 1]]), pairs)
    with pytest.raises(EvaluationError, match="1 of 2 images have no caption"):
        retrieval_recall(image, image, np.array([0, 0]))
    with pytest.raises(EvaluationError, match="rows 0 to 2 of 2 images"):
        retrieval_recall(image, image, np.array([0, 2]))
    with pytest.raises(EvaluationError, match="each of 2 texts"):
        retrieval_recall(image, image, np.array([0]))
    with pytest.raises(EvaluationError, match="rows, width"):
        retrieval_recall(np.zeros((0, 2)), image, pairs)
    with pytest.raises(EvaluationError, match="at least 1, found 0"):
        top_k(image, image, 0)
