"""What ends an answer: the ids of every file that names one stop the model, and training rows end as the model's turns do."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from chat_families import CHATS, RETMASK
from helpers_rows import encode_pairs, record_of

from retmask_jax.cli.main import main
from retmask_jax.data import tiny_language as tl
from retmask_jax.data.pair_formats import read_pairs
from retmask_jax.data.prompter import Prompter
from retmask_jax.data.tasks import task_cases
from retmask_jax.evals.scoring import answers
from retmask_jax.generation.decode import generate_many
from retmask_jax.generation.language_model import from_params, load, save
from retmask_jax.heads.copy_score import detect
from retmask_jax.hf.end_tokens import Ends, turn_end
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.hf.summary import describe
from retmask_jax.model.interventions import Interventions
from retmask_jax.training.pairs import Question, make_pairs, sample
from retmask_jax.utils.files import write_jsonl

PROMPT = "<bos> the home of emma : rome . the home of emma :"
DOT = tl.VOCABULARY.index(".")


@pytest.fixture
def changed(tmp_path):
    """A copy of the bundled model with other eos ids in generation_config.json or another chat template."""

    def make(eos=..., template=None, config_eos=...):
        folder = tmp_path / "model"
        shutil.copytree(BUNDLED, folder)
        if eos is not ...:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if config_eos is not ...:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": config_eos}))
        return folder

    return make


# --- published models ---


@pytest.mark.parametrize("name", CHATS)
def test_stop_ids_and_the_end_of_a_row_are_those_of_the_published_files(tmp_path, name):
    """At a superset of vLLM's (generation_config.json and the tokenizer's EOS), beyond config.json's own by the turn's end."""
    chat = CHATS[name]
    facts = describe(chat.save(tmp_path / name))
    assert tuple(stop["id"] for stop in facts["stop_ids"]) == chat.stop_ids
    assert (facts["row_end"]["id"], "chat template" in facts["row_end"]["from"]) == (chat.row_end, True)
    ids_of = {token: i for token, i in chat.special.items()}
    assert all(ids_of[stop["token"]] == stop["id"] for stop in facts["stop_ids"])
    generation = chat.generation if isinstance(chat.generation, list) else [chat.generation]
    vllm = {*generation, chat.special[chat.eos]}
    own = chat.config["eos_token_id"]
    assert vllm <= set(chat.stop_ids) <= vllm | {chat.row_end, *(own if isinstance(own, list) else [own])}


@pytest.mark.parametrize("name", RETMASK)
def test_inspect_prints_the_stop_ids_and_the_end_of_a_row(tmp_path, capsys, name):
    chat = CHATS[name]
    assert main(["inspect", str(chat.save(tmp_path / name))]) == 0
    table = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    lines = {key: text.strip() for key, text in table}
    token = {i: token for token, i in chat.special.items()}
    assert all(lines[str(i)].startswith(f"{token[i]} (") for i in chat.stop_ids)
    assert "generation_config.json" in lines[str(chat.row_end)] and "chat template" in lines[str(chat.row_end)]
    assert lines["end of a row"].startswith(f"{chat.row_end} {token[chat.row_end]}:")


@pytest.mark.parametrize("name", CHATS)
def test_rows_of_finished_answers_end_as_the_models_turns_do_and_cut_ones_have_no_end(name):
    chat = CHATS[name]
    prompter = Prompter(chat.tokenizer())
    records = [record_of("the question", "short answer", "long", finished=(True, False))]
    ends = Ends.of(prompter.tokenizer, chat.stop_ids, chat=True)
    rows = encode_pairs(prompter, records, ends=ends, max_tokens=60, max_prompt_tokens=50)
    _, chosen, rejected, end = rows.bounds[0]
    words = prompter.tokenizer.convert_tokens_to_ids(["short", "answer", "long"])
    assert rows.flat[chosen:rejected].tolist() == [*words[:2], chat.row_end]
    assert rows.flat[rejected:end].tolist() == words[2:]


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True], ids=["our template", "the template TRL ships"])
@pytest.mark.parametrize("name", CHATS)
def test_trl_ends_a_finished_answer_with_the_same_token(name, published):
    """TRL's own tokenising of a conversational pair: the same prompt, answer and end.

    What its rows have after that is the template's rest of the conversation, which no model is asked for: a line end, and
    with Phi the EOS after the whole conversation. An answer that was cut gets an end from TRL; here it has none.
    """
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    chat, template = CHATS[name], None
    if published:
        if not chat.published:
            pytest.skip("TRL ships no template of this family")
        from pathlib import Path

        import trl

        template = (Path(trl.__file__).parent / "chat_templates" / f"{chat.published}.jinja").read_text()
    tokenizer = chat.tokenizer(template)
    kwargs = {"enable_thinking": False} if name == "Qwen3-8B" else {}
    record = record_of("the question", "short answer .", "long", finished=(True, False))
    # which our prompt ends with, so that the answer goes on after it
    thinks = "<think> " if name.endswith("Think") else ""
    turn = {side: [{"role": "assistant", "content": thinks + record[side]}] for side in ("chosen", "rejected")}
    data = datasets.Dataset.from_list([{"prompt": record["messages"], **turn, "chat_template_kwargs": kwargs}])
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    (theirs,) = trainer.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, options, "train"
    )

    prompter = Prompter(tokenizer, template_kwargs=kwargs)
    ends = Ends.of(tokenizer, chat.stop_ids, chat=True, template_kwargs=kwargs)
    rows = encode_pairs(prompter, [record], ends=ends, max_tokens=200, max_prompt_tokens=150)
    start, chosen, rejected, end = rows.bounds[0]
    assert rows.flat[start:chosen].tolist() == theirs["prompt_ids"]
    ours = {"chosen": rows.flat[chosen:rejected].tolist(), "rejected": rows.flat[rejected:end].tolist()}
    n = len(ours["chosen"])
    assert ours["chosen"] == theirs["chosen_ids"][:n] and ours["chosen"][-1] == chat.row_end
    eos_after_all = [chat.special[chat.eos]] if "Phi" in name else []
    assert theirs["chosen_ids"][n:] == eos_after_all
    assert theirs["rejected_ids"] == [*ours["rejected"], chat.row_end, *eos_after_all]


# --- a model at work ---


def test_a_loaded_model_stops_at_the_ids_of_all_its_files_in_every_path(changed):
    """An id that generation_config.json alone names ends answers of generate, batches, suites and detection."""
    whole, lm = load("bundled"), load(changed(eos=[DOT, tl.EOS]))
    assert (whole.config.eos_ids, lm.config.eos_ids) == ((tl.EOS,), (tl.EOS, DOT))
    prompt = lm.tokenizer(PROMPT)["input_ids"]
    rome = lm.tokenizer("rome")["input_ids"]
    never = lm.generate([prompt], [13], 2, stop_ids=()).tokens[0]
    assert never.tolist() == [*rome, DOT]
    out = lm.generate([prompt], [13], 2)
    assert (out.tokens[0].tolist(), out.lengths.tolist(), out.stops.tolist()) == ([*rome, lm.config.pad_id], [1], [DOT])
    (many,) = generate_many(lm.config, lm.params, [prompt], batch_size=1, max_new_tokens=2)
    assert (many.tokens.tolist(), int(many.stops)) == (rome, DOT)
    assert answers(lm, [prompt], max_new_tokens=2, batch_size=1) == ["rome"]
    assert answers(whole, [prompt], max_new_tokens=2, batch_size=1) == ["rome ."]


@pytest.mark.slow  # test_drafts.py has both quickly, on a small model that two ids stop
def test_reading_and_decoding_detect_the_same_where_several_ids_stop(changed):
    from retmask_jax.runs.recipes import load_recipe

    lm = load(changed(eos=[DOT, tl.EOS]))
    task = load_recipe("tiny", []).tasks.detect.to_dict() | {"lengths": (128,), "per_length": 4}
    resolve = lambda name: BUNDLED.parent / "data" / name.removeprefix("bundled/")  # noqa: E731
    cases = task_cases(Prompter(lm.tokenizer), SimpleNamespace(**task), resolve)
    read, decoded = (detect(lm, cases, max_new_tokens=8, batch_size=2, read=read) for read in (True, False))
    assert read.answers == decoded.answers and read.scores == decoded.scores
    assert not any(answer.endswith(".") for answer in read.answers)


@pytest.mark.parametrize(
    "eos, expected",
    [(..., (2,)), (None, (2,)), (2, (2,)), ([2], (2,)), ([], (2,)), (7, (2, 7)), ([9, 2, 9, 7], (2, 9, 7)), (-1, (2,))],
)
def test_one_id_a_list_null_or_no_file(changed, eos, expected):
    assert load(changed(eos=eos)).config.eos_ids == expected


def test_a_config_without_eos_gets_the_others(changed):
    assert load(changed(config_eos=None, eos=7)).config.eos_ids == (7, 2)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "generation_config.json is not valid JSON"),
        ("[1]", "generation_config.json holds a list, not an object"),
        ('{"eos_token_id": "</s>"}', "generation_config.json has eos_token_id='</s>'; it must be a token id or a list"),
        ('{"eos_token_id": [2, null]}', "it must be a token id or a list of them"),
    ],
)
def test_a_broken_generation_config_is_one_line_before_weights_are_read(changed, capsys, text, words):
    folder = changed()
    (folder / "generation_config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        load(folder)
    assert main(["inspect", str(folder)]) == 2
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_model_may_have_more_stop_ids_than_a_call_may_name(changed):
    """All of them stop; none is dropped."""
    lm = load(changed(eos=[*range(40, 49), DOT]))
    assert len(lm.config.eos_ids) == 11
    out = lm.generate([lm.tokenizer(PROMPT)["input_ids"]], [13], 2)
    assert (out.lengths.tolist(), out.stops.tolist()) == ([1], [DOT])


def test_a_saved_model_has_the_files_it_was_read_from(changed, tmp_path):
    folder = changed(eos=[DOT, tl.EOS])
    lm = load(folder)
    save(lm, tmp_path / "saved")
    names = ("config.json", "generation_config.json", "model.safetensors")
    for name in names[:2]:
        assert json.loads((tmp_path / "saved" / name).read_text()) == json.loads((folder / name).read_text())
    assert load(tmp_path / "saved").config == lm.config
    made = from_params(lm.config, lm.params, lm.tokenizer)
    save(made, tmp_path / "made")
    assert load(tmp_path / "made").config.eos_ids == lm.config.eos_ids


# --- the sampled end ---


def test_the_stop_id_that_was_sampled_is_what_training_appends(changed):
    """An answer that ends at another id than the template's keeps it, through pairs, files and rows."""
    lm = load(changed(eos=[DOT, tl.EOS]))
    tokens = lm.tokenizer(PROMPT)["input_ids"]
    mask = Interventions()
    questions = [Question((0, name), "p", [], tokens, draw=0) for name in ("long", "short")]
    stored = {}
    for n, question in zip((4, 1), questions, strict=True):
        (stored[n],) = sample(
            lm, [question], {question.variant: mask}, temperature=0.0, top_p=1.0, max_new_tokens=n, batch_size=1
        )
    found = {n: answer for n, (_, answer) in stored.items()}
    assert stored[4] == ((0, "long", "p"), {"text": "rome", "finished": True, "tokens": 1, "stop": DOT})
    assert stored[1] == ((0, "short", "p"), {"text": "rome", "finished": False, "tokens": 1})

    prompts = [{"id": "p", "messages": [{"role": "user", "content": "the home of emma"}]}]
    bad = found[1] | {"text": "oslo"}
    (pair,) = make_pairs(prompts, [found[4]], [bad], counts={"kept": 0})
    assert pair["chosen_stop"] == DOT and "rejected_stop" not in pair
    prompter = Prompter(lm.tokenizer)
    ends = Ends.of(lm.tokenizer, lm.config.eos_ids, chat=True)

    def answers_of(record):
        rows = encode_pairs(prompter, [record], ends=ends, max_tokens=40, max_prompt_tokens=20)
        start, chosen, rejected, end = rows.bounds[0]
        return [[tl.VOCABULARY[i] for i in rows.flat[a:b]] for a, b in ((chosen, rejected), (rejected, end))]

    assert answers_of(pair) == [["rome", "."], ["oslo"]]
    older = {name: value for name, value in pair.items() if not name.endswith("_stop")}
    assert answers_of(older) == [["rome", "<eos>"], ["oslo"]], "an older file or a server tells no id: the turn's end"
    assert answers_of(pair | {"chosen_stop": 77}) == [["rome", "<eos>"], ["oslo"]], "an id of another model's tokenizer"


