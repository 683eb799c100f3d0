"""A model whose behaviour under masks is made up, for commands that measure it."""

from collections.abc import Callable

import numpy as np

from retmask_jax.stages import outcomes


def make_up(monkeypatch, ablated: Callable, is_lost: Callable) -> None:
    """Cases are answered unless is_lost(the heads ablated [L,H]), and each ablated head costs text. ablated: of a mask."""

    def answers(lm, cases, masks, **_):
        lost = [is_lost(ablated(mask)) for mask in masks]
        return [["" if gone else case.needle.answer for case in cases] for gone in lost]

    def losses(lm, windows, masks, **_):
        return np.array([[2 + 0.01 * ablated(mask).sum()] * len(windows) for mask in masks])

    monkeypatch.setattr(outcomes, "answers", answers)
    monkeypatch.setattr(outcomes, "losses_under", losses)
