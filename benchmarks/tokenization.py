"""What `tokenize` costs above encoding alone, and how two workers share one file.

    make bench-tokenize        or  python benchmarks/tokenization.py [--megabytes 120 --rounds 3 --dry]

The text is Python code of the environment, in documents of at least 3 kB, once as one jsonl file and once as eight.
Contestants take turns, each in new processes that may only use as many CPUs as the row says. Encoding alone is one
batch after the other, as large as ours, of text that is in memory: no reading, no writing, no start. It is measured
with `encode_batch`, which most programs call, and with `encode_batch_fast`, which finds no places of the tokens in the
text and which we call: what ours loses beside that is what all the rest costs. Ours is the whole command, from the
start of Python to the last manifest. Wall-clock times are those of an idle machine or mean nothing; CPU-seconds hold
also on one that others use.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT, Section, publish
from benchmarks.rounds import ratios, spread

SHORTEST, LONGEST = 3_000, 30_000
"""Characters of a document."""
VOCAB_SIZE = 32_000
TRAINING_BYTES = 20_000_000
FILES = 8
ENCODING = ("encode_batch", "encode_batch_fast")
"""What the library has to encode many texts."""
PACKAGES = ("datatrove", "tokenizers")

RECIPE = """\
general: {{purpose: a benchmark}}
model:
  dtype: float32
  init_method: {{std: 0.1}}
  model_config:
    vocab_size: {vocab_size}
    hidden_size: 16
    intermediate_size: 16
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 2
tokens: {{sequence_length: 128, global_batch_size: 1, train_steps: 1}}
optimizer:
  learning_rate_scheduler: {{learning_rate: 1.0e-3, lr_warmup_steps: 0, lr_decay_steps: 0, min_decay_lr: 0}}
tokenizer: {{tokenizer_name_or_path: {tokenizer}}}
corpus:
  path: {out}
  validation_fraction: 0.0
  sources: [{{name: code, reader: jsonl, path: {text}}}]
data_stages:
  - name: all
    start_training_step: 1
    data: {{dataset: {{dataset_folder: [code]}}}}
"""


def code_documents() -> Iterator[str]:
    """Python code of the environment and the standard library in pieces, shuffled alike on every call."""
    roots = sorted({Path(path) for path in sys.path if path and Path(path).is_dir()})
    files = sorted({path for root in roots for path in root.rglob("*.py") if "benchmarks" not in path.parts})
    random.Random(0).shuffle(files)
    for path in files:
        try:
            code = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield from (piece for i in range(0, len(code), LONGEST) if len(piece := code[i : i + LONGEST]) >= SHORTEST)


def make_text(folder: Path, num_bytes: int) -> int:
    """One jsonl file of about `num_bytes` of text, the same in several files, and a tokenizer; the bytes of text."""
    texts, size = [], 0
    for text in code_documents():
        texts.append(text)
        size += len(text.encode())
        if size >= num_bytes:
            break
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for name, number in (("one", 1), ("several", FILES)):
        (folder / name).mkdir()
        for part in range(number):
            (folder / name / f"{part}.jsonl").write_text("".join(lines[part::number]))
    _train_tokenizer(folder / "tokenizer", texts)
    return size


def _train_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    count = max(1, TRAINING_BYTES // LONGEST)
    tokenizer.train_from_iterator(texts[:count], trainer)
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{number}|>" for number in range(missing)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def encode_alone(folder: Path, function: str) -> None:
    """The process that encodes and does nothing else: prints seconds, CPU-seconds and tokens."""
    from tokenizers import Tokenizer

    from data.encoding import batches_of

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with (folder / "one" / "0.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    tokens, started, cpu = 0, time.perf_counter(), time.process_time()
    for batch in batches_of(texts):
        encoded = getattr(tokenizer, function)([piece for piece, _ in batch], add_special_tokens=False)
        tokens += sum(len(each.ids) for each in encoded)
    print(json.dumps([time.perf_counter() - started, time.process_time() - cpu, tokens]))


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    seconds: float
    cpu_seconds: float
    tokens: int


def measure_raw(folder: Path, function: str, cpus: list[int]) -> Cost:
    """Encoding alone, with a function of the tokenizer, on some CPUs."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--encode-alone", str(folder), function]
    done = _run(command, cpus)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def measure_ours(folder: Path, text: str, cpus: list[int]) -> Cost:
    """`tokenize` with a worker a CPU, shards and all, which are removed afterwards."""
    out, recipe = folder / "out", folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(vocab_size=VOCAB_SIZE, tokenizer=folder / "tokenizer", out=out, text=folder / text))
    main = "from launch.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", main, "tokenize", str(recipe), "--workers", str(len(cpus))]
    before, started = _children_seconds(), time.perf_counter()
    _run(command, cpus)
    seconds, cpu_seconds = time.perf_counter() - started, _children_seconds() - before
    manifest = json.loads((out / "code" / "manifest.json").read_text())
    shutil.rmtree(out)
    documents = sum(file["documents"] for file in manifest["train"]["files"])
    return Cost(seconds, cpu_seconds, sum(file["tokens"] for file in manifest["train"]["files"]) - documents)


