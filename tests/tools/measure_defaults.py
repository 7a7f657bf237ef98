"""Train with the defaults, no setting but keep, and add rows to a CSV file: when the budget is met, and the scores.

    python tests/tools/measure_defaults.py mrpc --data DIR --dense 'dense-{seed}' --out results/defaults.csv
    python tests/tools/measure_defaults.py language --out results/defaults_language.csv

MRPC: MiniLM at three seeds and two budgets, as many steps, the learning rate and the distillation of notebook 05, whose
committed rows have settings tuned by hand; dense models are fine-tuned first where the folders are not there.
Language: the small models of profile quick, the defaults beside the tuned settings in the same run. Rows that the file
has are not made again. Not part of the test suite: MRPC takes about three minutes a row on an idle machine.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
import transformers
from transformers import DataCollatorWithPadding, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import softlms
from softlms.data.encoders import find_encoder, load_classifier
from softlms.experiments.grid import TUNED
from softlms.experiments.jobs import be_quiet
from softlms.experiments.profiles import LANGUAGE_PROFILES
from softlms.experiments.provenance import append_rows
from softlms.training import DEADLINE
from softlms.utils.machine import fast_bf16, hardware, versions
from softlms.workbook.book import open_language_book

KEEPS, FACTORS = (0.5, 0.35), ("svd", "whitened")


def has(out, **row):
    """Whether a row like this is in the file."""
    if not Path(out).is_file():
        return False
    found = pd.read_csv(out)
    return all(name in found for name in row) and bool((found[list(row)] == list(row.values())).all(axis=1).any())


def add(out, row):
    assert row["budget"] in ("met", "forced") and row["deadline"] == DEADLINE
    append_rows(out, pd.DataFrame([row | {"hardware": hardware(), "versions": versions()}]))
    print(row, flush=True)


def arguments(folder, seed, epochs):
    return TrainingArguments(
        str(folder), num_train_epochs=epochs, learning_rate=5e-5, per_device_train_batch_size=16, weight_decay=0.01,
        warmup_steps=0.06, train_sampling_strategy="group_by_length", bf16=fast_bf16(), seed=seed, save_strategy="no",
        report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True, log_level="error",
    )  # fmt: skip


def train(trainer):
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def fine_tuned(folder, seed, data, rows, collator):
    if not Path(folder).is_dir():
        transformers.set_seed(seed)
        model = find_encoder("minilm").for_task(data.task)
        args = arguments(f"{folder}.trainer", seed, 3)
        train(softlms.DistillingTrainer(model, args=args, train_dataset=rows["train"], data_collator=collator))
        model.save_pretrained(folder)
    return load_classifier(folder, dtype=torch.float32)


def mrpc(options):
    tokenizer = find_encoder("minilm").tokenizer()
    data = softlms.load_task("mrpc", options.data)
    rows, collator = softlms.encode(data, tokenizer), DataCollatorWithPadding(tokenizer)
    for seed in options.seeds:
        for factors in FACTORS:
            for keep in options.keeps:
                known = {"task": "mrpc", "factors": factors, "keep": keep, "seed": seed}
                if has(options.out, **known):
                    continue
                model = fine_tuned(options.dense.format(seed=seed), seed, data, rows, collator)
                taught = softlms.add_teacher_logits(rows["train"], model, collator)
                statistics = None
                if factors != "svd":
                    sample = rows["train"].shuffle(seed=seed)
                    statistics = softlms.calibrate(model, sample, collator, rows=256)
                transformers.set_seed(seed)
                softlms.decompose(model, factors, statistics)
                trainer = softlms.SoftTrainer(
                    model, keep=keep, args=arguments(f"{options.out}.trainer-{seed}", seed, 1), train_dataset=taught,
                    data_collator=collator, distillation=0.9,
                )  # fmt: skip
                train(trainer)
                softlms.deploy(model)
                if options.models:
                    folder = f"{options.models}/{factors}-{keep}-{seed}"
                    model.save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
                kept = softlms.count_parameters(model).kept("linear")
                row = known | {"kept_linear": kept, "deadline": DEADLINE, "budget": trainer.schedule.note["budget"]}
                row |= {"frozen_at": trainer.schedule.frozen_at, "steps": trainer.state.max_steps, "data": data.source}
                for split in ("dev", "test"):
                    scores = softlms.evaluate(model, data, rows[split], collator)
                    row |= {f"{split}_{metric}": value for metric, value in scores.items()}
                add(options.out, row)


def language(options):
    chosen = LANGUAGE_PROFILES["quick"]
    for family in chosen.models:
        bench = open_language_book(f"defaults_{family}", family, profile="quick").bench
        recipe = chosen.grid.recipe.changed(**chosen.grid.tasks[family].changes)
        for keep in options.keeps:
            for method in ("whitened+soft", "svd+soft"):
                for name, changes in (("defaults", {}), ("tuned", TUNED[method])):
                    known = {"model": family, "method": method, "keep": keep, "seed": 0, "settings": name}
                    if has(options.out, **known):
                        continue
                    result = bench.run(method, recipe.changed(keep=keep, **changes), 0).result
                    at, steps = result["frozen_at"], result["steps"]
                    row = known | {"kept_linear": result["kept_linear"], "deadline": DEADLINE}
                    row |= {"budget": "met" if at < DEADLINE * steps else "forced", "frozen_at": at, "steps": steps}
                    row |= {f"{split}_perplexity": s["perplexity"] for split, s in result["scores"].items()}
                    add(options.out, row | {"data": bench.data.source})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("mrpc", "language"))
    parser.add_argument("--data", default="hub", help="folder in GLUE's layout, or hub")
    parser.add_argument("--dense", default="dense-{seed}", help="folders of the fine-tuned models")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="of MRPC (default 0 1 2)")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, help="budgets (default 0.5 0.35)")
    parser.add_argument("--models", help="folder that keeps the compressed models of MRPC, as for measure_int8.py")
    parser.add_argument("--out", required=True, help="CSV file that gets these rows more")
    options = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    {"mrpc": mrpc, "language": language}[options.what](options)


if __name__ == "__main__":
    main()