def test_stop_ids_are_read_back_from_every_form(tmp_path):
    from retmask_jax.data.pair_formats import build_dataset, preference_source, write_released

    pairs = [record_of(f"ask {i}", "a", "b") for i in range(3)]
    pairs[0] |= {"chosen_stop": 128009, "rejected_stop": 128001}
    pairs[1] |= {"rejected_stop": 0}
    write_jsonl(tmp_path / "ours.jsonl", pairs)
    write_released(tmp_path / "released.jsonl", pairs)
    build_dataset(tmp_path / "set", pairs)
    source = preference_source(tmp_path / "set")
    assert read_pairs(tmp_path / "ours.jsonl") == read_pairs(tmp_path / "released.jsonl") == pairs
    assert [source[i] for i in range(3)] == pairs
    write_jsonl(tmp_path / "bad.jsonl", [pairs[0] | {"chosen_stop": "x"}])
    with pytest.raises(ValueError, match="line 1: chosen_stop is 'x', not a token id"):
        read_pairs(tmp_path / "bad.jsonl")


# --- templates ---

_CHAT = CHATS["Phi-3.5-mini-instruct"]
_TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    "template, end",
    [
        (_TURNS, 32007),
        (_TURNS.replace("'<|end|>'", "' <|end|>\n'"), 32007),  # as Llama-2 did: a blank before
        (_TURNS.replace("m.content", "m.content | trim"), 32007),
        (_TURNS.replace("m.content", "m.content.strip().split('</think>')[-1]"), 32007),
        ("{% if messages | length < 3 %}{{ raise_exception('a system turn comes first') }}{% endif %}" + _TURNS, 32007),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + _TURNS, 32007),
        ("{{ strftime_now('%d %B %Y') }}" + _TURNS, 32007),
        (_TURNS.replace("'<|end|>'", "eos_token"), 32000),
        (_TURNS.replace("'<|end|>'", "'</s>'"), None),  # which is no token of this tokenizer
        (_TURNS.replace("'<|end|>'", "'.'"), None),  # a word of the vocabulary, not an added token
        (_TURNS.replace("'<|end|>'", "''"), None),
        (_TURNS.replace("'<|end|>'", "'\n<|user|>'"), None),  # the next turn's marker ends no answer
        ("{% for m in messages if m.role == 'user' %}{{ m.content + '<|end|>' }}{% endfor %}", None),
        ("{{ messages | tojson }}<|end|>", None),
        ("{{ messages[9].content.nothing }}", None),
        ("{{ 1 / 0 }}", None),
        ("{% for", None),
    ],
)
def test_the_turns_end_is_the_added_token_right_after_an_answer(template, end):
    assert turn_end(_CHAT.tokenizer(template)) == end


def test_of_tokens_that_begin_alike_the_longest_is_meant():
    chat = dataclasses.replace(_CHAT, special=_CHAT.special | {"<|end|>x": 32008})
    assert turn_end(chat.tokenizer(_TURNS.replace("'<|end|>'", "'<|end|>x'"))) == 32008


def test_without_a_template_or_chat_the_tokenizers_eos_ends_a_row():
    tokenizer = _CHAT.tokenizer()
    assert Ends.of(tokenizer, (32007,), chat=False).usual == 32000
    tokenizer.chat_template = None
    assert turn_end(tokenizer) is None and Ends.of(tokenizer, (32007,), chat=True).usual == 32000
    tokenizer.eos_token = None
    assert Ends.of(tokenizer, (32007, 5), chat=True).usual == 32007
    nothing = Ends.of(tokenizer, (), chat=True)
    assert nothing.usual is None and nothing.after({"chosen_finished": True}, "chosen") == []
    assert turn_end(None) is None
