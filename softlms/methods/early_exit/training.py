"""Training of exits: the model is frozen, so that its states are computed once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollator, PreTrainedModel, get_cosine_schedule_with_warmup

from softlms.data.inputs import batches, in_eval_mode
from softlms.methods.early_exit.exits import Exits

__all__ = ["first_states", "train_exits"]


@torch.no_grad()
def first_states(
    model: PreTrainedModel, blocks: nn.ModuleList, rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64
) -> Tensor:
    """The first token's state behind each block, shape (rows, L, d), without dropout."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(_states(out)[:, 0])) for block in blocks]
    every = []
    try:
        with in_eval_mode(model):
            for batch in batches(model, rows, collator, batch_size):
                seen.clear()
                model(**batch)
                every.append(torch.stack(seen, dim=1))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(every)


def _states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def train_exits(
    exits: Exits,
    states: Tensor,
    labels: Tensor,
    *,
    epochs: float,
    batch: int,
    learning_rate: float,
    ensemble_learning_rate: float,
    weight_decay: float,
    seed: int,
    note: Callable[[str], None],
) -> int:
    """Train the heads, and then what weighs them, with Adam and rates that fall as a cosine.

    Parameters
    ----------
    exits : Exits
        Changed in place.
    states : Tensor
        See `first_states`; the last block's are not read.
    labels : Tensor
        Class ids, shape (rows,).
    epochs, batch
        Of each of the two.
    learning_rate, weight_decay
        Of the heads.
    ensemble_learning_rate : float
    seed : int
        Of dropout and the order of the rows.
    note : callable
        Called with a line of progress at each epoch.

    Returns
    -------
    int
        Steps of both together.
    """
    torch.manual_seed(seed)
    states = states[:, : exits.number]
    weighing = [exits.v, exits.b] if exits.ensemble else []
    heads = [values for values in exits.parameters() if all(values is not other for other in weighing)]

    def heads_loss(chosen: Tensor) -> Tensor:
        logits, _ = exits(states[chosen])
        return _over_heads(logits, labels[chosen])

    exits.train()
    optimizer = torch.optim.Adam(heads, learning_rate, weight_decay=weight_decay)
    steps = _train(optimizer, heads_loss, len(labels), epochs, batch, seed, lambda line: note(f"heads: {line}"))
    exits.eval()
    if not exits.ensemble:
        return steps
    with torch.no_grad():
        logs = torch.cat([exits(part)[0].log_softmax(-1) for part in states.split(1024)])

    def ensemble_loss(chosen: Tensor) -> Tensor:
        return _over_heads(exits.all_together(logs[chosen]), labels[chosen])

    optimizer = torch.optim.Adam(weighing, ensemble_learning_rate)
    return steps + _train(
        optimizer, ensemble_loss, len(labels), epochs, batch, seed, lambda line: note(f"ensembles: {line}")
    )


def _over_heads(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each head, added up: none takes from another's gradient."""
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])) * logits.shape[1]


def _train(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor], Tensor],
    rows: int,
    epochs: float,
    batch: int,
    seed: int,
    note: Callable[[str], None],
) -> int:
    in_epoch = math.ceil(rows / batch)
    total = max(1, round(epochs * in_epoch))
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, total)
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for number in range(total):
        order = order or list(torch.randperm(rows, generator=generator).split(batch))[::-1]
        optimizer.zero_grad()
        loss(order.pop()).backward()
        optimizer.step()
        schedule.step()
        if number % in_epoch == 0:
            note(f"step {number:,} of {total:,}")
    return total
