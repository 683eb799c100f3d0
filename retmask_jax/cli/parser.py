"""What the `retmask` command takes: stages, tools, their flags and their help."""

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from retmask_jax import __version__
from retmask_jax.cli.tool_flags import TOOL_FLAGS

# Title -> stage -> what it does.
GROUPS = {
    "the method": {
        "detect": "score heads by copying from needles, pick the retrieval heads",
        "knockout": "mask the retrieval heads and others, measure every task",
        "rope": "take rotary pairs out of the retrieval heads, by frequency",
        "pairs": "sample normal and ablated answers to unlabelled prompts",
        "rates": "try learning rates on tasks of their own, choose one",
        "train": "train with DPO to prefer the normal answers; the controls",
        "eval": "tasks and suites before and after; or compare models",
        "report": "write report.html from the results of all stages",
        "run": "all of these but rates in order, each skipped where nothing changed",
    },
    "the causal study": {
        "detectors": "compare detectors: agreement, stability, speed, masked recall",
        "utility": "query norms of retrieval heads against others, by rotary pair",
        "theta": "change the RoPE base at inference: recall, and which heads",
        "per_step": "which heads retrieve at each token of an answer, and how long",
        "dynamics": "detect heads in the checkpoints of a training run",
        "study": "detect, knockout, rope and these five in order; study.html",
    },
    "tools": {
        "doctor": "can this machine work? versions, devices, what to install",
        "inspect": "what a model is, by its config.json: layers, RoPE, memory, stop ids",
        "export": "write a masked or trained model for HF tools, with its card; or pairs",
        "profile": "retrieval heads of many models: how many, where, how sparse",
        "arena": "lists of heads, whoever made them: as many of each ablated",
        "budget": "what a model can do where all but a list's best heads stream",
        "panel": "findings of several studies side by side, with intervals",
        "diff": "two checkpoints: which heads changed, which carry the gain",
        "look": "one page: where heads look while the model writes an answer",
        "pretrain": "train a tiny model from its recipe, with its data files",
        "bench": "speed, memory and results against what others run",
    },
}
STAGES = {name: text for stages in GROUPS.values() for name, text in stages.items()}
TOOLS = ("doctor", "inspect", "profile", "panel", "diff", "look", "bench")  # which read no config
SCALES = ("quick", "paper")  # recipes for any model
# Forms in which `export` writes pairs, and head scores; the first of each is the usual one.
PAIR_FORMS = ("released", "tfds")
HEAD_FORMS = ("retmask", "headkv", "locos", "qrhead", "qrhead-scores", "duoattention", "list")
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
    "run": (
        "retmask run HuggingFaceTB/SmolLM2-135M-Instruct",
        "retmask run --config=tiny",
        "retmask run --config=llama3_1_8b --config.mesh.fsdp=8 --workdir=runs/llama",
    ),
    "study": ("retmask study --config=tiny_study",),
    "arena": (
        "retmask arena HuggingFaceTB/SmolLM2-135M-Instruct heads.json qrhead.yaml full_attention_heads.tsv",
        "retmask arena --config=tiny heads.json --config.arena.heads='(2, 4)'",
    ),
    "budget": (
        "retmask budget HuggingFaceTB/SmolLM2-135M-Instruct heads.json full_attention_heads.tsv",
        "retmask budget --config=tiny heads.json --config.budget.kept='(0.0, 0.1, 0.5)'",
    ),
    "pretrain": ("retmask pretrain --config=panel_qwen3 --config.pretrain.seed=1 --workdir=runs/panel_qwen3-1",),
    "export": (
        "retmask export --config=tiny --what=retmask-0 --out=my_model",
        "retmask export --config=tiny --heads 1-0 1-2 --out=masked",
        "retmask export HuggingFaceTB/SmolLM2-135M-Instruct --out=masked --push=me/smollm2-without-retrieval-heads",
        "retmask export MODEL --what=scores --scores=qrhead.yaml --format=duoattention --out=full_attention_heads.tsv",
    ),
    "doctor": ("retmask doctor", "retmask doctor --json"),
    "inspect": ("retmask inspect bundled", "retmask inspect Qwen/Qwen3-8B --json"),
    "profile": ("retmask profile runs/llama runs/qwen --out=profiles",),
    "panel": ("retmask panel runs/llama runs/qwen --out=panel",),
    "diff": ("retmask diff bundled my_model --lengths=128 --out=diff", "retmask diff START TRAINED --dtype=bfloat16"),
    "look": ("retmask look bundled", "retmask look MODEL --file=page.txt --heads=18-6,17-3 --out=page.html"),
    "bench": ("retmask bench generate", "retmask bench dpo --size=30m --repeats=3"),
}

