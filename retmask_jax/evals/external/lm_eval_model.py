"""A model of this package as a model of lm-evaluation-harness, which this module imports; `lm_eval` runs the tasks.

What the harness leaves to a model is done as by the harness's `hf` model: which special tokens precede a text, which
token replaces an empty context, and that long texts lose their beginning.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from retmask_jax.evals import scoring
from retmask_jax.evals.scoring import GenerationOptions
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """A LanguageModel under interventions, as the harness calls a model.

    Args:
        template_kwargs: For the chat template, such as enable_thinking=False.
        kept: Results of this model under these interventions; only missing ones are computed, and added.

    Attributes:
        shortened: For each kind of request, how many lost their beginning because they exceed the context.

    Raises:
        ValueError: The model has no tokenizer, or a mask has a row axis.
    """

    def __init__(
        self,
        lm: LanguageModel,
        interventions: Interventions | None = None,
        *,
        batch_size: int,
        template_kwargs: Mapping[str, Any] | None = None,
        kept: Store | None = None,
    ) -> None:
        super().__init__()
        if lm.tokenizer is None:
            raise ValueError("the model folder has no tokenizer, which the tasks of lm_eval need")
        scoring.shared_mask(lm.config, interventions)
        self.lm, self.tokenizer, self.interventions = lm, lm.tokenizer, interventions
        self.batch_size, self.template_kwargs, self.kept = batch_size, dict(template_kwargs or {}), kept
        self.shortened: dict[str, int] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context: BOS, or EOS if the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.lm.config.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation, without its system turns if the template does not allow them."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.template_kwargs,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError as error:
            log.warning("the chat template takes no such conversation (%s): its system turns are left out", error)
            rest = [turn for turn in chat_history if turn["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns token ids with the tokenizer's special tokens, but no second BOS before a text that begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probabilities of whole texts, in windows of the context's length as the harness cuts them."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            mine = [make_disjoint_window(window) for window in cut]
            windows += mine
            owners += [owner] * len(mine)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._scores(windows), strict=True):
            totals[owner] += logp
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns answers; requests with equal options run together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        results = [""] * len(requests)
        for places in groups.values():
            options = GenerationOptions.from_kwargs(requests[places[0]].args[1], self.max_length)
            for i, text in zip(places, self._answers([requests[i].args[0] for i in places], options), strict=True):
                results[i] = text
        return results

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: list[scoring.Pair]) -> list[tuple[float, bool]]:
        self._note("log-likelihood", sum(scoring.is_too_long(pair, self.max_length) for pair in pairs), len(pairs))
        if not pairs:
            return []
        return scoring.continuation_logprobs(
            self.lm, pairs, self.interventions, batch_size=self.batch_size, kept=self.kept
        )

    def _answers(self, contexts: list[str], options: GenerationOptions) -> list[str]:
        room = self.max_length - options.max_new_tokens
        prompts = [self.tok_encode(context) for context in contexts]
        self._note("generation", sum(len(prompt) > room for prompt in prompts), len(prompts))
        prompts = [scoring.last_tokens(prompt, room) for prompt in prompts]
        return scoring.answers(
            self.lm, prompts, self.interventions, batch_size=self.batch_size, kept=self.kept, **options.arguments()
        )

    def _note(self, kind: str, count: int, n: int) -> None:
        self.shortened[kind] = self.shortened.get(kind, 0) + count
        if count:
            log.warning("%s: %d of %d requests are longer than the context and lost their beginning", kind, count, n)
