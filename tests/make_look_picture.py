"""Draws colab/look.png: the page that `retmask look` writes, in a headless Chromium.

python tests/make_look_picture.py models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import sys
import tempfile
from pathlib import Path

from helpers_browser import browser
from PIL import Image

from retmask_jax.cli.main import main as retmask

PICTURE = Path(__file__).parent.parent / "colab" / "look.png"
STEP = 2  # of the answer, which is a code of four digits


def main(model):
    with tempfile.TemporaryDirectory() as folder, browser() as tab:
        page, shot = Path(folder) / "look.html", Path(folder) / "look.png"
        assert retmask(["look", model, "--new_tokens=8", f"--out={page}"]) == 0
        tab.open(page, 1180, 820)
        tab.run(f"document.querySelectorAll('.said button')[{STEP}].click()")
        tab.picture(shot)
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(PICTURE, optimize=True)
    print(PICTURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
