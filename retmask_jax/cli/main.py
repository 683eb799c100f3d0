"""The `retmask` command: parses, dispatches, nothing else."""

import argparse
import difflib
import errno
import re
import sys
import time
from pathlib import Path

from retmask_jax import __version__
from retmask_jax.utils.hosts import primary

# Title -> stage -> what it does.
_GROUPS = {
    "the method": {
        "detect": "score heads by copying from needles, pick the retrieval heads",
        "knockout": "mask the retrieval heads and others, measure every task",
        "rope": "take rotary pairs out of the retrieval heads, by frequency",
        "pairs": "sample normal and ablated answers to unlabelled prompts",
        "train": "train with DPO to prefer the normal answers; the controls",
        "eval": "tasks and suites before and after; or compare models",
        "report": "write report.html from the results of all stages",
        "run": "all of these in order, each skipped where nothing changed",
    },
    "the causal study": {
        "detectors": "compare detectors: agreement, stability, speed, masked recall",
        "utility": "query norms of retrieval heads against others, by rotary pair",
        "theta": "change the RoPE base at inference: recall, and which heads",
        "dynamics": "detect heads in the checkpoints of a training run",
        "study": "detect, knockout, rope and these four in order; study.html",
    },
    "tools": {
        "doctor": "can this machine work? versions, devices, what to install",
        "inspect": "what a model is, by its config.json: layers, RoPE, memory, stop ids",
        "export": "write a masked or trained model for HF tools, or pairs",
        "profile": "retrieval heads of many models: how many, where, how sparse",
        "panel": "findings of several studies side by side, with intervals",
        "pretrain": "train a tiny model from its recipe, with its data files",
        "bench": "speed, memory and results against what others run",
    },
}
_STAGES = {name: text for stages in _GROUPS.values() for name, text in stages.items()}
_AHEAD = ("detect", "pairs", "train")  # stages that can be compiled for TPUs that are not here
# What the help of a stage shows; of one that is not here the general form is enough.
_EXAMPLES_OF = {
    "detect": (
        "retmask detect --config=tiny --config.detect.threshold=None --config.detect.top_k=8 --workdir=runs/top8",
        "retmask detect --config=qwen3_8b --config.detect.scores=published.json",
    ),
    "rope": (
        "retmask rope --config=tiny",
        "retmask rope --config=tiny_study --config.rope.windows=16 --workdir=runs/windows",
    ),
    "pairs": (
        "retmask pairs --config=llama3_1_8b --config.pairs.prompts=chats.jsonl.gz --workdir=runs/llama",
        "retmask pairs --config=llama3_1_8b --aot=v5e:4x4",
    ),
    "train": (
        "retmask train --config=llama3_1_8b --aot=v5e:4x4",
        "retmask train --config=tiny --config.train.loss=ipo --workdir=runs/ipo",
    ),
    "eval": (
        "retmask eval --config=tiny --compare mine=my_model --workdir=runs/compared",
        "retmask eval --config=llama3_1_8b --lm_eval=gsm8k,mmlu --helmet=../HELMET",
    ),
    "run": ("retmask run --config=tiny", "retmask run --config=llama3_1_8b --config.mesh.fsdp=8 --workdir=runs/llama"),
    "study": ("retmask study --config=tiny_study",),
    "pretrain": ("retmask pretrain --config=panel_qwen3 --config.pretrain.seed=1 --workdir=runs/panel_qwen3-1",),
    "export": (
        "retmask export --config=tiny --what=retmask-0 --out=my_model",
        "retmask export --config=tiny --heads 1-0 1-2 --out=masked",
    ),
    "doctor": ("retmask doctor", "retmask doctor --json"),
    "inspect": ("retmask inspect bundled", "retmask inspect Qwen/Qwen3-8B --json"),
    "profile": ("retmask profile runs/llama runs/qwen --out=profiles",),
    "panel": ("retmask panel runs/llama runs/qwen --out=panel",),
    "bench": ("retmask bench generate", "retmask bench dpo --size=30m --repeats=3"),
}

