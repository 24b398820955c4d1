"""Tokens per CPU second: `skyladder prepare` beside Megatron's tools/preprocess_data.py.

    python benchmarks/prepare.py --checkout /path/to/Megatron-LM --input corpus.jsonl \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model starcoder/

Both run on the input and on its first line alone; the difference is what the work costs without
start-up. CPU time is that of all processes, so the figures hold on a machine that is busy.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_skyladder.data.indexed import IndexedReader


def main() -> int:
    """Measure both, print a table, and fail where the outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, help="a Megatron-LM checkout to compare with")
    parser.add_argument("--input", type=Path, required=True, help="a JSON lines file")
    parser.add_argument("--workers", type=int, default=1)
    args, tokenizer = parser.parse_known_args()
    commands = {"skyladder": [sys.executable, "-m", "megatron_skyladder", "prepare"]}
    if args.checkout:
        tool = args.checkout / "tools" / "preprocess_data.py"
        commands["megatron"] = [sys.executable, str(tool), "--append-eod"]
    flags = ["--workers", str(args.workers), *tokenizer]
    with tempfile.TemporaryDirectory() as folder:
        one_line = Path(folder) / "one.jsonl"
        with open(args.input, encoding="utf-8") as lines:
            one_line.write_text(next(lines), encoding="utf-8")
        print(f"{'':10} {'seconds':>9} {'CPU s':>9} {'start-up':>9} {'tokens per CPU second':>22}")
        for name, command in commands.items():
            _, startup = measure([*command, "--input", one_line, *flags], f"{folder}/one_{name}")
            wall, cpu = measure([*command, "--input", args.input, *flags], f"{folder}/{name}")
            num_tokens = IndexedReader(f"{folder}/{name}_text_document").num_tokens
            rate = num_tokens / (cpu - startup)
            print(f"{name:10} {wall:9.1f} {cpu:9.1f} {startup:9.1f} {rate:22,.0f}")
        return 0 if len(commands) == 1 else compare(folder)


def measure(command: list[str | Path], prefix: str) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of a command and all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [*map(str, command), "--output-prefix", prefix],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, cpu


def compare(folder: str) -> int:
    """Say whether both wrote the same bytes."""
    names = [f"_text_document.{part}" for part in ("bin", "idx")]
    same = all(filecmp.cmp(f"{folder}/skyladder{n}", f"{folder}/megatron{n}", False) for n in names)
    print("the outputs are the same, byte for byte" if same else "THE OUTPUTS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