# Flags of each benchmark: what is compared, then name -> (default, help). None: depends on the size.
BENCHMARKS = {
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
        {
            "batch": (16, "number of prompts"),
            "new_tokens": (64, "tokens generated for each"),
            "rows": (None, "also sample for so many prompts at once, as the stage pairs does"),
        },
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

_EXAMPLES = """
examples:
  retmask doctor                                     can this machine work?
  retmask run --config=tiny                          the whole method on the bundled model
  retmask detect --config=tiny --config.detect.threshold=0.05 --workdir=runs/low
  retmask study --config=tiny_study                  detectors, knock-outs, rotary pairs
  retmask eval --config=tiny --compare mine=my_model --workdir=runs/compared
  retmask export --config=tiny --what=retmask-0 --out=my_model

exit status: 0 done; 1 a check failed (bench, doctor, --aot) or a bug; 2 a mistake in the call, reported in
one line; 130 interrupted; 143 stopped by SIGTERM after a checkpoint: the same command goes on
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags of a call, and the keys of the config that it sets, ((key, text), ...).

    Raises:
        ValueError: For a call that is not understood, with the closest name that exists.
    """
    parser = _Parser(
        prog="retmask",
        usage="%(prog)s [-h] [--version] STAGE ...",
        description=f"Find retrieval heads, mask them, train against the masked model.\n\n{_grouped()}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    stages = parser.add_subparsers(prog="retmask", dest="stage", metavar="STAGE", required=True, help=argparse.SUPPRESS)
    for name, text in STAGES.items():
        stage = stages.add_parser(
            name,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            epilog=_examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name not in TOOLS:
            _add_config(stage, name)
        if name in _FLAGS:
            _FLAGS[name](stage)
    # argparse would take a setting with a blank in its value for a MODEL.
    settings = [text for text in argv if text.startswith("--config.")]
    arguments, rest = parser.parse_known_args([text for text in argv if text not in settings])
    if "files" in arguments:
        rest = _take_files(arguments, rest)
    flags = [flag for action in stages.choices[arguments.stage]._actions for flag in action.option_strings]
    return arguments, [_override(text, flags) for text in settings + rest]


def recipe_of(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
    """(the recipe of a call, the settings that it overrides); ValueError where a call names a model and a recipe."""
    model, scale = getattr(arguments, "model", None), getattr(arguments, "scale", None)
    if model is None:
        if scale is not None:
            raise ValueError(f"--scale={scale} goes with a MODEL, and none is named: name one, or leave --scale out")
        return arguments.config or "tiny", overrides
    if arguments.config is not None:
        raise ValueError(f"{model} and --config={arguments.config} both say what to run: leave one of them out")
    return scale or SCALES[0], [("model", model), *overrides]


def name_of_results(arguments: argparse.Namespace, recipe: str) -> str:
    """The name of the folder of results: that of the model, with its scale unless that is the usual one, or the recipe's."""
    model = getattr(arguments, "model", None)
    if model is None:
        return Path(recipe).stem
    name = Path(model).name.removesuffix(".gguf")
    return name if recipe == SCALES[0] else f"{name}-{recipe}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{self._meant(message)} (`{self.prog} --help` lists all)")

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
        for title, stages in GROUPS.items()
    )


def _examples(name: str) -> str:
    lines = _EXAMPLES_OF.get(
        name, (f"retmask {name} --config=tiny", f"retmask {name} --config=FILE.py --workdir=FOLDER")
    )
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _add_config(stage: argparse.ArgumentParser, name: str) -> None:
    """The flags of what reads a config."""
    if name != "pretrain":
        stage.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="a hub id, a folder or a .gguf file, instead of --config: needs no recipe and no data",
        )
        stage.add_argument(
            "--scale",
            choices=SCALES,
            help="with MODEL: quick takes minutes on a laptop's CPU for 135M parameters, paper has the published "
            f"settings (default: {SCALES[0]})",
        )
    stage.epilog = f"Any key of the config can be set: --config.train.steps=10\n\n{_examples(name)}"
    stage.add_argument("--config", help="name of a recipe or path of a .py file (default: tiny)")
    stage.add_argument("--workdir", help="folder for all results (default: runs/NAME of the config or the model)")
    if name not in ("pretrain", "export"):
        stage.add_argument(
            "--set-aside",
            action="store_true",
            help="where the work directory was made with other settings, keep what no longer fits under "
            "a new name and make it again",
        )
        stage.add_argument(
            "--plan", action="store_true", help="only check the settings and say about how long each stage takes here"
        )
    if name in _AHEAD:
        stage.add_argument(
            "--aot", metavar="TOPOLOGY", help="only compile, for TPUs that need not be here (v5e:4x4): does it fit?"
        )


def _add_files(stage: argparse.ArgumentParser) -> None:
    stage.add_argument(
        "files", nargs="*", metavar="FILE", help="of heads: head scores or a list, in any form that is known here"
    )


def _take_files(arguments: argparse.Namespace, rest: list[str]) -> list[str]:
    """Adds the files that stand after flags to those before, and what stands for MODEL where a recipe names the model;
    returns what is left."""
    arguments.files = [*arguments.files, *(text for text in rest if not text.startswith("-"))]
    if arguments.config is not None and arguments.model is not None:
        arguments.files, arguments.model = [arguments.model, *arguments.files], None
    return [text for text in rest if text.startswith("-")]


def _add_eval(stage: argparse.ArgumentParser) -> None:
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


def _add_export(stage: argparse.ArgumentParser) -> None:
    stage.add_argument(
        "--what",
        default="masked",
        help='"masked" (retrieval heads), a run such as retmask-0, its pairs, pairs-retmask-0, or head scores, "scores" '
        "(default: masked)",
    )
    stage.add_argument(
        "--format",
        choices=(*PAIR_FORMS, *HEAD_FORMS),
        help=f"of pairs: {' (JSONL as RetMask and TRL read it) or '.join(PAIR_FORMS)} (a folder for TFDS); of scores: "
        f"{', '.join(HEAD_FORMS)} (default: the first of each)",
    )
    stage.add_argument(
        "--heads",
        nargs="+",
        action="extend",
        metavar="LAYER-HEAD",
        help="heads to mask, or to write as a list, instead of those detected",
    )
    stage.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="of heads, in any of these forms, to write instead of those detected",
    )
    stage.add_argument("--out", required=True, help="folder or file to write")
    stage.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="also upload the model to the hub, by huggingface_hub's login; it is made there, public, if it is not there",
    )


