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

from benchmarks.common import RESULTS
from benchmarks.tables import processor, table
from data_prep.files import replacing

# Seconds of rounds; setting up and compiling take three minutes more in all.
SECONDS = {"augment": 50, "loaders": 90, "memory_bank": 25, "step": 100, "methods": 60, "build": 60}


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes")
    arguments = parser.parse_args()
    lines, begin = [], time.monotonic()
    for name in arguments.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", f"--seconds={SECONDS[name]}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"error: benchmarks.{name} ended with exit code {done.returncode}; nothing was written.")
        print(done.stdout, end="", flush=True)
        lines += [json.loads(text) for text in done.stdout.splitlines()]
    result = {"hardware": lines[0]["hardware"], "commit": lines[0]["commit"], "seconds": time.monotonic() - begin}
    for line in lines:
        del line["hardware"], line["commit"]
    result["lines"] = lines
    path = arguments.out / f"{re.sub(r'[^a-z0-9]+', '-', processor(result['hardware']).lower()).strip('-')}.json"
    with replacing(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{table([result])}\n\n{path}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
