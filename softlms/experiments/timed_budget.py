"""One encoder cut under budgets that count different things: what each is worth in time and in accuracy."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from functools import partial

import pandas as pd
import torch
from transformers import AutoModel, DataCollatorWithPadding

from softlms.budget import parameter_costs
from softlms.data.encoders import find_encoder
from softlms.data.hub import pretrained
from softlms.data.inputs import prepared
from softlms.data.tasks import encode, load_task
from softlms.lowrank.allocation import allocate
from softlms.lowrank.calibration import calibrate
from softlms.lowrank.factorization import factorize
from softlms.machine import use_threads
from softlms.measure import count_flops, interleaved, measure_latency, random_rows
from softlms.surgery import truncate

__all__ = ["compare_budgets"]

CALIBRATION_ROWS, HELD_OUT_ROWS = 128, 64


def compare_budgets(
    budgets: Mapping[str, float], *, encoder: str = "minilm", tokens: int = 128, multiple: int = 16, rounds: int = 15
) -> pd.DataFrame:
    """Cut an encoder evenly under each budget, and time the results in turn: one row of tokens, one thread.

    Parameters
    ----------
    budgets : mapping
        What is counted ("linear", "total", "flops" or "latency") to the share of it that is kept.
    encoder : str
        See `find_encoder`; its whitened factors come from training rows of the embedded sentence pairs.
    tokens, multiple, rounds : int
        Tokens of the row that is timed; see `softlms.Budget` for `multiple`; rounds of the timing.

    Returns
    -------
    DataFrame
        A row for each budget: "kept_linear" (share of the linears' weights), "kept_flops", "predicted_speed_up" (what
        the timing of single layers promises), "speed_up" (of the whole model, medians), "output_error" (relative, of
        the last hidden states on held-out rows; nothing is trained after the cut).

    Raises
    ------
    ValueError
        Unknown encoder, or a budget that cannot be met: "latency" where all that is no linear takes longer, say.
    """
    found = find_encoder(encoder)
    model = pretrained(AutoModel, found.location).eval()
    collator = DataCollatorWithPadding(found.tokenizer())
    rows = encode(load_task("docpairs", "embedded"), found.tokenizer(), 40)
    seen = calibrate(model, rows["train"], collator, rows=CALIBRATION_ROWS)
    factors = factorize(model, "whitened", seen)
    unseen = [{"input_ids": row["input_ids"]} for row in rows["dev"].select(range(HELD_OUT_ROWS))]
    held_out = prepared(model, collator(unseen))
    words = held_out["attention_mask"].bool()

    flops, latency = count_flops(model, tokens=tokens), measure_latency(model, tokens=tokens, rounds=rounds)
    weights = parameter_costs(flops.shapes)
    ranks = {
        count: allocate(
            model, factors, "uniform", keep=keep, count=count, multiple=multiple,
            costs={"flops": flops, "latency": latency}.get(count),
        )
        for count, keep in budgets.items()
    }  # fmt: skip
    forms = {"dense": model} | {count: truncate(copy.deepcopy(model), kept, factors) for count, kept in ranks.items()}
    inputs = random_rows(model.config.vocab_size, 1, tokens)
    with use_threads(1), torch.inference_mode():
        seconds = interleaved({name: partial(form, **inputs) for name, form in forms.items()}, rounds)
        states = {name: form(**held_out).last_hidden_state[words] for name, form in forms.items()}
    return pd.DataFrame(
        {
            "budget": f"{budgets[count]:.0%} of {count}",
            "kept_linear": weights.of(kept) / weights.dense,
            "kept_flops": (flops.rest + flops.of(kept)) / flops.dense,
            "predicted_speed_up": latency.dense / (latency.rest + latency.of(kept)),
            "speed_up": statistics.median(seconds["dense"]) / statistics.median(seconds[count]),
            "output_error": float((states[count] - states["dense"]).norm() / states["dense"].norm()),
        }
        for count, kept in ranks.items()
    )
