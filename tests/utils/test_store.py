"""Record shards: nothing that was added is lost or doubled, whenever the process is killed."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from retmask_jax.utils.store import Records

WRITER = """
import sys
from retmask_jax.utils.store import Records

with Records(sys.argv[1]) as records:
    for i in range(int(sys.argv[2])):
        if (i, "x") not in records:
            records.add({"key": [i, "x"], "text": str(i) * (i % 700)})
            print(i, flush=True)
"""


def _record(i):
    return {"key": [i, "x"], "text": str(i) * (i % 700)}


def test_killed_at_random_nothing_added_is_lost_or_doubled(tmp_path):
    rng, size, added = random.Random(0), 20_000, []
    for delay in (0.05, 0.15, 0.1, None):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(size)], stdout=subprocess.PIPE)
        if delay is not None:
            added.append(process.stdout.readline())  # the writer is at work
            time.sleep(delay * rng.random())
            process.send_signal(signal.SIGKILL)
        added += process.communicate()[0].splitlines(keepends=True)
        assert process.returncode == (0 if delay is None else -signal.SIGKILL)
        records = Records(tmp_path)
        # A number may be printed in part; whoever was told that a record was added finds it.
        assert all((int(line), "x") in records for line in added if line.endswith(b"\n"))
        assert all(records[key] == _record(key[0]) for key in records)
    assert sorted(records) == [(i, "x") for i in range(size)]
    lines = [line for shard in tmp_path.iterdir() for line in shard.read_bytes().splitlines(keepends=True)]
    assert sum(line.endswith(b"\n") for line in lines) == size
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "torn", [b'{"key": [2, "x"], "te', b'{"key": [2, "x"], "text": ""}', b"\0\0\0\n", b"\n", b"7\n"]
)
def test_a_torn_last_line_is_dropped_and_never_continued(tmp_path, torn):
    with Records(tmp_path) as records:
        records.add(_record(1))
    with open(tmp_path / "000000.jsonl", "ab") as shard:
        shard.write(torn)
    with Records(tmp_path) as records:
        assert list(records) == [(1, "x")]
        records.add(_record(2))
        assert records[2, "x"] == _record(2)
    assert {key: Records(tmp_path)[key] for key in Records(tmp_path)} == {(i, "x"): _record(i) for i in (1, 2)}


def test_damage_before_the_last_line_is_named(tmp_path):
    (tmp_path / "000000.jsonl").write_text('{"key": [1]}\n{"key"\n{"key": [2]}\n')
    with pytest.raises(ValueError, match=r"000000.jsonl, line 2: not a record .*: delete the line or the file"):
        Records(tmp_path)


def test_a_key_is_stored_once(tmp_path):
    with Records(tmp_path) as records:
        records.add(_record(5))
        with pytest.raises(ValueError, match=r"key \[5, 'x'\] is stored"):
            records.add(_record(5))
    # Shards copied together from two machines may overlap.
    (tmp_path / "000001.jsonl").write_text(json.dumps({"key": [5, "x"], "text": "other"}) + "\n")
    both = Records(tmp_path)
    assert (len(both), both[5, "x"]) == (1, _record(5))


def test_nothing_is_written_before_the_first_record(tmp_path):
    with Records(tmp_path / "new") as records:
        assert len(records) == 0
    assert list((tmp_path / "new").iterdir()) == []
