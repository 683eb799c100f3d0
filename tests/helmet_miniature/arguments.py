"""Options of the miniature: a YAML file, then the command line."""

import argparse
import ast

import yaml

SWITCHES = ("no_cuda", "overwrite")
TRUTHS = ("use_chat_template", "stop_newline", "do_sample")
NUMBERS = {"max_test_samples": None, "shots": 2, "seed": 42}
TEXTS = {
    "config": None,
    "model_name_or_path": None,
    "output_dir": None,
    "datasets": None,
    "test_files": None,
    "demo_files": None,
    "input_max_length": "128",
    "generation_max_length": "8",
    "system_message": None,
}


def parse_arguments():
    parser = argparse.ArgumentParser()
    for name, default in TEXTS.items():
        parser.add_argument(f"--{name}", default=default)
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in TRUTHS:
        parser.add_argument(f"--{name}", type=ast.literal_eval, default=False)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.set_defaults(temperature=0.0, top_p=1.0)
    with open(parser.parse_args().config) as file:
        parser.set_defaults(**yaml.safe_load(file))
    return parser.parse_args()
