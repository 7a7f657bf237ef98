import datasets
import numpy as np
import pytest
import torch
from transformers import DataCollatorWithPadding, EvalPrediction

from softlms.data.encoders import find_encoder
from softlms.data.tasks import TASKS, TaskData
from softlms.evaluation.metrics import add_teacher_logits, compute_metrics, evaluate, paired_difference


def test_metrics_by_hand():
    logits = np.array([[0, 1], [1, 0], [0, 1], [1, 0.0]])
    got = compute_metrics(TASKS["mrpc"])(EvalPrediction(logits, np.array([1, 0, 0, 1])))
    assert got == {"f1": pytest.approx(0.5), "accuracy": pytest.approx(0.5)}
    got = compute_metrics(TASKS["cola"])(EvalPrediction(logits, np.array([1, 0, 1, 0])))
    assert got == {"matthews": pytest.approx(1)}
    scores = np.array([[1.0], [2.0], [9.0]])
    got = compute_metrics(TASKS["stsb"])(EvalPrediction(scores, np.array([0.0, 1.0, 8.0])))
    assert got == {"pearson": pytest.approx(1), "spearman": pytest.approx(1)}


@pytest.fixture
def rows():
    ids = [torch.randint(5, 200, (length,)).tolist() for length in (9, 3, 12, 5, 7)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return datasets.Dataset.from_dict(columns | {"labels": [0, 1, 0, 1, 1]})


@pytest.fixture
def collator():
    return DataCollatorWithPadding(find_encoder("minilm").tokenizer())


def test_batches_by_length_give_each_row_its_own_logits(tiny_bert, rows, collator):
    model = tiny_bert().train()
    taught = add_teacher_logits(rows, model, collator, batch_size=2)
    assert model.training  # as it was
    model.eval()
    for row in taught:
        alone = model(torch.tensor([row["input_ids"]])).logits[0].detach()
        torch.testing.assert_close(torch.tensor(row["teacher_logits"]), alone, rtol=1e-4, atol=1e-5)
    predicted = [int(np.argmax(row["teacher_logits"])) for row in taught]
    expected = np.mean(np.array(predicted) == np.array(rows["labels"]))
    for task in (TaskData(TASKS["rte"], {}, "as load_task gives it"), TASKS["rte"]):
        assert evaluate(model, task, rows, collator, batch_size=2) == {"accuracy": pytest.approx(expected)}


def test_paired_difference_is_students_interval():
    mean, low, high = paired_difference([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])
    assert mean == pytest.approx(1)
    assert (low, high) == (pytest.approx(1 - 4.302653 / np.sqrt(3)), pytest.approx(1 + 4.302653 / np.sqrt(3)))
    for pair in (([1.0], [2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="Paired runs"):
            paired_difference(*pair)
