"""Memory of a process that reads a long text: while it is tokenised, and while batches are taken from it.

    python benchmarks/data_memory.py --megabytes 40 240

For each size a fresh process makes a .jsonl file of CPython's documentation, again and again with a number in front,
reads it with a byte-level tokenizer into an empty cache, and then takes 300 steps of 16 x 1024 tokens in training's
order. Counted is anonymous memory (RssAnon in /proc/self/status), looked at every 20 ms. Pages of mapped files are not
in it, because the system takes them back when memory is short.
"""

import argparse
import json
import multiprocessing
import os
import platform
import pydoc_data.topics
import re
import tempfile
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

STEPS, BATCH, SEQ_LEN = 300, 16, 1024


class Peak:
    """Watches the anonymous memory of this process in a thread."""

    def __init__(self) -> None:
        self.megabytes = anonymous()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.02):
            self.megabytes = max(self.megabytes, anonymous())


def anonymous() -> float:
    """Return the anonymous memory of this process in MB."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, "needs Linux"
    return int(match[1]) * 1024 / 1e6


def write_text(path: Path, megabytes: float) -> None:
    """Write records of a few kB until the file is as large as wanted."""
    topics = sorted(pydoc_data.topics.topics.values())
    with path.open("w", encoding="utf-8") as file:
        for number in range(1 << 40):
            if file.tell() >= megabytes * 1e6:
                return
            file.write(json.dumps({"text": f"{number} {topics[number % len(topics)]}"}) + "\n")


def measure(megabytes: float, folder: str) -> dict[str, Any]:
    """Read a text of so many MB in this process, which must be a fresh one."""
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # before datasets is imported
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from seft_dist.config import DataConfig
    from seft_dist.data.batches import BatchStream
    from seft_dist.data.load import load_sequences

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", "</s>", *alphabet])}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    write_text(Path(folder) / "text.jsonl", megabytes)
    start = anonymous()
    with Peak() as reading:
        sequences = load_sequences(DataConfig(path=f"{folder}/text.jsonl", seq_len=SEQ_LEN), tokenizer, progress=False)
    with Peak() as training:
        stream = BatchStream(sequences, batch_size=BATCH)
        for step in range(STEPS):
            stream.step(step)
    cached = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*") if file.is_file())
    return {
        "megabytes": megabytes,
        "tokens": len(sequences) * SEQ_LEN,
        "cache_mb": cached / 1e6,
        "start_mb": start,
        "reading_mb": reading.megabytes,
        "steps_mb": training.megabytes,
    }


def main() -> None:
    """Measure each size and print a line of the table in docs/data.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[40, 240], help="sizes of the text")
    arguments = parser.parse_args()
    print(f"{datetime.now(timezone.utc):%Y-%m-%d}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print("| text | tokens | cache | at the start | peak while tokenising | peak of 300 steps |")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (megabytes, folder))
        sizes = [f"{found[key]:.0f} MB" for key in ("cache_mb", "start_mb", "reading_mb", "steps_mb")]
        print(f"| {megabytes:g} MB | {found['tokens'] / 1e6:.0f} M | {' | '.join(sizes)} |", flush=True)


if __name__ == "__main__":
    main()
