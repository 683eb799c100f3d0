"""The store: nothing that was added is lost or doubled, whenever the process is killed, and no other input is read."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from retmask_jax.utils import store as store_module
from retmask_jax.utils.store import Store

WRITER = """
import sys
from retmask_jax.utils.store import Store

with Store(sys.argv[1]) as store:
    for i in range(int(sys.argv[2])):
        if (i, "x") not in store:
            store.add((i, "x"), {"text": str(i) * (i % 233)})
            print(i, flush=True)
"""


def _value(i):
    return {"text": str(i) * (i % 233)}


def test_killed_at_random_nothing_added_is_lost_or_doubled(tmp_path):
    rng, size, added = random.Random(0), 60_000, []
    for delay in (0.05, 0.15, 0.1, None):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(size)], stdout=subprocess.PIPE)
        if delay is not None:
            added.append(process.stdout.readline())  # the writer is at work
            time.sleep(delay * rng.random())
            process.send_signal(signal.SIGKILL)
        added += process.communicate()[0].splitlines(keepends=True)
        assert process.returncode == (0 if delay is None else -signal.SIGKILL)
        store = Store(tmp_path)
        # A number may be printed in part; whoever was told that a value was added finds it.
        assert all((int(line), "x") in store for line in added if line.endswith(b"\n"))
        assert all(store[key] == _value(key[0]) for key in store)
    assert sorted(store) == [(i, "x") for i in range(size)]
    lines = [line for shard in tmp_path.iterdir() for line in shard.read_bytes().splitlines(keepends=True)]
    assert sum(line.endswith(b"\n") for line in lines) == size
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "torn", [b'{"key": [2, "x"], "va', b'{"key": [2, "x"], "value": ""}', b"\0\0\0\n", b"\n", b"7\n"]
)
def test_a_torn_last_line_is_dropped_and_never_continued(tmp_path, torn):
    with Store(tmp_path) as store:
        store.add((1, "x"), _value(1))
    with open(tmp_path / "000000.jsonl", "ab") as shard:
        shard.write(torn)
    with Store(tmp_path) as store:
        assert list(store) == [(1, "x")]
        store.add((2, "x"), _value(2))
        assert store[2, "x"] == _value(2)
    again = Store(tmp_path)
    assert {key: again[key] for key in again} == {(i, "x"): _value(i) for i in (1, 2)}


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / "000000.jsonl").write_text('{"key": [1]}\n{"key"\n{"key": [2]}\n')
    with pytest.raises(ValueError, match=r"000000.jsonl, line 2: not a record .*: delete the line or the file"):
        Store(tmp_path)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_first_value_of_a_key_stays(tmp_path, on_disk):
    with Store(tmp_path if on_disk else None) as store:
        store.add((5, "x"), _value(5))
        store.add((5, "x"), "other")
        assert list(store) == [(5, "x")] and store[5, "x"] == _value(5)
        with pytest.raises(KeyError):
            store[6, "x"]


def test_shards_that_were_copied_together_may_overlap(tmp_path):
    with Store(tmp_path) as store:
        store.add((5, "x"), _value(5))
    (tmp_path / "000001.jsonl").write_text(json.dumps({"key": [5, "x"], "value": "other"}) + "\n")
    both = Store(tmp_path)
    assert list(both) == [(5, "x")] and both[5, "x"] == _value(5)


def test_answers_as_they_were_once_stored_are_read(tmp_path):
    (tmp_path / "000000.jsonl").write_text('{"key": [0, "normal", "p1"], "text": "oslo", "finished": true}\n')
    with Store(tmp_path) as store:
        assert store[0, "normal", "p1"] == {"text": "oslo", "finished": True}


def test_nothing_is_written_before_the_first_value(tmp_path):
    with Store(tmp_path / "new", {"data": "a"}) as store:
        assert list(store) == []
    assert list((tmp_path / "new").iterdir()) == []


def test_what_was_made_from_something_else_is_refused_in_one_line(tmp_path):
    with Store(tmp_path, {"data": "a", "model": "m"}) as store:
        store.add((1,), 1)
    for same in ({"data": "a", "model": "m"}, {"data": "a"}, None):
        assert Store(tmp_path, same)[1,] == 1
    message = f"{tmp_path} was made with another data a, now b: delete it or move it away to make it again"
    with pytest.raises(ValueError, match=message):
        Store(tmp_path, {"data": "b", "model": "m"})
    with Store(tmp_path / "unknown") as store:
        store.add((1,), 1)
    with pytest.raises(ValueError, match="another data None, now a: delete it"):
        Store(tmp_path / "unknown", {"data": "a"})


def test_other_hosts_hold_what_the_first_one_writes(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        store.add((1,), "one")
    monkeypatch.setattr(store_module, "primary", lambda: False)
    waits = []
    monkeypatch.setattr(store_module, "wait_for_all", waits.append)
    with Store(tmp_path) as store:
        store.add((2,), "two")
        assert (store[1,], store[2,], list(store)) == ("one", "two", [(1,), (2,)])
    assert len(waits) == 2 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), Store(tmp_path):
        raise KeyboardInterrupt  # a host that fails waits for no other
    assert len(waits) == 3
