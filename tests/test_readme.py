"""README's code, run as it stands: only names of models and data are those of this test."""

import re
from pathlib import Path

import torch
from transformers import pipeline

import softlms

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
TEN_LINES = re.search(r"ten lines:\n\n```python\n(.*?)```", README, flags=re.DOTALL)[1]
LOADED = re.search(r"any other model\n\n```python\n(.*?)```", README, flags=re.DOTALL)[1]


def test_the_ten_lines_are_ten_and_end_in_a_model_that_a_pipeline_loads(tiny_folder, tmp_path, monkeypatch):
    assert sum(line != "" and not line.startswith(("import ", "from ")) for line in TEN_LINES.splitlines()) == 10
    folder = tmp_path / "mrpc"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [f"{i % 2}\t{i}\t{i}\tthe house {i}\t{'a house' if i % 2 else 'no tree'} {i}\n" for i in range(160)]
        text = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(rows)
        (folder / f"{split}.tsv").write_text(text, "utf-8")
    code = TEN_LINES.replace("your-fine-tuned-bert", str(tiny_folder)).replace('"hub"', repr(str(tmp_path)))
    code = code.replace("5e-5", "3e-3")  # the tiny model is random: it has to learn what int8 shall not change
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["trainer"].schedule.note["budget"] == "met"
    assert 0.49 < softlms.count_parameters(names["model"]).kept("linear") <= 0.5
    classify = pipeline("text-classification", model=str(tmp_path / "small"))
    encoded = classify.tokenizer("the house", "a house", return_tensors="pt")
    with torch.inference_mode():
        expected = names["model"].eval()(**encoded.to(names["model"].device)).logits.cpu()
    assert torch.equal(classify.model.cpu()(**encoded.to("cpu")).logits, expected)
    assert classify({"text": "the house", "text_pair": "a house"})["label"].startswith("LABEL_")
    exec(LOADED, names)  # in the same session: its rows are those above
    assert torch.equal(names["model"](**encoded).logits, expected)
    assert (tmp_path / "small.onnx").is_file() and (tmp_path / "int8.onnx").is_file()