# Flags of each benchmark: what is compared, then name -> (default, help). None: depends on the size.
_BENCHMARKS = {
    "detect": (
        "the published detector on transformers",
        {
            "depths": (5, "depths of a needle"),
            "needles": (2, "needles put at each depth"),
            "max_new_tokens": (50, "tokens decoded per real case"),
        },
    ),
    "masks": (
        "masks by hooks on transformers",
        {"masks": (None, "number of masks"), "prompts": (None, "number of prompts")},
    ),
    "generate": (
        "transformers' generate",
        {"batch": (16, "number of prompts"), "new_tokens": (64, "tokens generated for each")},
    ),
    "dpo": (
        "TRL's DPOTrainer",
        {
            "pairs": (2, "pairs in a step"),
            "memory_length": (2048, "tokens of a row where memory is measured; 0: not"),
            "lora_rank": (0, "train adapters of this rank; no peer then; 0: all weights"),
        },
    ),
    "memory": ("our memory at one length and at twice it", {}),
}


# What a disk says that is full, or that may not be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 where a benchmark's results disagree, a training step does not fit a
    topology or `doctor` finds that nothing works, 2 after one line about a user's mistake, or 143 after SIGTERM and a
    checkpoint."""
    try:
        arguments, overrides = _parse(sys.argv[1:] if argv is None else argv)
        return _dispatch(arguments, overrides)
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


_EXAMPLES = """
examples:
  retmask doctor                                     can this machine work?
  retmask run --config=tiny                          the whole method on the bundled model
  retmask detect --config=tiny --config.detect.threshold=0.05 --workdir=runs/low
  retmask study --config=tiny_study                  detectors, knock-outs, rotary pairs
  retmask eval --config=tiny --compare mine=my_model --workdir=runs/compared
  retmask export --config=tiny --what=retmask-0 --out=my_model

exit status: 0 done; 1 a check failed (bench, doctor, --aot) or a bug; 2 a mistake in the call, told in
one line; 130 interrupted; 143 stopped by SIGTERM after a checkpoint: the same command goes on
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}{self._meant(message)} (`{self.prog} --help` lists what there is)")

    def _meant(self, message: str) -> str:
        """The stage that an unknown one is closest to."""
        unknown = re.search(r"invalid choice: '([^']*)'", message)
        close = (
            difflib.get_close_matches(unknown[1], re.findall(r"[\w-]+", message.split("choose from")[-1]))
            if unknown
            else []
        )
        return f"; did you mean {close[0]!r}?" if close else ""


def _grouped() -> str:
    """The stages under their titles, as argparse would list them."""
    return "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:<9}  {text}" for name, text in stages.items())
        for title, stages in _GROUPS.items()
    )


