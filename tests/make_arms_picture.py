"""Draws colab/arms.png: what every arm and seed gains against the start model, from the records of `retmask eval`.

python tests/make_arms_picture.py colab/real/smollm2-135m.json colab/real/seeds
"""

import sys
from pathlib import Path

from retmask_jax.reports import plotting
from retmask_jax.reports.panel.records import Record, read_records
from retmask_jax.utils.numbers import Number

PICTURE = Path(__file__).parent.parent / "colab" / "arms.png"
TASKS = {"context short": "texts of 256 tokens", "context long": "texts of 1,024 tokens"}
ARMS = {
    "retmask": "retrieval heads masked (RetMask)",
    "any_layer": "as many heads of any layer masked",
    "layer_matched": "as many heads of the same layers masked",
    "sft_filtered": "the same answers, without rejected ones",
    "contrast": "RetMask's contrast as a loss",
    "no_fact": "rejected answers without the text",
    "activity_matched": "as many heads, as active, masked",
    "retmask_others": "RetMask, all other heads trained",
    "retmask_retrieval": "RetMask, retrieval heads trained",
    "retmask_matched": "RetMask, as many other heads trained",
    "contrast decoding": "decoded by contrast, untrained",
}


def gains(records: list[Record], task: str) -> dict[str, dict[int, Number]]:
    """{arm: {training seed: change against the start model}}, in the order of ARMS."""
    found: dict[str, dict[int, Number]] = {arm: {} for arm in ARMS}
    for record in records:
        (seed,) = record.settings["train.seeds"]
        for arm, of_arm in found.items():
            if number := record.numbers.get(f"eval/{task}/{arm} minus start"):
                of_arm[seed] = number
    return {arm: of_arm for arm, of_arm in found.items() if of_arm}


def draw(records: list[Record]) -> None:
    """One row an arm, one mark a seed, with its interval."""
    with plotting.style():
        figure, first = plotting.panel(
            "How much more often the text is followed where it contradicts what the model knows", 3.6, 8.2
        )
        first.remove()
        axes = figure.subplots(1, len(TASKS), sharex=True, sharey=True)
        for ax, (task, title) in zip(axes, TASKS.items(), strict=True):
            found = gains(records, task)
            plotting.rows(ax, [ARMS[arm] for arm in found], f"change of the share, {title}")
            ax.axvline(0, color="#999999", linewidth=0.8)
            for row, (arm, of_arm) in enumerate(found.items()):
                for seed, number in of_arm.items():
                    at = row + 0.16 * (2 * seed - 1) if len(of_arm) > 1 else row
                    plotting.interval(ax, number, at, plotting.colour(arm), "os"[seed])
        for seed, marker in enumerate("os"):
            axes[1].plot([], [], marker, color="#555555", label=f"seed {seed}")
        axes[1].legend(loc="upper left")
        figure.savefig(PICTURE, dpi=200)


if __name__ == "__main__":
    draw(read_records([Path(argument) for argument in sys.argv[1:]]))
    print(f"wrote {PICTURE}")
