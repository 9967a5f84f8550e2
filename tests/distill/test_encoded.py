"""Records of row tensors: what a loop does to them leaves every row where it belongs."""

from __future__ import annotations

import torch

from kdstore.distill.batches import Batch
from kdstore.distill.encoded import Encoded, Supervision, TeacherRows, join_rows, map_rows, row_tensors


def batch(rows: int) -> Batch:
    teachers = (TeacherRows(torch.rand(rows, 3), torch.rand(rows, 3)), TeacherRows(torch.rand(rows, 5), torch.rand(rows, 5), torch.rand(rows) > 0.5))
    return Batch(torch.rand(rows, 3, 4, 4), torch.arange(rows * 2).reshape(rows, 2), Supervision(torch.arange(rows), teachers=teachers))


def test_micro_batches_concatenate_to_the_batch() -> None:
    whole = batch(6)
    again = join_rows([map_rows(lambda t, i=i: t[i : i + 2], whole) for i in (0, 2, 4)])
    assert len(row_tensors(whole)) == len(row_tensors(again)) == 8
    assert all(torch.equal(a, b) for a, b in zip(row_tensors(whole), row_tensors(again), strict=True))
    assert again.told.teachers[0].valid_B is None, "what is None stays None"


def test_the_graph_can_be_cut_at_the_features_and_gradients_taken_there() -> None:
    weight = torch.rand(3, 3, requires_grad=True)
    encoded = Encoded(torch.rand(4, 3) @ weight, torch.rand(4, 3))
    cut = map_rows(lambda t: t.detach().requires_grad_(), encoded)
    (cut.image_BS * cut.text_BS).sum().backward()
    gradients = map_rows(lambda t: t.grad if t.grad is not None else torch.zeros_like(t), cut)
    torch.autograd.backward(encoded.image_BS, gradients.image_BS)
    assert weight.grad is not None
