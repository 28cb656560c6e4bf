"""Choice of records: those for training or those that are kept out of it, and how many."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from seft_dist.config import DataConfig
from seft_dist.data.records import LOCATION

_HASHES = 1 << 64


def hash_record(record: Mapping[str, Any]) -> int:
    """Hash the content of a record; fields in another order change nothing.

    Returns:
        A number of 64 bits.
    """
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def select_records(records: Any, config: DataConfig) -> Any:
    """Keep the records of the training part or of the held-out part, at most ``max_records``.

    With ``holdout_every`` n, the n-th, 2n-th, ... record is held out; with ``holdout_share`` those whose hashes are
    smallest. The second choice is cached.

    Args:
        records: A ``datasets.Dataset``.
        config: The data.

    Raises:
        ValueError: No record is left.
    """
    count = len(records)
    chosen = records
    if config.holdout_share:
        chosen = _by_hash(records, config)
    elif config.holdout_every:
        n, numbers = config.holdout_every, np.arange(count)
        chosen = records.select(numbers[(numbers % n == n - 1) == config.holdout])
    if config.max_records is not None and len(chosen) > config.max_records:
        chosen = chosen.select(range(config.max_records))
    if len(chosen) == 0:
        raise ValueError(
            f"data.path={config.label} has {count} records, none of them left with "
            f"holdout_every={config.holdout_every}, holdout_share={config.holdout_share}, holdout={config.holdout}: "
            "needs more records (a .txt file is one record; use .jsonl with one document a line)"
        )
    return chosen


def _by_hash(records: Any, config: DataConfig) -> Any:
    limit, columns = int(config.holdout_share * _HASHES), [name for name in records.column_names if name != LOCATION]

    def is_chosen(batch: dict[str, list[Any]]) -> list[bool]:
        rows = zip(*(batch[name] for name in columns), strict=True)
        hashes = (hash_record({k: v for k, v in zip(columns, row, strict=True) if v is not None}) for row in rows)
        return [(number < limit) == config.holdout for number in hashes]

    key = f"{records._fingerprint} {columns} {limit} {config.holdout}"
    return records.filter(
        is_chosen,
        batched=True,
        num_proc=config.num_proc if config.num_proc > 1 else None,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        desc="Holding out",
    )
