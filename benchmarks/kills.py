"""Does a sweep survive? It is killed at random moments until it was killed often enough, and must end as if it never was.

    python benchmarks/kills.py --kills=100 --out=benchmarks/results/kills-NAME.json

A small sweep runs once undisturbed. Then the same command is given again and again in a new folder, each time killed by
SIGKILL after a time drawn evenly from 0 to half more than the undisturbed run took; when it comes to its end its records are
compared, and the next folder begins. No finished chunk may be written twice.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.guided_step import environment

FLAGS = ("--victims=mlp", "--methods=dsg", "--sigma_grid=0,0.1", "--num_images=6", "--batch=1", "--steps=10")


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), *FLAGS, f"--out={folder}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def records(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "records.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def finished(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (folder / "chunks").glob("[0-9]*.jsonl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="so many in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    draw, kills, sweeps, seen = random.Random(args.seed), 0, 0, set()
    with tempfile.TemporaryDirectory() as root:
        for name in ("first", "undisturbed"):  # the first compiles, which later ones find in the cache
            began = time.monotonic()
            if start(Path(root, name)).wait():
                raise RuntimeError("the undisturbed sweep failed")
            length = time.monotonic() - began
        expected = records(Path(root, "undisturbed"))
        while kills < args.kills:
            folder = Path(root, f"killed-{sweeps}")
            while True:
                before = finished(folder)
                process = start(folder)
                try:
                    code = process.wait(None if kills >= args.kills else draw.uniform(0, 1.5 * length))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    print(f"{kills} kills", flush=True)
                    code = None
                after = finished(folder)
                if any(after.get(name) != when for name, when in before.items()):
                    raise RuntimeError(f"{folder}: a finished chunk was lost or computed again")
                seen.add(len(after))
                if code is not None:
                    break
            if code or records(folder) != expected:
                raise RuntimeError(f"{folder}: ended with code {code} or other records than the undisturbed sweep")
            sweeps += 1
            print(f"{kills} kills, {sweeps} sweeps, all as undisturbed", flush=True)
    result = environment() | dict(
        kills=kills, sweeps=sweeps, identical=sweeps, rows=len(expected), seconds=round(length, 1), chunks_at_kill=sorted(seen)
    )
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
