"""What a context builds once for all stages."""

import copy

from retmask_jax.runs.context import Context
from retmask_jax.runs.recipes import load_recipe
from retmask_jax.runs.workdir import Workdir


def test_cases_are_built_once_for_models_whose_prompts_have_the_same_tokens(tmp_path):
    context = Context(load_recipe("tiny", []), Workdir(tmp_path, {}))
    cases = context.cases("needle short")
    other = context.of(context.outline.replace(tokenizer=copy.deepcopy(context.outline.tokenizer)))
    assert other.cases("needle short") is cases
    assert context.cases("needle short", seed=99) != cases
    other.outline.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} .{% endfor %}"
    assert other.cases("needle short") != cases
