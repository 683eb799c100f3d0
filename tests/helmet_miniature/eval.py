"""The loop of the miniature: prompts, answers, scores, one file."""

import json
import os

from data import load_data


def run_test(args, model, dataset, test_file, demo_file):
    name = os.path.splitext(os.path.basename(test_file))[0]
    path = os.path.join(args.output_dir, f"{dataset}_{name}_chat{args.use_chat_template}.json")
    data = load_data(args, dataset, test_file, demo_file)
    outputs = model.generate_batch([model.prepare_inputs(item, data) for item in data["data"]])
    results = []
    for item, output in zip(data["data"], outputs, strict=True):
        if output is None:
            continue
        if not args.use_chat_template:
            output["output"] = data["system_template"].format(**item) + output["output"]
        metrics, others = data["post_process"](output, item)
        results.append(item | output | others | metrics)
    with open(path, "w") as file:
        json.dump({"args": vars(args), "data": results}, file)
    return path
