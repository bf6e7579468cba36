"""All that is measured of speed, by one command: a table on the screen, one JSON file.

    python benchmarks/speed.py --out benchmarks/results/speed-NAME.json

It runs `guided_step.py` (the step over the prior's pull-back, in the scan over outside, choices of convolutions), `scaling.py`
(devices, batches, compiling), `large_prior.py` at 256 px and, where torch is installed, `versus_torch.py`, one after the other:
about half an hour on two cores, which should have nothing else to do. Each can be run alone. On a GPU give --peak_tflops.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGE = "third_party/diffusers/ddpm-ema-celebahq-256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak_tflops", type=float, help="of the chip in bfloat16, to tell the share of it that 256 px use")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    large = [f"--prior={ROOT / LARGE}", "--repeats=2"]
    if args.peak_tflops:
        large += ["--dtype=bfloat16", "--trials=8", f"--peak_tflops={args.peak_tflops}"]
    parts = {"guided_step": [], "scaling": [], "large_prior": large, "versus_torch": []}
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed (extra `parity`): the comparison with it is left out")
        del parts["versus_torch"]
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in parts.items():
            file = Path(folder, f"{name}.json")
            subprocess.run([sys.executable, str(ROOT / f"benchmarks/{name}.py"), *flags, f"--out={file}"], check=True)
            result[name] = json.loads(file.read_text(encoding="utf-8"))
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
