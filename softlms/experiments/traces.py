"""A bench that also keeps what a model does row by row: what its exits said, or which experts ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from softlms.data.inputs import in_eval_mode
from softlms.experiments.bench import Bench
from softlms.experiments.closure import not_in_keys
from softlms.experiments.recipe import Recipe
from softlms.measure import interleaved
from softlms.methods.dynamic_moe.counts import executed, ran_by_token, time_experts
from softlms.methods.dynamic_moe.experts import Experts
from softlms.methods.dynamic_moe.surgery import experts_of, set_threshold
from softlms.methods.early_exit.module import ExitingEncoder, predict
from softlms.methods.early_exit.said import said_by_all

__all__ = ["QuickBench", "TracedBench", "traced"]

DIGITS = 6
SHOWN = 8  # rows in pictures, and in a batch that is timed
TOKENS = 128  # of a row in a batch that is timed


class TracedBench(Bench):
    """As `Bench`; a run's result also has "exits", or "experts" and "tokens".

    "exits" has for each split "labels" (N,), and log-probabilities "said" (N, L, C), see
    `softlms.methods.early_exit.said.said_by_all`; and "times": for batches of 1 and 8 rows of dev, at each threshold
    the mean number of "blocks", "seconds" and those of the "whole" model. "experts" has a point for each threshold:
    "tau" or "top"; "share" of the experts that ran on dev, mean over tokens and blocks, and "shares" by block; "flops",
    see `softlms.methods.dynamic_moe.counts.executed`; "scores"; and "seconds" in the feed-forwards, of 8 rows of 128
    tokens, and of "all" experts. "tokens" are those of the first rows of dev, with the number of experts that each
    "ran" at the threshold nearest to 40 % of them.
    """

    taus: ClassVar[tuple[float, ...]] = (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
    tops: ClassVar[int] = 8  # numbers of experts that are tried, evenly spread
    exit_taus: ClassVar[tuple[float, ...]] = (0.7, 0.8, 0.9, 0.95, 0.99)  # at which exits are timed

    @cached_property
    def plain(self) -> Bench:
        """The bench whose dense models this one takes."""
        return Bench(self.encoder, self.data, self.folder, self.max_length, self.train_rows, self.threads, self.note)

    def extras(self, model: PreTrainedModel) -> dict[str, Any]:
        if isinstance(getattr(model.base_model, "encoder", None), ExitingEncoder):
            said = {split: self._said(model, split) for split in ("dev", "test") if split in self.splits}
            return {"exits": said | {"times": self._exit_times(model)}}
        if any(isinstance(module, Experts) for module in model.modules()):
            points = self._points(model)
            return {"experts": points, "tokens": self._tokens(model, points)}
        return {}

    def _said(self, model: PreTrainedModel, split: str) -> dict[str, Any]:
        said = said_by_all(model, self.splits[split], self.collator).double().cpu().numpy()
        return {"labels": list(self.splits[split]["labels"]), "said": np.round(said, DIGITS).tolist()}

    def _exit_times(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for rows in (1, SHOWN):
            batches = [self._batch(model, range(first, first + rows)) for first in range(0, 2 * SHOWN, rows)]
            for tau in self.exit_taus:
                early = partial(predict, model, tau)
                with in_eval_mode(model), torch.no_grad():
                    blocks = torch.cat([early(**batch).blocks for batch in batches]).float().mean()
                    calls = {"seconds": partial(_run, early, batches), "whole": partial(_run, model, batches)}
                    seconds = interleaved(calls, rounds=3, warm_up=1)
                times = {name: median(taken) / len(batches) for name, taken in seconds.items()}
                found.append({"rows": rows, "threshold": tau, "blocks": blocks.item(), **times})
        return found

    def _points(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        every = experts_of(model)
        first = next(iter(every.values()))
        before = {"tau": first.tau} if first.top is None else {"top": first.top}
        timed = self._long_batch(model)
        points: list[dict[str, Any]] = []
        for setting in self._settings(first):
            set_threshold(model, **setting)
            scores = self.scores(model, ("dev",))
            shares, flops = [experts.share() for experts in every.values()], executed(model)
            if "test" in self.splits:
                scores |= self.scores(model, ("test",))
            seconds = time_experts(model, timed, rounds=5)
            points.append(
                {**setting, "share": float(np.mean(shares)), "shares": shares, "flops": flops, "scores": scores}
                | {"seconds": seconds["as set"], "all": seconds["all"]}
            )
        set_threshold(model, **before)
        return points

    def _settings(self, experts: Experts) -> list[dict[str, Any]]:
        """Thresholds that trace a curve: a signed router's numbers are no norms, only their order says something."""
        if not experts.router.signed:
            return [{"tau": tau} for tau in self.taus]
        tops = {max(1, round(len(experts.U) * part / self.tops)) for part in range(1, self.tops + 1)}
        return [{"top": top} for top in sorted(tops)]

    def _tokens(self, model: PreTrainedModel, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        every = experts_of(model)
        first = next(iter(every.values()))
        before = {"tau": first.tau} if first.top is None else {"top": first.top}
        near = min(points, key=lambda point: abs(point["share"] - 0.4))
        set_threshold(model, **{name: near[name] for name in ("tau", "top") if name in near})
        batch = self._batch(model, range(SHOWN))
        ran, tokenizer = ran_by_token(model, batch), self.encoder.tokenizer()
        set_threshold(model, **before)
        return [
            {"row": row, "place": place, "token": token, "ran": ran[row, place].item(), "experts": len(first.U)}
            for row, ids in enumerate(batch["input_ids"].tolist())
            for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids))
            if batch["attention_mask"][row, place]
        ]

    def _batch(self, model: PreTrainedModel, rows: range) -> dict[str, Tensor]:
        """Rows of dev as the model takes them, without labels."""
        columns = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in self.splits["dev"][0]]
        chosen = self.splits["dev"].select([row % len(self.splits["dev"]) for row in rows]).select_columns(columns)
        return {name: values.to(model.device) for name, values in self.collator(list(chosen)).items()}

    def _long_batch(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Rows of dev, joined to rows of 128 tokens without padding."""
        ids = [token for row in self.splits["dev"]["input_ids"] for token in row]
        ids = (ids * -(-SHOWN * TOKENS // len(ids)))[: SHOWN * TOKENS]
        return {"input_ids": torch.tensor(ids, device=model.device).reshape(SHOWN, TOKENS)[:, : self._longest(model)]}

    def _longest(self, model: PreTrainedModel) -> int:
        return min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))

    @not_in_keys
    def _depends(self, chain: str, recipe: Recipe, seed: int) -> dict[str, Any]:
        return self.plain._depends(chain, recipe, seed) if chain == "dense" else super()._depends(chain, recipe, seed)


def _run(call: Callable[..., Any], batches: Iterable[dict[str, Tensor]]) -> None:
    for batch in batches:
        call(**batch)


class QuickBench(TracedBench):
    """With few thresholds, for profile quick."""

    taus = (0.0, 0.8, 1.0)
    tops = 3
    exit_taus = (0.9,)


def traced(profile: str) -> type[TracedBench]:
    """The bench of a profile."""
    return QuickBench if profile == "quick" else TracedBench
