"""Classification by a causal language model as it is: the answer that it finds likeliest after a row's text."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softlms.data.inputs import in_eval_mode
from softlms.data.tasks import TaskData
from softlms.utils.ranges import check_at_least_one

__all__ = ["PROMPTS", "Prompt", "ZeroShot", "check_questions", "zero_shot"]


@dataclass(frozen=True)
class Prompt:
    """How a task is put to a language model.

    Attributes
    ----------
    question : str
        Text with the names of the task's columns in braces; the answer follows after a space.
    answers : tuple of str
        One for each label, in the order of their ids.
    """

    question: str
    answers: tuple[str, ...]


# ours: scores by other prompts are not comparable
PROMPTS = {
    "sst2": Prompt("Movie review: {sentence}\nOverall, the review is", ("negative", "positive")),
    "mrpc": Prompt(
        "First sentence: {sentence1}\nSecond sentence: {sentence2}\nThe two sentences have",
        ("different meanings", "the same meaning"),
    ),
    "rte": Prompt("{sentence1}\nDoes it follow that the next sentence holds? {sentence2}\nAnswer:", ("yes", "no")),
}


@dataclass(frozen=True)
class ZeroShot:
    """The answers of a model, and how they were asked for.

    Attributes
    ----------
    task, split : str
    labels : tuple of int
        The right one of each row.
    scores : tuple of tuple of float
        For each row the log-likelihood of each label's answer, in nats.
    """

    task: str
    split: str
    labels: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def answers(self) -> tuple[int, ...]:
        """The likeliest label of each row."""
        return tuple(row.index(max(row)) for row in self.scores)

    @property
    def accuracy(self) -> float:
        return sum(a == b for a, b in zip(self.labels, self.answers, strict=True)) / len(self.labels)

    @property
    def commonest(self) -> float:
        """Accuracy of always giving the commonest label."""
        return max(Counter(self.labels).values()) / len(self.labels)

    def __str__(self) -> str:
        error = math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.labels))
        return (
            f"{100 * self.accuracy:.1f} ± {100 * error:.1f} % right (standard error) on the first {len(self.labels)} "
            f"rows of {self.task} {self.split}, zero-shot, by likelihood; "
            f"the commonest label: {100 * self.commonest:.1f} %"
        )


@torch.inference_mode()
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    *,
    split: str = "dev",
    rows: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> ZeroShot:
    """Ask a causal language model about each row, without training it or showing it examples.

    Each answer of the task's prompt is scored by the sum of its tokens' log-likelihoods after the row's question; the
    likeliest is the model's. No token comes before the question, BOS included.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in any form; evaluated without dropout.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    data : TaskData
        From `softlms.load_task`: one of `PROMPTS`.
    split : str
    rows : int, optional
        Use only the first rows of the split.
    batch_size : int
        Rows in a forward pass: a question with one of its answers, or alone if all its answers are one token.
    bf16 : bool
        Under bfloat16 autocast.

    Raises
    ------
    ValueError
        A task without a prompt, a split that the data lack, fewer rows than asked for, or a row that is too long for
        the model.
    """
    check_questions(data, split, rows)
    check_at_least_one(batch_size=batch_size)
    task, table = data.task.name, data.splits[split]
    chosen, prompt = table.select(range(rows or len(table))), PROMPTS[task]
    asked = [  # (ids of question and answer, where the answer begins)
        (_ids(tokenizer, f"{question} {answer}"), len(_ids(tokenizer, question)))
        for question in (prompt.question.format(**row) for row in chosen)
        for answer in prompt.answers
    ]
    longest, most = max(len(ids) for ids, _ in asked), getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise ValueError(f"A row of {task} has {longest} tokens with its question, and the model reads {most}.")
    # the last token is only predicted: answers that differ in nothing else need one pass
    numbers_of: dict[tuple[int, ...], list[int]] = {}
    for number, (ids, _) in enumerate(asked):
        numbers_of.setdefault(ids[:-1], []).append(number)
    inputs = sorted(numbers_of, key=len)  # little padding
    scores = torch.zeros(len(asked))
    with in_eval_mode(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(inputs), batch_size):
            batch = inputs[first : first + batch_size]
            padded = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True).to(model.device)
            logits = model(padded, use_cache=False).logits  # padding is on the right: no token before it sees it
            for row, read in enumerate(batch):
                for number in numbers_of[read]:
                    ids, begin = asked[number]
                    likely = logits[row, begin - 1 : len(read)].float().log_softmax(-1).cpu()
                    scores[number] = likely.gather(1, torch.tensor(ids[begin:])[:, None]).sum()
    by_row = scores.view(len(chosen), -1).tolist()
    return ZeroShot(task, split, tuple(chosen["label"]), tuple(map(tuple, by_row)))


def check_questions(data: TaskData, split: str, rows: int | None) -> None:
    """Check that a task can be asked, before any work; parameters as for `zero_shot`.

    Raises
    ------
    ValueError
        A task without a prompt, a split that the data lack, or fewer rows than asked for.
    """
    task = data.task.name
    if task not in PROMPTS:
        raise ValueError(f"There is no prompt for task {task!r}; known: {', '.join(PROMPTS)}.")
    if split not in data.splits:
        raise ValueError(f"{data.source} has no split {split!r} of {task}; it has: {', '.join(data.splits)}.")
    check_at_least_one(rows=1 if rows is None else rows)
    if rows is not None and rows > len(data.splits[split]):
        raise ValueError(
            f"{task} {split} has {len(data.splits[split])} rows, not {rows}: ask for fewer, or for all (None)."
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