def _examples(name: str) -> str:
    lines = _EXAMPLES_OF.get(
        name, (f"retmask {name} --config=tiny", f"retmask {name} --config=FILE.py --workdir=FOLDER")
    )
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _parse(argv: list[str]):
    about = f"Find retrieval heads, mask them, train against the masked model.\n\n{_grouped()}"
    parser = _Parser(
        prog="retmask",
        usage="%(prog)s [-h] [--version] STAGE ...",
        description=about,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    stages = parser.add_subparsers(prog="retmask", dest="stage", metavar="STAGE", required=True, help=argparse.SUPPRESS)
    for name, text in _STAGES.items():
        stage = stages.add_parser(
            name,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            epilog=_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "doctor":
            stage.add_argument(
                "--workdir", type=Path, default=Path("runs"), help="where results would go (default: runs)"
            )
            stage.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
            continue
        if name == "inspect":
            stage.add_argument("model", metavar="MODEL", help='folder, hub id or "bundled"; no weights are read')
            stage.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
            continue
        if name == "profile":
            _add_profile(stage)
            continue
        if name == "panel":
            _add_panel(stage)
            continue
        if name == "bench":
            _add_benchmarks(stage)
            continue
        stage.epilog = f"Any key of the config can be set: --config.train.steps=10\n\n{_examples(name)}"
        stage.add_argument("--config", default="tiny", help="name of a recipe or path of a .py file (default: tiny)")
        stage.add_argument("--workdir", help="folder for all results (default: runs/NAME_OF_CONFIG)")
        if name not in ("pretrain", "export"):
            stage.add_argument(
                "--set-aside",
                action="store_true",
                help="where the work directory was made with other settings, keep what no longer fits under "
                "a new name and make it again",
            )
        if name in _AHEAD:
            stage.add_argument(
                "--aot", metavar="TOPOLOGY", help="only compile, for TPUs that need not be here (v5e:4x4): does it fit?"
            )
        if name == "eval":
            stage.add_argument(
                "--compare",
                nargs="+",
                action="extend",
                type=_named_model,
                default=[],
                metavar="NAME=MODEL",
                help="compare the config's model with others, folders or hub ids",
            )
            stage.add_argument("--lm_eval", metavar="TASK[,TASK...]", help="also tasks of lm-evaluation-harness")
            stage.add_argument("--helmet", metavar="FOLDER", help="also HELMET, by your checkout of it with its data")
        if name == "export":
            stage.add_argument(
                "--what",
                default="masked",
                help='"masked" (retrieval heads), a run such as retmask-0, or its pairs, pairs-retmask-0 (default: masked)',
            )
            stage.add_argument(
                "--format",
                choices=("released", "tfds"),
                default="released",
                help="of pairs: a JSONL file as RetMask and TRL read it, or a folder for TFDS (default: released)",
            )
            stage.add_argument(
                "--heads",
                nargs="+",
                action="extend",
                metavar="LAYER-HEAD",
                help="heads to mask instead of those detected",
            )
            stage.add_argument("--out", required=True, help="folder or file to write")
    arguments, rest = parser.parse_known_args(argv)
    flags = [flag for action in stages.choices[arguments.stage]._actions for flag in action.option_strings]
    return arguments, [_override(text, flags) for text in rest]


def _named_model(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FOLDER or NAME=HUB_ID")
    return name, source


def _asked_of_eval(arguments) -> list[tuple[str, str]]:
    """The flags of `eval` as settings of the config."""
    names = [name for name, _ in arguments.compare]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--compare names {name!r} {names.count(name)} times: give each model a name of its own")
    asked = [("eval.models", repr(dict(arguments.compare)))] if names else []
    if arguments.lm_eval:
        asked.append(("suites.lm_eval.tasks", repr(tuple(arguments.lm_eval.split(",")))))
    if arguments.helmet:
        asked.append(("suites.helmet.path", arguments.helmet))
    return asked


def _add_profile(stage) -> None:
    stage.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help='JSON file {"layer-head": [score, ...]}, or work directory in which detect has finished',
    )
    stage.add_argument(
        "--kv_heads",
        type=_whole_numbers,
        default=[],
        metavar="N[,N...]",
        help="key/value heads of the files' models, one number for all or one each",
    )
    stage.add_argument(
        "--threshold",
        type=float,
        help="score that a retrieval head reaches (default: 0.1; of a work directory its own)",
    )
    stage.add_argument(
        "--gain",
        metavar="NUMBER",
        help='change to show against sparsity, such as "eval/needle long/retmask minus start"',
    )
    stage.add_argument("--out", type=Path, help="folder for profile.json and the pictures, as PNG and SVG")


def _add_panel(stage) -> None:
    stage.add_argument("sources", nargs="+", type=Path, metavar="WORKDIR", help="work directory of a finished study")
    stage.add_argument("--task", default="needle short", help="recall task of the studies (default: needle short)")
    stage.add_argument(
        "--closed_book",
        default="closed-book",
        metavar="TASK",
        help='task without context, which masks should spare; "" for none (default: closed-book)',
    )
    stage.add_argument(
        "--gain",
        metavar="NUMBER",
        help='change to show against sparsity, such as "eval/context long/retmask minus start"',
    )
    stage.add_argument("--out", type=Path, help="folder for panel.json and panel.html")


def _whole_numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, such as 8 or 8,4")
    return [int(part) for part in text.split(",")]


def _add_benchmarks(stage) -> None:
    benchmarks = stage.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (text, flags) in _BENCHMARKS.items():
        one = benchmarks.add_parser(name, help=text, description=f"Measure {text}.", allow_abbrev=False)
        sizes = ("bundled", "30m", "8b") if name not in ("dpo", "memory") else ("30m", "8b")
        one.add_argument("--size", choices=sizes, default=sizes[0], help=f"model (default: {sizes[0]})")
        one.add_argument("--length", type=int, help="tokens of a prompt or row (default: as in the tables)")
        one.add_argument("--layers", type=int, help="layers of a random model, to try a large shape on a small machine")
        if name == "memory":
            one.add_argument("--measured", action="store_true", help="also measure the peak memory of runs")
        else:
            one.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default: 5)")
        if name == "dpo":
            one.add_argument("--no-remat", dest="remat", action="store_false", help="keep all activations, both sides")
        for flag, (default, about) in flags.items():
            one.add_argument(f"--{flag.replace('_', '-')}", type=int, default=default, help=about)
        one.add_argument("--out", type=Path, help="file for the result as JSON")


def _override(text: str, flags: list[str]) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals:
        close = difflib.get_close_matches(text.partition("=")[0], flags, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"unknown argument {text!r}{meant}; config keys are set as --config.KEY=VALUE")
    return key, value


def _dispatch(arguments, overrides) -> int:
    if arguments.stage in ("doctor", "inspect", "profile", "panel", "bench"):
        if overrides:
            raise ValueError(f"{arguments.stage} reads no config: --config.{overrides[0][0]} does not apply")
        from retmask_jax.cli import commands

        if arguments.stage == "doctor":
            return 0 if commands.examine(arguments.workdir, arguments.json) else 1
        if arguments.stage == "inspect":
            commands.inspect(arguments.model, arguments.json)
            return 0
        if arguments.stage == "profile":
            commands.profile(arguments.sources, arguments.kv_heads, arguments.threshold, arguments.gain, arguments.out)
            return 0
        if arguments.stage == "panel":
            commands.panel(
                arguments.sources, arguments.task, arguments.closed_book or None, arguments.gain, arguments.out
            )
            return 0
        options = {name: value for name, value in vars(arguments).items() if name not in ("stage", "benchmark", "out")}
        return 0 if commands.bench(arguments.benchmark, arguments.out, options) else 1

    from retmask_jax.runs import recipes

    if arguments.stage == "eval":
        overrides += _asked_of_eval(arguments)
    config = recipes.load_recipe(arguments.config, overrides)
    root = Path(arguments.workdir or Path("runs") / Path(arguments.config).stem)
    # Only now: these bring in jax and take seconds.
    from retmask_jax.cli import commands

    begin = time.time()
    if getattr(arguments, "aot", None) is not None:
        return 0 if commands.ahead(config, arguments.config, arguments.aot, arguments.stage) else 1
    if arguments.stage == "pretrain":
        commands.pretrain(config, root)
    elif arguments.stage == "export":
        commands.export(config, root, arguments.what, arguments.heads, arguments.format, Path(arguments.out))
    elif arguments.stage == "run":
        commands.run(config, root, arguments.set_aside)
    elif arguments.stage == "study":
        commands.study(config, root, arguments.set_aside)
    else:
        name = "compare" if getattr(arguments, "compare", None) else arguments.stage
        commands.one_stage(config, root, name, arguments.set_aside)
    if primary():
        print(f"{arguments.stage}: {time.time() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
