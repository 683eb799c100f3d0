"""What a GPU is to show, in one go of about ten minutes: `python -m retmask_jax.benchmarks.on_gpu MODEL OUT`.

MODEL is a small model to run whole (SmolLM2-135M-Instruct). Every command is run as a user would run it; its output and
results are kept in the folder OUT, and the table at the end says which bounds hold. The peers are not needed.
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from retmask_jax.benchmarks.models import shape, write_random
from retmask_jax.utils.files import write_json

_LIMIT = 240  # seconds of a command
# Rows of a report, by how their names begin, and the least share of the peak that they are to reach.
_SHARES = {"prefill": 0.8, "decoding": 0.6, "8b": 0.5}


def commands(model: str, out: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """{name: (arguments of `retmask`, variables of the environment)}, in order."""
    kept = {"RETMASK_PROGRAMS": str(out / "programs")}
    bench = f"bench {{}} --model={out}/8b --repeats=3 --out={{}}"
    masks = {"masks": (f"bench masks --repeats=3 --out={out}/masks.json", {})} if find_spec("torch") else {}
    return {
        "prefill": (
            bench.format("generate", out / "prefill.json") + " --alone --batch=1 --length=32768 --new-tokens=1",
            {},
        ),
        "sampling": (
            bench.format("generate", out / "sampling.json") + " --alone --batch=8 --length=1024 --rows=128",
            {},
        ),
        "dpo": (bench.format("dpo", out / "dpo.json") + " --lora-rank=16", {}),
        "tiny, nothing kept": (f"run --config=tiny --workdir={out}/tiny1", {"RETMASK_PROGRAMS": "off"}),
        "tiny, cold": (f"run --config=tiny --workdir={out}/tiny2 --config.timings=True", kept),
        "tiny, warm": (f"run --config=tiny --workdir={out}/tiny3 --config.timings=True", kept),
        "real model": (f"run {model} --workdir={out}/real --config.timings=True", kept),
        **masks,
    }


def shares(report: Path) -> list[str]:
    """A line for every row of a report that has a bound."""
    if not report.exists():
        return []
    lines = []
    for row in json.loads(report.read_text())["rows"]:
        least = next((share for name, share in _SHARES.items() if row["name"].startswith(name)), None)
        if least is not None and ("peak" in row["name"] or "bandwidth" in row["name"]):
            holds = "holds" if row["ratio"] >= least else "FALLS SHORT"
            lines.append(f"{row['name']}: {row['ratio']:.2f} of the peak, {least} wanted: {holds}")
    return lines


def main(model: str, out: Path) -> None:
    """Runs all commands and prints what came of them."""
    write_random(shape("8b"), out / "8b", "bfloat16")  # once for all commands: drawing it takes a minute
    seconds, lines = {}, []
    for name, (arguments, environment) in commands(model, out).items():
        begin = time.monotonic()
        with open(out / f"{name.replace(', ', '-').replace(' ', '-')}.txt", "w") as log:
            command = [sys.executable, "-m", "retmask_jax.cli.main", *arguments.split()]
            try:
                status = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, timeout=_LIMIT
                ).returncode
            except subprocess.TimeoutExpired:
                status = f"stopped after {_LIMIT} s"
        seconds[name] = {"seconds": round(time.monotonic() - begin, 1), "status": status}
        print(f"{name}: {seconds[name]['seconds']} s, exit status {status}", flush=True)
        lines += shares(out / f"{name}.json")
    print("\n".join(lines))
    write_json(out / "on_gpu.json", {"commands": seconds, "shares": lines})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
