"""Preference pairs as token rows: what the loss counts, what is kept on disk, and the order and widths of batches."""

import collections
import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_rows import OPTIONS, PROMPTER, encode_pairs, many_records, record_of
from helpers_tiny import copying_lm

from retmask_jax.data import pair_rows
from retmask_jax.data import tiny_language as tl
from retmask_jax.data.pair_formats import SIDES
from retmask_jax.data.pair_rows import batches, encode_blocks, kept_rows, parts, widths
from retmask_jax.data.prompter import Prompter
from retmask_jax.hf.end_tokens import Ends
from retmask_jax.utils import hosts


def _encode(records, max_tokens=40, max_prompt_tokens=20):
    return encode_pairs(
        PROMPTER, records, ends=Ends(tl.EOS), max_tokens=max_tokens, max_prompt_tokens=max_prompt_tokens
    )


def _split(rows, side, i, width=40):
    """(the prompt's words, words the loss counts, words behind) of one side of pair i, the same in both forms."""
    apart = {name: array[0] for name, array in rows.forked([i], (width, width), tl.EOS).items()}
    prompt, behind = np.split(apart["prompts"], [apart["lengths"]])
    tokens, counted = (apart[name][SIDES.index(side)] for name in ("answers", "counted"))
    words, n = [tl.VOCABULARY[token] for token in tokens], int(counted.sum())
    assert counted[:n].all() and set(behind) <= {tl.EOS}
    if side == "chosen":
        row = {name: array[0] for name, array in rows.chosen([i], (2 * width,), tl.EOS).items()}
        np.testing.assert_array_equal(row["tokens"][: len(prompt) + width], [*prompt, *tokens])
        np.testing.assert_array_equal(np.flatnonzero(row["counted"]), len(prompt) + np.arange(n))
    return " ".join(tl.VOCABULARY[token] for token in prompt), " ".join(words[:n]), set(words[n:])


# --- token rows ---


def test_loss_counts_exactly_the_answer_and_its_end():
    rows = _encode(
        [
            record_of("the home of anna", "oslo", "fig elm oak", finished=(True, False)),
            record_of("every duke slept again near the lamp", "rome paris", "lima", finished=(False, True)),
        ]
    )
    assert _split(rows, "chosen", 0) == ("<bos> the home of anna :", "oslo <eos>", {"<eos>"})
    assert _split(rows, "rejected", 0) == ("<bos> the home of anna :", "fig elm oak", {"<eos>"})
    assert _split(rows, "chosen", 1)[:2] == ("<bos> every duke slept again near the lamp :", "rome paris")
    assert _split(rows, "rejected", 1)[:2] == ("<bos> every duke slept again near the lamp :", "lima <eos>")
    assert (rows.cut, rows.prompts_cut, len(rows)) == (0, 0, 2)
    assert rows.ids == ["the home of anna", "every duke slept again near the lamp"]
    assert rows.lengths.tolist() == [9, 11] and rows.sizes.tolist() == [[6, 3], [9, 2]]
    assert rows.forked([1, 0], (9, 3), tl.EOS)["longest"].tolist() == [64, 64]


def test_a_prompt_without_tokens_is_refused():
    silent = SimpleNamespace(render_messages=str, encode_many=lambda texts: [[]], tokenizer=PROMPTER.tokenizer)
    with pytest.raises(ValueError, match="the prompt of pair p has no tokens: leave the pair out"):
        encode_pairs(silent, [record_of("p", "oslo", "rome")], **OPTIONS)