def _run(command: list[str], cpus: list[int]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": str(len(cpus))}
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cpus)), *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Make the text, let the contestants take turns, write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--encode-alone", nargs=2, metavar=("FOLDER", "FUNCTION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode_alone is not None:
        encode_alone(Path(arguments.encode_alone[0]), arguments.encode_alone[1])
        return
    cpus = sorted(os.sched_getaffinity(0))[:2]
    folder = Path(tempfile.mkdtemp(prefix="bench-tokenize-"))
    try:
        size = make_text(folder, round(arguments.megabytes * 1e6))
        found = [_round(folder, cpus) for _ in range(arguments.rounds)]
    finally:
        shutil.rmtree(folder)
    publish("tokenize", "Tokenization", [_table(found, size)], write=not arguments.dry, packages=PACKAGES)


def _round(folder: Path, cpus: list[int]) -> dict[str, Cost]:
    costs = {
        **{function: measure_raw(folder, function, cpus[:1]) for function in ENCODING},
        "one worker, one file": measure_ours(folder, "one", cpus[:1]),
        "two workers, one file": measure_ours(folder, "one", cpus),
        "two workers, several files": measure_ours(folder, "several", cpus),
    }
    if len({cost.tokens for cost in costs.values()}) != 1:
        raise RuntimeError(f"the contestants have made different tokens: {costs}")
    return costs


ROWS = {
    **{function: (f"{function} alone, text in memory", "1") for function in ENCODING},
    "one worker, one file": ("ours, one jsonl file", "1"),
    "two workers, one file": ("ours, one jsonl file", "2"),
    "two workers, several files": (f"ours, {FILES} jsonl files", "2"),
}


def _table(found: list[dict[str, Cost]], size: int) -> Section:
    seconds = {name: [costs[name].seconds for costs in found] for name in ROWS}
    cpu = {name: [costs[name].cpu_seconds for costs in found] for name in ROWS}
    tokens = found[0]["encode_batch"].tokens
    rows: list[tuple[str, ...]] = []
    for name, (what, workers) in ROWS.items():
        rates = [tokens / value / 1e3 for value in seconds[name]]
        # A pool's processes are not its starter's children: their time is not counted.
        cpu_seconds = spread(cpu[name], 1) if workers == "1" else "–"
        rows.append((what, workers, spread(seconds[name], 1), cpu_seconds, spread(rates, 0)))
    one, two = "one worker, one file", "two workers, one file"
    beside = [
        f"Ours / {function} alone, one CPU: {spread(ratios(seconds[function], seconds[one]))} of its tokens per "
        f"second, {spread(ratios(cpu[function], cpu[one]))} per CPU-second. "
        for function in ENCODING
    ]
    notes = (
        f"{size / 1e6:.0f} MB of text, {tokens:,} tokens of a vocabulary of {VOCAB_SIZE:,}, documents of {SHORTEST:,} "
        f"to {LONGEST:,} characters. Median (smallest to largest) of {len(found)} rounds; ratios are of one round.\n\n"
        f"{''.join(beside)}Two workers / one: {spread(ratios(seconds[one], seconds[two]))} with one file, "
        f"{spread(ratios(seconds[one], seconds['two workers, several files']))} with {FILES}."
    )
    columns = ("contestant", "CPUs", "seconds", "CPU-seconds", "thousand tokens per second")
    return Section("Tokens per second", columns, rows, notes)


if __name__ == "__main__":
    main()
