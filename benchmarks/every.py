"""All benchmarks, ten minutes on two idle cores: `python -m benchmarks.every`, which is `make bench`.

Writes benchmarks/results/<processor>.json, with every benchmark's JSON line, and prints their ratios as a table.
`python -m benchmarks.tables` then writes the README's table anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.tables import processor, table
from data_prep.files import replacing

# Seconds of rounds; setting up and compiling take three minutes more in all.
SECONDS = {"augment": 50, "loaders": 90, "memory_bank": 25, "methods": 60, "build": 60, "step": 100}


def main() -> None:
    """Run them one after the other; what there is of the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    begin = time.monotonic()
    for name in arguments.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", f"--seconds={SECONDS[name]}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: benchmarks.{name} ended with exit code {done.returncode}.")
        print(done.stdout, end="", flush=True)
        for line in (json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")):
            hardware, commit = line.pop("hardware"), line.pop("commit")
            result = result or {"hardware": hardware, "commit": commit, "lines": []}
            result["lines"].append(line)
        result["seconds"] = round(time.monotonic() - begin)
        slug = re.sub(r"[^a-z0-9]+", "-", processor(result["hardware"]).lower()).strip("-")
        with replacing(arguments.out / f"{slug}.json") as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{table([result])}\n\n{arguments.out / slug}.json, {result['seconds']} s")


if __name__ == "__main__":
    main()