def _add_benchmarks(stage: argparse.ArgumentParser) -> None:
    benchmarks = stage.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, (text, flags) in BENCHMARKS.items():
        one = benchmarks.add_parser(name, help=text, description=f"Measure {text}.", allow_abbrev=False)
        sizes = ("bundled", "30m", "8b") if name not in ("dpo", "memory") else ("30m", "8b")
        one.add_argument("--size", choices=sizes, default=sizes[0], help=f"model (default: {sizes[0]})")
        if name != "memory":
            one.add_argument("--model", help="a folder, hub id or .gguf file instead of --size")
        one.add_argument("--length", type=int, help="tokens of a prompt or row (default: as in the tables)")
        one.add_argument("--layers", type=int, help="layers of a random model, to try a large shape on a small machine")
        if name == "memory":
            one.add_argument("--measured", action="store_true", help="also measure the peak memory of runs")
        else:
            one.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default: 5)")
        if name == "generate":
            one.add_argument("--alone", action="store_true", help="without a peer, where torch is not installed")
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


def _named_model(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FOLDER or NAME=HUB_ID")
    return name, source


_FLAGS = {
    "arena": _add_files,
    "budget": _add_files,
    "eval": _add_eval,
    "export": _add_export,
    "bench": _add_benchmarks,
    **TOOL_FLAGS,
}
