"""Preference pairs as token rows: what the loss counts, what is kept on disk, and the order and widths of batches."""

import collections
import dataclasses

import numpy as np
import pytest
from helpers_tiny import copying_lm

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.preferences import PairRows, batches, encode_pairs, kept_rows, parts, widths
from retmask_jax.end_tokens import Ends
from retmask_jax.haystack import Prompter

PROMPTER = Prompter(copying_lm().tokenizer)


def _record(prompt, chosen, rejected, finished=(True, True)):
    return {
        "id": prompt, "messages": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected,
        "chosen_finished": finished[0], "rejected_finished": finished[1],
    }  # fmt: skip


def _encode(records, max_tokens=40, max_prompt_tokens=20):
    return encode_pairs(PROMPTER, records, ends=Ends(tl.EOS), max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens)


def _split(rows, side, i, width=40):
    """(words before the answer, words the loss counts, words behind) of one side of pair i."""
    padded = rows.padded([i], width, tl.EOS)
    tokens, mask = padded[side][0], padded[f"{side}_mask"][0]
    at = np.flatnonzero(mask)
    words = [tl.VOCABULARY[token] for token in tokens]
    assert mask[at[0] : at[-1] + 1].all()
    return " ".join(words[: at[0]]), " ".join(words[at[0] : at[-1] + 1]), set(words[at[-1] + 1 :])


def _of_lengths(lengths):
    """Pairs of these lengths, one token of which is the prompt and the rest the chosen answer."""
    lengths = np.array(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    bounds = np.stack([starts, starts + 1, starts + lengths, starts + lengths + 1], axis=1)
    return PairRows([str(i) for i in range(len(lengths))], np.zeros(lengths.sum() + len(lengths), np.int32), bounds)


# --- token rows ---


def test_loss_counts_exactly_the_answer_and_its_end():
    rows = _encode([
        _record("the home of anna", "oslo", "fig elm oak", finished=(True, False)),
        _record("every duke slept again near the lamp", "rome paris", "lima", finished=(False, True)),
    ])  # fmt: skip
    assert _split(rows, "chosen", 0) == ("<bos> the home of anna :", "oslo <eos>", {"<eos>"})
    assert _split(rows, "rejected", 0) == ("<bos> the home of anna :", "fig elm oak", {"<eos>"})
    assert _split(rows, "chosen", 1)[:2] == ("<bos> every duke slept again near the lamp :", "rome paris")
    assert _split(rows, "rejected", 1)[:2] == ("<bos> every duke slept again near the lamp :", "lima <eos>")
    assert (rows.cut, rows.prompts_cut, len(rows)) == (0, 0, 2)
    assert rows.ids == ["the home of anna", "every duke slept again near the lamp"]
    assert rows.lengths.tolist() == [9, 11]


def test_long_prompts_keep_their_end():
    rows = _encode([_record("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=3)
    assert _split(rows, "chosen", 0)[0] == "bean birch :"
    assert rows.prompts_cut == 1
    exact = _encode([_record("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=7)
    assert _split(exact, "chosen", 0)[0] == "<bos> amber apple ash bean birch :"
    assert exact.prompts_cut == 0


def test_long_answers_are_cut_and_have_no_end():
    records = [
        _record("anna", "fig elm oak ash", "fig elm oak"),  # 3 tokens of prompt
        _record("anna", "fig elm oak ash yew plum", "fig"),
    ]
    rows = _encode(records, max_tokens=7)
    assert _split(rows, "chosen", 0)[1] == "fig elm oak ash"  # 4 answer tokens fit, the end does not
    assert _split(rows, "rejected", 0)[1] == "fig elm oak <eos>"
    assert _split(rows, "chosen", 1)[1] == "fig elm oak ash"
    assert rows.cut == 2
    assert rows.lengths.max() == 7


def test_rows_are_kept_and_read_from_the_file(tmp_path):
    records = [_record(f"the home of {name}", "oslo", "rome paris") for name in ("anna", "carl", "emil")]
    identity = {"data": "a", "tokenizer": PROMPTER.identity()}
    first = kept_rows(tmp_path, identity, lambda: _encode(records))
    again = kept_rows(tmp_path, identity, lambda: pytest.fail("encoded twice"))
    assert isinstance(again.flat, np.memmap)
    for rows in (first, again):
        np.testing.assert_array_equal(rows.flat, _encode(records).flat)
        np.testing.assert_array_equal(rows.bounds, _encode(records).bounds)
        assert rows.ids == [record["id"] for record in records]


def test_rows_of_another_tokenizer_or_template_are_refused(tmp_path):
    identity = {"data": "a", "tokenizer": PROMPTER.identity()}
    kept_rows(tmp_path, identity, lambda: _encode([_record("anna", "oslo", "rome")]))
    other = dataclasses.replace(PROMPTER, chat=False).identity()
    assert other != PROMPTER.identity() == Prompter(copying_lm().tokenizer).identity()
    message = f"{tmp_path} was made with another tokenizer {PROMPTER.identity()}, now {other}: delete it"
    with pytest.raises(ValueError, match=message):
        kept_rows(tmp_path, identity | {"tokenizer": other}, lambda: pytest.fail("encoded"))


# --- batches ---


def _order(n, batch, seed, steps):
    loader = batches(n, batch, seed)
    return [next(loader).tolist() for _ in range(steps)]


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (5, 5)])
def test_every_pair_comes_once_an_epoch_and_epochs_differ(size, batch):
    order = [pair for pairs in _order(size, batch, 0, -(-3 * size // batch)) for pair in pairs]
    epochs = [order[i * size : (i + 1) * size] for i in range(3)]
    assert all(collections.Counter(epoch) == collections.Counter(range(size)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert list(range(size)) not in epochs


def test_the_iterator_goes_on_from_its_state():
    walked = _order(12, 4, 3, 9)
    loader = batches(12, 4, 3)
    for _ in range(5):
        next(loader)
    resumed = batches(12, 4, 3)
    resumed.set_state(loader.get_state())
    assert [next(resumed).tolist() for _ in range(4)] == walked[5:]
    assert _order(12, 4, 4, 9) != walked


def test_too_few_pairs_raise():
    with pytest.raises(ValueError, match="3 pairs are fewer than a batch of 4: add prompts or lower train.batch_size"):
        batches(3, 4, seed=0)


def test_parts_hold_similar_lengths_and_are_no_wider_than_they_must_be():
    rows = _of_lengths([600, 40, 64, 65, 300, 1000, 128, 257])
    allowed = widths(rows, 4, most=4096)
    assert allowed == [256, 512, 768, 1024]
    pairs = np.array([7, 0, 1, 2, 4, 5])
    found = list(parts(rows, pairs, 2, allowed))
    assert [part.pairs.tolist() for part in found] == [[5, 0], [4, 7], [2, 1]]
    assert [part.width for part in found] == [1024, 512, 256]
    assert [part.pairs.tolist() for part in parts(rows, pairs[:3], 2, allowed)] == [[0, 7], [1, 1]]


@pytest.mark.parametrize(("lengths", "n", "most", "expected"), [
    ([10], 4, 4096, [64]), ([1000], 1, 4096, [1024]), ([1000], 4, 1000, [256, 512, 768, 1000]), ([130], 2, 512, [128, 192]),
])  # fmt: skip
def test_widths_are_few_and_within_the_models_context(lengths, n, most, expected):
    assert widths(_of_lengths(lengths), n, most) == expected
