import datasets
import numpy as np
import pytest
import torch

from softlms.data.tasks import TASKS, TaskData
from softlms.evaluation.zero_shot import PROMPTS, Prompt, ZeroShot, zero_shot
from softlms.experiments.tokenized import train_tokenizer

WORDS = ["a", "fine", "dull", "film", "that", "{moves}", "slowly", ",", "over", "wide", "red", "seas"]
SENTENCES = [" ".join(WORDS[i % 5 : 5 + i % 7]) for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*SENTENCES, *(prompt.question for prompt in PROMPTS.values()), "positive negative"]
    return train_tokenizer("\n".join(texts) * 9, 300)


def task(name, **columns):
    rows = datasets.Dataset.from_dict(columns | {"label": [i % 2 for i in range(len(SENTENCES))]})
    return TaskData(TASKS[name], {"dev": rows}, "folder: here")


@pytest.mark.parametrize("name", PROMPTS)
def test_the_likeliest_answer_is_given(tiny_llama, tokenizer, name):
    """As one row and one answer at a time, token by token; a prompt has an answer for each label."""
    model, prompt = tiny_llama(vocab_size=300), PROMPTS[name]
    columns = TASKS[name].sentences
    data = task(name, **dict.fromkeys(columns, SENTENCES))
    expected = []
    for sentence in SENTENCES:
        question = prompt.question
        for column in columns:
            question = question.replace(f"{{{column}}}", sentence)
        scores = []
        for answer in prompt.answers:
            begin, ids = len(tokenizer(question)["input_ids"]), tokenizer(f"{question} {answer}")["input_ids"]
            with torch.no_grad():
                likely = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(likely[t - 1, ids[t]].item() for t in range(begin, len(ids))))
        expected.append(scores)
    found = zero_shot(model.train(), tokenizer, data, batch_size=5)
    assert np.allclose(found.scores, expected, atol=1e-4) and found.labels == (0, 1) * 10 and model.training
    assert found.answers == tuple(np.argmax(expected, 1)) and found.accuracy == np.mean(
        np.equal(found.answers, found.labels)
    )
    assert np.allclose(zero_shot(model, tokenizer, data, rows=2, batch_size=1).scores, expected[:2], atol=1e-4)
    assert len(prompt.answers) == len(TASKS[name].labels)


def test_answers_of_one_token_share_a_pass(tiny_llama, tokenizer, monkeypatch):
    """The last token of an answer is only predicted, so the question is read once for all of them."""
    monkeypatch.setitem(PROMPTS, "sst2", Prompt("A film:", ("a", "b")))
    model, read = tiny_llama(vocab_size=300), []
    model.register_forward_pre_hook(lambda _, args: read.extend(args[0].tolist()))
    known = train_tokenizer("A film: a b " * 99, 300)
    found = zero_shot(model, known, task("sst2", sentence=SENTENCES))
    assert len(known(" a")["input_ids"]) == len(known(" b")["input_ids"]) == 1
    assert len(read) == 1 and len(set(found.scores)) == 1 and len(found.scores) == len(SENTENCES)


def test_result_says_how_it_was_asked():
    assert str(ZeroShot("sst2", "dev", (0, 1, 1, 1), ((-1, -2), (-2, -1), (-2, -1), (-1, -2)))) == (
        "75.0 ± 21.7 % right (standard error) on the first 4 rows of sst2 dev, zero-shot, by likelihood; "
        "the commonest label: 75.0 %"
    )


def test_what_cannot_be_asked_is_said_before_any_work(tiny_llama, tokenizer):
    model, data = tiny_llama(vocab_size=300, max_position_embeddings=48), task("sst2", sentence=SENTENCES)
    for what, options, message in (
        (task("cola", sentence=SENTENCES), {}, "no prompt for task 'cola'; known: sst2, mrpc, rte"),
        (data, {"split": "test"}, "folder: here has no split 'test' of sst2; it has: dev"),
        (data, {"rows": 21}, r"sst2 dev has 20 rows, not 21: ask for fewer, or for all \(None\)"),
        (data, {"rows": 0}, "rows must be at least 1, got 0"),
        (task("sst2", sentence=["wide seas " * 40] * 20), {}, "tokens with its question, and the model reads 48"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(model, tokenizer, what, **options)
