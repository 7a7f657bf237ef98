"""Kill ``softlms compress`` at random moments, try again, and compare every file with those of a run nobody killed.

    python tests/tools/kill_compress.py --kills 20                      # some minutes
    python tests/tools/kill_compress.py --kills 20 count=flops

The moments are touches of the disk, one of which is drawn for each kill: by the clock, those between two checkpoints
would get nearly all. A tiny BERT with a head for another task, which is fine-tuned first, keeps a run in seconds. Runs
are forks of one process, as imports take longer than a run. Exit status 1 when something differs or is left over;
`test_compress` does the same with a few kills. Not for Windows, which has no fork.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
import transformers
from rich.console import Console
from safetensors import safe_open

from softlms.compress import Compression, compress
from softlms.data.encoders import find_encoder

TOUCHES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def make_inputs(folder):
    """A model with a head of three labels, and a task of two."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    find_encoder("minilm").tokenizer().save_pretrained(folder / "model")
    data = folder / "glue" / "RTE"
    data.mkdir(parents=True)
    for split, number in (("train", 24), ("dev", 8)):
        rows = [f"{i}\tthe house {i}\tit is red\t{'not_' * (i % 2)}entailment\n" for i in range(number)]
        (data / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(rows), "utf-8")
    return Compression(
        str(folder / "model"), task="rte", keep=0.5, data=str(folder / "glue"), epochs=2, dense_epochs=2,
        alpha_learning_rate=0.1, learning_rate=1e-3, dense_learning_rate=1e-3, batch_size=8, calibration_rows=16,
        max_length=32,
    )  # fmt: skip


def run(settings, out, touched):
    """Compress in a fork of this process, which calls `touched` at each touch of the disk; its exit status.

    Whatever is written at the side of `out` counts, and of files only their opening for writing.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in TOUCHES) and str(args[0]).startswith(str(out)):
            touched(f"{event} {str(args[0]).removeprefix(str(out))}")

    try:
        sys.addaudithook(hook)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            sys.stdout = nowhere
            compress(settings, out, console=Console(file=nowhere))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def strike_at(moment):
    """Kills the process at the touch of that number, from 0 on."""
    left = iter(range(moment))

    def touched(what):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return touched


def contents(folder):
    """What all files hold; of weights the tensors, as safetensors' header has no fixed order."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found[path.name] = file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="others of softlms.compress.Compression")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        settings = make_inputs(folder)
        for name, value in (part.split("=") for part in options.settings):
            object.__setattr__(settings, name, value)
        whole, log = folder / "whole", folder / "log"

        def note(what):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{what}\n")

        assert run(settings, whole, note) == 0
        touches, expected = log.read_text("utf-8").splitlines(), contents(whole)
        print(f"{len(touches)} touches of the disk", flush=True)
        draw = random.Random(options.seed)
        for _ in range(options.kills):
            moments, status = [], -signal.SIGKILL
            while status == -signal.SIGKILL:
                # as a rule one kill, sometimes two or three; the last try is left alone
                again = not moments or (len(moments) < 3 and draw.random() < 0.3)
                moments.append(draw.randrange(len(touches)) if again else 10**9)
                status = run(settings, folder / "out", strike_at(moments[-1]))
            left = [path.name for path in folder.glob("out*")]
            same = left == ["out"] and contents(folder / "out") == expected
            wrong += status != 0 or not same
            told = ", then ".join(touches[moment] for moment in moments if moment < len(touches))
            print("ok   " if status == 0 and same else f"WRONG (status {status}, left {left})", told, flush=True)
            for path in folder.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