def test_long_prompts_keep_their_end():
    rows = _encode([record_of("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=3)
    assert _split(rows, "chosen", 0)[0] == "bean birch :"
    assert rows.prompts_cut == 1
    exact = _encode([record_of("amber apple ash bean birch", "oslo", "rome")], max_prompt_tokens=7)
    assert _split(exact, "chosen", 0)[0] == "<bos> amber apple ash bean birch :"
    assert exact.prompts_cut == 0


def test_long_answers_are_cut_and_have_no_end():
    records = [
        record_of("anna", "fig elm oak ash", "fig elm oak"),  # 3 tokens of prompt
        record_of("anna", "fig elm oak ash yew plum", "fig"),
    ]
    rows = _encode(records, max_tokens=7)
    assert _split(rows, "chosen", 0)[1] == "fig elm oak ash"  # 4 answer tokens fit, the end does not
    assert _split(rows, "rejected", 0)[1] == "fig elm oak <eos>"
    assert _split(rows, "chosen", 1)[1] == "fig elm oak ash"
    assert rows.cut == 2
    assert rows.lengths.max() == 7


def test_rows_are_kept_and_read_from_the_file(tmp_path):
    records = [record_of(f"the home of {name}", "oslo", "rome paris") for name in ("anna", "carl", "emil")]
    identity = {"data": "a", "tokenizer": PROMPTER.identity()}
    first = kept_rows(tmp_path, identity, lambda: [_encode(records)])
    again = kept_rows(tmp_path, identity, lambda: pytest.fail("encoded twice"))
    assert isinstance(again.flat, np.memmap)
    for rows in (first, again):
        np.testing.assert_array_equal(rows.flat, _encode(records).flat)
        np.testing.assert_array_equal(rows.bounds, _encode(records).bounds)
        assert list(rows.ids) == [record["id"] for record in records]


def test_rows_of_another_tokenizer_or_template_are_refused(tmp_path):
    identity = {"data": "a", "tokenizer": PROMPTER.identity()}
    kept_rows(tmp_path, identity, lambda: [_encode([record_of("anna", "oslo", "rome")])])
    other = dataclasses.replace(PROMPTER, chat=False).identity()
    assert other != PROMPTER.identity() == Prompter(copying_lm().tokenizer).identity()
    message = f"{tmp_path} was made with another tokenizer {PROMPTER.identity()}, now {other}: delete it"
    with pytest.raises(ValueError, match=message):
        kept_rows(tmp_path, identity | {"tokenizer": other}, lambda: pytest.fail("encoded"))


# --- rows of many pairs ---


def _same(one, other):
    for name in ("flat", "bounds"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (list(one.ids), one.cut, one.prompts_cut) == (list(other.ids), other.cut, other.prompts_cut)


@pytest.mark.parametrize("records, characters", [(1, 10**6), (4, 10**6), (1000, 10**6), (1000, 9)])
def test_rows_are_the_same_whatever_the_blocks(tmp_path, monkeypatch, records, characters):
    pairs = many_records(23)
    whole = _encode(pairs)
    assert whole.cut == 0 and whole.flat.dtype == np.int32 and len(whole) == 23
    monkeypatch.setattr(pair_rows, "_RECORDS", records)
    monkeypatch.setattr(pair_rows, "_CHARACTERS", characters)
    blocks = list(encode_blocks(PROMPTER, iter(pairs), **OPTIONS))
    assert (len(blocks) == 1) == (records == 1000 and characters > 9)
    _same(_encode(iter(pairs)), whole)
    _same(kept_rows(tmp_path, {}, lambda: encode_blocks(PROMPTER, iter(pairs), **OPTIONS)), whole)
    _same(kept_rows(tmp_path / "none", {}, lambda: []), _encode([]))


def test_one_block_of_records_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_rows, "_RECORDS", 8)

    class Record(dict):
        pass

    alive, most = weakref.WeakValueDictionary(), []

    def read():
        for i, record in enumerate(many_records(100)):
            record = alive[i] = Record(record)
            most.append(len(alive))
            yield record

    rows = kept_rows(tmp_path, {}, lambda: encode_blocks(PROMPTER, read(), **OPTIONS))
    assert len(rows) == 100 and max(most) <= 8 + 2  # the one that is being read, and the last one that was


def test_an_encoding_that_was_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_rows, "_RECORDS", 4)

    def torn():
        yield from many_records(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_rows(tmp_path, {}, lambda: encode_blocks(PROMPTER, torn(), **OPTIONS))
    assert any(path.stat().st_size for path in tmp_path.iterdir()), "something had been written"
    assert not (tmp_path / "rows.json").exists()
    fewer = many_records(9)
    _same(kept_rows(tmp_path, {}, lambda: encode_blocks(PROMPTER, fewer, **OPTIONS)), _encode(fewer))
    (tmp_path / "flat.bin").write_bytes(b"torn")
    with pytest.raises(ValueError, match="flat.bin has 4 bytes, its rows.json says [0-9]+: delete"):
        kept_rows(tmp_path, {}, lambda: pytest.fail("encoded"))


def test_only_the_first_host_encodes_and_what_goes_wrong_there_is_raised(tmp_path, monkeypatch):
    kept_rows(tmp_path / "rows", {}, lambda: [_encode(many_records(5))])
    monkeypatch.setattr(hosts, "primary", lambda: False)
    _same(kept_rows(tmp_path / "rows", {}, lambda: pytest.fail("encoded")), _encode(many_records(5)))
    monkeypatch.setattr(hosts, "_from_first", lambda text: text or hosts._FAILED + "no room")
    with pytest.raises(ValueError, match="no room"):
        kept_rows(tmp_path / "others", {}, lambda: pytest.fail("encoded"))


TWO_HOSTS = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
from helpers_rows import OPTIONS, PROMPTER, many_records
from retmask_jax.data.pair_rows import encode_blocks, kept_rows

def blocks():
    assert jax.process_index() == 0, "the second host encodes"
    return encode_blocks(PROMPTER, many_records(50), **OPTIONS)

def fails():
    raise ValueError("a template refuses this")

rows = kept_rows(Path(sys.argv[4]) / "rows", {}, blocks)
assert len(rows) == 50
try:
    kept_rows(Path(sys.argv[4]) / "failed", {}, fails)
except ValueError as error:
    print(len(rows), int(rows.flat.sum()), error)
"""


@pytest.mark.slow
def test_of_two_hosts_one_encodes_and_both_read_or_fail(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO_HOSTS, str(port)]
    started = [
        subprocess.Popen(
            [*command, str(host), str(Path(__file__).parents[1]), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for host in range(2)
    ]
    printed = [process.communicate(timeout=300)[0].splitlines()[-1] for process in started]
    assert printed == [f"50 {_encode(many_records(50)).flat.sum()} a template refuses this"] * 2


MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers_rows import OPTIONS, PROMPTER, record_of
from retmask_jax.data.pair_rows import encode_blocks, kept_rows
from retmask_jax.utils.files import iter_jsonl

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, n = Path(sys.argv[2]), int(sys.argv[3])
text = "fig elm oak ash yew plum rome paris lima oslo " * 2

def records(n):
    for i in range(n):
        yield record_of(f"p{i}", text, text) | {"messages": [{"role": "user", "content": text}]}

options = OPTIONS | {"max_tokens": 200, "max_prompt_tokens": 100}
kept_rows(folder / "few", {}, lambda: encode_blocks(PROMPTER, records(2000), **options))
before = peak()
rows = kept_rows(folder / "many", {}, lambda: encode_blocks(PROMPTER, records(n), **options))
print(json.dumps({"pairs": len(rows), "tokens": len(rows.flat), "extra": peak() - before, "before": before}))
"""


@pytest.mark.slow
def test_300_000_short_pairs_take_little_memory(tmp_path):
    """19 million tokens, 77 MB in the files; as lists of records and of Python ints they took 820 MB.

    The baseline has encoded 2,000 pairs, two blocks, and nothing that is kept grows with their number: it was 2 MB. The bound
    leaves room for an allocator's slack, not for one copy of tokens and records.
    """
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parents[1]), str(tmp_path), "300000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pairs"] == 300_000 and found["tokens"] == 300_000 * (22 + 2 * 21)
    assert found["extra"] < 120, found


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
    lengths_N1 = np.array([600, 40, 64, 65, 300, 1000, 128, 257])[:, None]
    allowed = widths(lengths_N1, 4, most=4096)
    assert allowed == ([256, 512, 768, 1024],)
    pairs = np.array([7, 0, 1, 2, 4, 5])
    found = list(parts(lengths_N1, pairs, 2, allowed))
    assert [part.pairs.tolist() for part in found] == [[5, 0], [4, 7], [2, 1]]
    assert [part.widths for part in found] == [(1024,), (512,), (256,)]
    assert [part.pairs.tolist() for part in parts(lengths_N1, pairs[:3], 2, allowed)] == [[0, 7], [1, 1]]


def test_parts_of_prompts_and_answers_hold_those_that_are_padded_alike():
    sizes_N2 = np.array([[500, 30], [70, 10], [512, 9], [64, 40], [10, 12], [400, 33]])
    found = list(parts(sizes_N2, np.arange(6), 2, ([128, 512], [16, 48])))
    assert [part.pairs.tolist() for part in found] == [[0, 5], [2, 3], [1, 4]]
    # The second holds a long prompt with short answers and a short one with long answers.
    assert [part.widths for part in found] == [(512, 48), (512, 48), (128, 16)]


@pytest.mark.parametrize(
    ("sizes", "n", "most", "expected"),
    [
        ([[10]], 4, 4096, ([64],)),
        ([[1000]], 1, 4096, ([1024],)),
        ([[990], [10]], 4, 1000, ([256, 512, 768, 1000],)),
        ([[130], [100]], 2, 512, ([128, 192],)),
        ([[1000, 20]], 4, 4096, ([1024], [32])),  # further widths would save nothing
        ([[1000, 20], [20, 20]], 4, 4096, ([256, 512, 768, 1024], [32])),
        ([[100, 200], [100, 20]], 4, 4096, ([128], [64, 112, 160, 208])),
        ([[1000, 200], [500, 20], [500, 200], [1000, 20]], 4, 4096, ([512, 1024], [112, 208])),
    ],
)
def test_widths_pad_least_among_grids_that_are_small_enough(sizes, n, most, expected):
    assert widths(np.array(sizes), n, most) == expected


def test_pairs_beyond_the_models_context_are_refused():
    with pytest.raises(ValueError, match="a pair has 70 tokens, the model's context is 64: lower train.max_tokens"):
        widths(np.array([[60, 10], [3, 3]]), 4, 64)
