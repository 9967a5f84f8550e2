"""The gradients of a step, whatever number of pieces its batch is encoded in.

A contrastive loss compares all pairs of a batch, so the gradients of micro-batches do not add up to the batch's. Instead the batch is encoded piece by piece,
the features of all pieces and processes are put together, the objective says the gradient at every feature, and each piece takes its rows of that back
through the towers (GradCache, Gao et al. 2021, arXiv 2101.06983). A piece that is a process's only one keeps its graph; of several, each is encoded twice,
first without a graph, so that memory holds the activations of one. Exact for every objective, since the chain rule is all that it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdstore.distill.distributed import Share
from kdstore.distill.encoded import Encoded, join_rows, map_rows, row_tensors

Values = dict[str, Tensor]


def whole_batch_gradients(
    encoders: Sequence[Callable[[], Encoded]],
    objective: Callable[[Encoded], tuple[Tensor, Values]],
    student: nn.Module,
    parameters: Sequence[nn.Parameter],
    share: Share,
    *,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
    same_graph: bool = False,
) -> tuple[Tensor, Values]:
    """Set the gradient of `scaled(loss)` of the global batch on all `parameters`, which hold none before; returns the loss and the values of its terms.

    `encoders` encode the pieces of this process, alike each time they are called; `objective` maps the features of the global batch to its loss.
    `same_graph` builds the graph in the first of two passes too, for compilers that make other code where there is none.
    """
    alone = len(encoders) == 1
    parts: list[Encoded] = []
    for encode in encoders:
        with torch.set_grad_enabled(alone or same_graph):
            parts.append(encode())
        if not alone:
            parts[-1] = map_rows(Tensor.detach, parts[-1])
    features = map_rows(lambda rows: share.whole(rows).requires_grad_(), join_rows(parts))
    loss, values = objective(features)
    scaled(loss).backward()
    for parameter in parameters:
        if parameter.grad is not None:  # of the objective: each process has the whole of it, and they are summed below
            parameter.grad.div_(share.world.size)
    gradients = [None if rows.grad is None else share.mine(rows.grad) for rows in row_tensors(features)]
    with kept_statistics(student):
        for i, encode in enumerate(encoders):
            rows = row_tensors(parts[0] if alone else encode())
            reached = [(row, g.narrow(0, i * share.piece, share.piece)) for row, g in zip(rows, gradients, strict=True) if g is not None and row.requires_grad]
            torch.autograd.backward([row for row, _ in reached], [gradient for _, gradient in reached])
    share.world.sum_gradients(parameters)
    return loss.detach(), values


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm as they are, for what is encoded again: a second pass, or a backward pass that recomputes activations."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
