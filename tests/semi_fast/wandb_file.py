"""What an offline piece of a W&B run holds: records of protobuf, framed as LevelDB's log is."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = 7, 32 * 1024  # bytes
WHOLE, LAST = 1, 4  # kinds of a fragment that end a record


def read_piece(folder: Path) -> tuple[str, bool, list[dict[str, Any]]]:
    """The run's id, whether `wandb sync` adds it to what is there of that id, and the rows of its history, in order."""
    (path,) = folder.glob("*.wandb")
    records = list(_records(path.read_bytes()))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in h.item} for h in history]
    return run.run_id, run.resume, rows


def _records(data: bytes) -> Iterator[Record]:
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too small for a fragment: filled up
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER + length
        parts += data[position - length : position]
        if kind in (WHOLE, LAST):
            yield Record.FromString(parts)
            parts = b""
