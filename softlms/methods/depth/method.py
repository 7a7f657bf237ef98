"""Fewer blocks, as methods of a chain: a learned depth, the first blocks, or those that matter most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softlms.evaluation.metrics import mean_loss
from softlms.methods.base import Config, Method, Work
from softlms.methods.depth.cut import keep_blocks, put_head
from softlms.methods.depth.search import Deep, DepthTrainer, Mixed
from softlms.methods.factors import calibration_sample
from softlms.methods.heads import classifier_of
from softlms.methods.static import recover
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["METHODS", "BlocksConfig", "DepthConfig"]


@dataclass(frozen=True)
class DepthConfig(Config):
    """Settings of a learned depth.

    Attributes
    ----------
    beta, normaliser : float
        Price of a block, and gamma: see `softlms.methods.depth.loss.depth_loss`.
    epochs, static_learning_rate : float
        Of the training with all heads; nothing is trained after the cut.
    depth_learning_rate : float
        Of the weights of the heads. The authors have 1e-3 in a training of many thousands of steps; weights that start
        equal settle in hundreds with more (ours).

    Raises
    ------
    ValueError
        A setting is out of range; or 0 epochs, in which nothing could be learned.
    """

    beta: float = 1e-2
    normaliser: float = 0.0
    epochs: float = 3
    static_learning_rate: float = 2e-4
    depth_learning_rate: float = 0.05

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 <= self.normaliser <= 1:
            raise ValueError(f"beta is 0 or more and normaliser 0 to 1; got {self.beta!r} and {self.normaliser!r}.")
        check_positive(epochs=self.epochs)
        check_positive(most=1, static_learning_rate=self.static_learning_rate)
        check_positive(most=1, depth_learning_rate=self.depth_learning_rate)


@dataclass(frozen=True)
class BlocksConfig(Config):
    """Settings of a given depth.

    Attributes
    ----------
    blocks : int
        How many stay.
    by : {"order", "sensitivity"}
        The first blocks; or, one after the other, the block without which the loss is least is removed.
    epochs, static_learning_rate : float
        Of recovery.
    calibration_rows : int
        Training rows whose loss is measured.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.
    """

    blocks: int = 3
    by: str = "order"
    epochs: float = 3
    static_learning_rate: float = 2e-4
    calibration_rows: int = 256

    def __post_init__(self) -> None:
        if self.by not in ("order", "sensitivity"):
            raise ValueError(f"by must be 'order' or 'sensitivity', got {self.by!r}.")
        check_at_least_one(blocks=self.blocks, calibration_rows=self.calibration_rows)
        check_positive(most=1, static_learning_rate=self.static_learning_rate)
        if self.epochs:
            check_positive(epochs=self.epochs)

    def unused(self) -> tuple[str, ...]:
        return ("calibration_rows",) if self.by == "order" else ()


def learn_depth(model: PreTrainedModel, config: DepthConfig, work: Work) -> dict[str, Any]:
    """Train a head behind each block and the weights of all, and cut the model behind the one with the largest.

    Returns
    -------
    dict
        "blocks"; "a": the weights, in the order of the blocks; "uncut": scores of all heads together, before the cut;
        "steps" and "history".

    Raises
    ------
    ValueError
        A model without the parts that this needs (`softlms.methods.heads.classifier_of`), or rows without labels.
    """
    if "labels" not in work.rows.column_names:
        raise ValueError("A depth is learned from labels: use softlms.encode.")
    deep = Deep(model)
    options = work.training("searching", config.static_learning_rate, config.epochs)
    options["args"].label_names = ["labels"]  # forward takes none
    trainer = DepthTrainer(
        deep,
        whole=model,
        beta=config.beta,
        gamma=config.normaliser,
        depth_learning_rate=config.depth_learning_rate,
        **options,
    )
    work.train(trainer)
    uncut = work.scores(lambda: Mixed(deep))
    a = deep.w.detach().softmax(0)
    chosen = int(a.argmax())
    put_head(model, deep.heads[chosen])  # type: ignore[arg-type]
    keep_blocks(model, range(chosen + 1))
    return {
        "blocks": chosen + 1,
        "a": a.tolist(),
        "uncut": uncut,
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def keep_some(model: PreTrainedModel, config: BlocksConfig, work: Work) -> dict[str, Any]:
    """Remove blocks until so many are left, and let the model recover.

    Returns
    -------
    dict
        "blocks"; "kept_blocks": their numbers in the model that was cut; "untuned", "steps" and "history".

    Raises
    ------
    ValueError
        The model has fewer blocks.
    """
    depth = classifier_of(model, "Removing blocks").depth
    if config.blocks > depth:
        raise ValueError(f"blocks={config.blocks} cannot stay: the model has {depth}.")
    kept = [*range(config.blocks)] if config.by == "order" else _most_needed(model, config, work)
    keep_blocks(model, kept)
    untuned = work.scores(lambda: model)
    recovered = recover(model, config.epochs, config.static_learning_rate, work)
    return {"blocks": len(kept), "kept_blocks": kept, "untuned": untuned} | recovered


def _most_needed(model: PreTrainedModel, config: BlocksConfig, work: Work) -> list[int]:
    """Numbers of the blocks that are left when the least needed one is removed until so many are."""
    rows = calibration_sample(work, config.calibration_rows)
    encoder: Any = classifier_of(model, "Removing blocks").encoder
    every, kept = encoder.layer, [*range(len(encoder.layer))]

    def loss_with(blocks: list[int]) -> float:
        encoder.layer = nn.ModuleList(every[block] for block in blocks)
        try:
            return mean_loss(model, rows, work.collator, work.batch_size)
        finally:
            encoder.layer = every

    while len(kept) > config.blocks:
        work.note(f"{len(kept)} blocks, of which one is not needed most")
        losses = {block: loss_with([other for other in kept if other != block]) for block in kept}
        kept.remove(min(losses, key=losses.__getitem__))
    return kept


METHODS = (
    Method("depth", DepthConfig, learn_depth),
    Method("first-blocks", BlocksConfig, keep_some, fixed={"by": "order"}),
    Method("needed-blocks", BlocksConfig, keep_some, fixed={"by": "sensitivity"}),
)
