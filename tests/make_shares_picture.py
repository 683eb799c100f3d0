"""Draws colab/shares.png: what each group of parts carries of a gain, as `retmask diff` found it.

python tests/make_shares_picture.py colab/real/smollm2-135m-diff.json
"""

import json
import sys
from pathlib import Path

from msgspec import convert

from retmask_jax.heads.gain.difference import Difference
from retmask_jax.reports import plotting
from retmask_jax.reports.difference import groups_figure

PICTURE = Path(__file__).parent.parent / "colab" / "shares.png"


if __name__ == "__main__":
    found = convert(json.loads(Path(sys.argv[1]).read_text()), Difference)
    with plotting.style():
        groups_figure(found, "What carries the gain in log-probability", "logprob").savefig(PICTURE, dpi=200)
    print(f"wrote {PICTURE}")
