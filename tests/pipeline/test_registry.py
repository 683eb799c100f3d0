"""What a stage reads of the config is what its result is judged by; what needs no weights loads none."""

import fnmatch
import functools
import json
import shutil
from pathlib import Path

import pytest

from retmask_jax.pipeline import registry
from retmask_jax.runs.context import Context
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.stage import Stage
from retmask_jax.runs.workdir import Result, Workdir, settings_of

CONFIG = str(Path(__file__).parents[1] / "tiny_small.py")
# Keys whose values reach a stage's result by another way: which files are read is told by their fingerprints, and a
# check that there are enough prompts for a batch changes no answer.
ELSEWHERE = """model revision seed pairs.prompts pairs.prompts_split eval.models.* suites.* train.batch_size
    dynamics.checkpoints pairs.endpoints.*""".split()


class Watched:
    """A config that notes the keys whose values are asked for."""

    def __init__(self, node, seen: set[str], path: str = ""):
        self.__dict__.update(_node=node, _seen=seen, _path=path)

    def _of(self, name):
        path, value = f"{self._path}{name}", self._node[name]
        if hasattr(value, "items"):
            return Watched(value, self._seen, f"{path}.")
        self._seen.add(path)
        return value

    def _all(self):
        self._seen.update(f"{self._path}{key}" for key in settings_of(json.loads(self._node.to_json_best_effort())))

    __getitem__ = __getattr__ = _of

    def __iter__(self):
        return iter(self._node)

    def __contains__(self, name):
        return name in self._node

    def __bool__(self):
        return bool(self._node)

    def keys(self):
        return self._node.keys()

    def items(self):
        return [(name, self._of(name)) for name in self._node]

    def values(self):
        return [self._of(name) for name in self._node]

    def get(self, name, default=None):
        return self._of(name) if name in self._node else default

    def to_dict(self):
        self._all()
        return self._node.to_dict()


def _undeclared(root, names, *overrides):
    """{stage: keys it reads whose values its result is not judged by}"""
    config, seen, found = load_recipe(CONFIG, overrides), set(), {}
    context = Context(Watched(config, seen), Workdir.open(root, config))
    for name in names:
        stage = registry.STAGES[name]
        basis = registry.basis(context, stage)
        seen.clear()
        context.workdir.run(name, basis, functools.partial(stage.work, context), {"seed": 0})
        counted = settings_of(context.workdir.config)
        found[name] = {
            key
            for key in seen & counted.keys() - basis.settings.keys()
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ELSEWHERE)
        }
    return found


def test_a_deleted_stage_runs_again_with_what_depends_on_it(tmp_path):
    ran = []

    def stage(name, *upstream):
        def work(context, folder):
            ran.append(name)
            return Result(numbers={})

        return Stage(name=name, work=work, result=Result, upstream=upstream, needs_model=False)

    first = stage("first")
    second, other = stage("second", first), stage("other", first)
    stages = (first, second, other, stage("last", second))
    config = load_recipe("tiny", [])
    context = Context(config, Workdir.open(tmp_path / "work", config))
    for _ in range(2):
        for one in stages:
            registry.run_stage(context, one)
    assert ran == ["first", "second", "other", "last"]
    shutil.rmtree(tmp_path / "work/second")
    for one in stages:
        registry.run_stage(context, one)
    assert ran[4:] == ["second", "last"]


def test_detection_is_judged_by_all_it_reads(tmp_path):
    small = ("tasks.detect.per_length", "4"), ("batch_size", "4")
    assert _undeclared(tmp_path, ["detect"], *small) == {"detect": set()}


@pytest.mark.slow
def test_every_stage_is_judged_by_all_it_reads(tmp_path):
    names = list(dict.fromkeys(stage.name for stage in (*registry.RUN, *registry.STUDIED)))
    settings = (
        ("dynamics.checkpoints", "('bundled',)"),
        ("rope.text", "True"),
        ("rope.matched", "1"),
        ("knockout.curve", "(2,)"),
    )
    assert _undeclared(tmp_path, names, *settings[1:]) == {name: set() for name in names}
