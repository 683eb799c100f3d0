"""The `retmask` command: parses, dispatches, nothing else."""

import argparse
import errno
import sys
import time
from pathlib import Path

from retmask_jax.cli.parser import TOOLS, name_of_results, parse, recipe_of
from retmask_jax.utils.hosts import primary

# What the system reports of a disk that is full, or that may not be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 where a benchmark's results disagree, a training step does not fit a
    topology or `doctor` finds that nothing works, 2 after one line about a user's mistake, or 143 after SIGTERM and a
    checkpoint."""
    try:
        arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
        if arguments.stage not in TOOLS:
            return _run(arguments, overrides)
        if overrides:
            raise ValueError(f"{arguments.stage} reads no config: --config.{overrides[0][0]} does not apply")
        return _use(arguments)
    except ValueError as error:
        print(f"retmask: {error}", file=sys.stderr)
        return 2
    except InterruptedError as error:
        print(f"retmask: {error}; run the same command again to go on", file=sys.stderr)
        return 143
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"retmask: {where}{error.strerror}: make room, or choose another --workdir; what was written before is whole, "
            "and the same command goes on from there",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("retmask: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _use(arguments: argparse.Namespace) -> int:
    """Run a tool, which reads no config; returns the exit status."""
    from retmask_jax.cli import commands

    match arguments.stage:
        case "doctor":
            return 0 if commands.examine(arguments.workdir, arguments.json) else 1
        case "bench":
            own = ("stage", "benchmark", "out")
            options = {name: value for name, value in vars(arguments).items() if name not in own}
            return 0 if commands.bench(arguments.benchmark, arguments.out, options) else 1
        case "inspect":
            commands.inspect(arguments.model, arguments.json, arguments.ignore)
        case "profile":
            commands.profile(arguments.sources, arguments.kv_heads, arguments.threshold, arguments.gain, arguments.out)
        case "panel":
            closed_book = arguments.closed_book or None
            commands.panel(arguments.sources, arguments.task, closed_book, arguments.gain, arguments.out)
        case "diff":
            own = ("stage", "start", "trained", "out")
            settings = {name: value for name, value in vars(arguments).items() if name not in own}
            commands.diff(arguments.start, arguments.trained, settings, arguments.out)
        case "look":
            from retmask_jax.cli import looking

            looking.look(arguments)
    return 0


def _run(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """Run what a config says; returns the exit status."""
    from retmask_jax.runs import recipes

    if arguments.stage == "eval":
        overrides = overrides + _settings_of_eval(arguments)
    if getattr(arguments, "files", None):
        overrides = [*overrides, (f"{arguments.stage}.files", repr(tuple(arguments.files)))]
    name, overrides = recipe_of(arguments, overrides)
    config = recipes.load_recipe(name, overrides)
    root = Path(arguments.workdir or Path("runs") / name_of_results(arguments, name))
    # Only now, since these import jax, which takes seconds.
    from retmask_jax.cli import commands

    begin = time.time()
    if getattr(arguments, "aot", None) is not None:
        return 0 if commands.ahead(config, name, arguments.aot, arguments.stage) else 1
    if getattr(arguments, "plan", False):
        commands.plan(config, root, arguments.stage, arguments.set_aside)
        return 0
    match arguments.stage:
        case "pretrain":
            commands.pretrain(config, root)
        case "export":
            what, target = (arguments.what, arguments.heads, arguments.format), (Path(arguments.out), arguments.push)
            commands.export(config, root, *what, *target, arguments.scores)
        case "run":
            commands.run(config, root, arguments.set_aside)
        case "study":
            commands.study(config, root, arguments.set_aside)
        case stage:
            name = "compare" if getattr(arguments, "compare", None) else stage
            commands.one_stage(config, root, name, arguments.set_aside)
    if primary():
        print(f"{arguments.stage}: {time.time() - begin:.0f} s")
    return 0


def _settings_of_eval(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The flags of `eval` as settings of the config."""
    names = [name for name, _ in arguments.compare]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--compare names {name!r} {names.count(name)} times: give each model another name")
    asked = [("eval.models", repr(dict(arguments.compare)))] if names else []
    if arguments.lm_eval:
        asked.append(("suites.lm_eval.tasks", repr(tuple(arguments.lm_eval.split(",")))))
    if arguments.helmet:
        asked.append(("suites.helmet.path", arguments.helmet))
    return asked


if __name__ == "__main__":
    sys.exit(main())
