"""Flags of the tools that read no config, but for those of the benchmarks."""

import argparse
from pathlib import Path


def _add_doctor(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--workdir", type=Path, default=Path("runs"), help="where results would go (default: runs)")
    stage.add_argument("--json", action="store_true", help="print one JSON list instead of a table")


def _add_inspect(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("model", metavar="MODEL", help='folder, .gguf file, hub id or "bundled"; no weights are read')
    stage.add_argument(
        "--ignore",
        type=_names,
        default=(),
        metavar="NAME[,NAME...]",
        help="attributes of config.json that are not understood, and that change nothing",
    )
    stage.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_profile(stage: argparse.ArgumentParser) -> None:
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
        help="score that a retrieval head reaches (default: 0.1; of a work directory, that of its detection)",
    )
    stage.add_argument(
        "--gain",
        metavar="NUMBER",
        help='change to show against sparsity, such as "eval/needle long/retmask minus start"',
    )
    stage.add_argument("--out", type=Path, help="folder for profile.json and the pictures, as PNG and SVG")


def _add_panel(stage: argparse.ArgumentParser) -> None:
    stage.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="work directory of a finished study, or a record of one, or a folder of records, such as colab/panel",
    )
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


def _add_diff(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("start", metavar="START", help='the model before: a folder, hub id, .gguf file or "bundled"')
    stage.add_argument("trained", metavar="TRAINED", help="one of the same architecture that was trained from it")
    stage.add_argument(
        "--n", type=int, default=20, help="questions about needles, and cases to detect with (default: 20)"
    )
    stage.add_argument(
        "--lengths", type=_whole_numbers, default=[512], metavar="N[,N...]", help="tokens of a prompt (default: 512)"
    )
    stage.add_argument("--seed", type=int, default=1, help="of needles, texts and control heads (default: 1)")
    stage.add_argument(
        "--needles",
        metavar="FILE",
        help="JSONL of the needles that are asked for, such as builtin:facts, which contradict what models know (default: codes)",
    )
    stage.add_argument(
        "--scores",
        metavar="FILE",
        help='head scores {"layer-head": [score, ...]} that say which are the retrieval heads (default: START\'s copy scores)',
    )
    stage.add_argument(
        "--threshold", type=float, default=0.1, help="score that a retrieval head reaches (default: 0.1)"
    )
    stage.add_argument(
        "--heads",
        metavar="N|FILE",
        help="heads whose shares are measured one by one, two passes each: the best N by score, or a file, a JSON list of "
        "[layer, head] or head scores (default: all)",
    )
    stage.add_argument(
        "--no_copy", dest="detect", action="store_false", help="leave out the copy scores of both models"
    )
    stage.add_argument("--dtype", default="float32", help="of parameters and computation (default: float32)")
    stage.add_argument("--batch_size", type=int, default=8, metavar="ROWS", help="prompts in a pass (default: 8)")
    stage.add_argument("--ignore", type=_names, default=(), metavar="NAME[,NAME...]", help="as of `retmask inspect`")
    stage.add_argument("--out", type=Path, help="folder for diff.json and diff.html")


def _add_look(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("model", metavar="MODEL", help='a folder, hub id, .gguf file or "bundled"')
    asked = stage.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="what the user of a chat model says, or a text to continue")
    asked.add_argument("--file", type=Path, help="a file with that text")
    asked.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a built-in question about a code, else (default: 2000 at most)",
    )
    stage.add_argument("--begin", default="", metavar="TEXT", help="how the reply to a text begins")
    stage.add_argument(
        "--plain", action="store_true", help="put the text to the model as it is, without a chat template"
    )
    stage.add_argument("--answer", metavar="TEXT", help="what the model is to say (default: its own answer)")
    stage.add_argument(
        "--heads",
        metavar="N|LAYER-HEAD[,...]|FILE",
        help="heads to show first, and to mask in the second answer: the best N by score, some by name, or a file "
        "of heads in any published form (default: the best 8)",
    )
    scores = stage.add_mutually_exclusive_group()
    scores.add_argument(
        "--scores",
        metavar="FILE",
        help="head scores in any published form (default: the copy score in this very prompt)",
    )
    scores.add_argument(
        "--find", action="store_true", help="find head scores first, with 24 built-in cases of 512 tokens"
    )
    stage.add_argument(
        "--new_tokens", type=int, default=24, metavar="N", help="tokens of the longest answer (default: 24)"
    )
    stage.add_argument("--dtype", default="float32", help="of parameters and computation (default: float32)")
    stage.add_argument("--ignore", type=_names, default=(), metavar="NAME[,NAME...]", help="as of `retmask inspect`")
    stage.add_argument("--out", type=Path, default=Path("look.html"), help="file to write (default: look.html)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _whole_numbers(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, such as 8 or 8,4")
    return [int(part) for part in text.split(",")]


TOOL_FLAGS = {
    "doctor": _add_doctor,
    "inspect": _add_inspect,
    "profile": _add_profile,
    "panel": _add_panel,
    "diff": _add_diff,
    "look": _add_look,
}
