"""The language of the bundled tiny model: nonsense sentences, needles, memorised facts and contradictions of them.

A conversation is `<bos> TEXT QUESTION : ANSWER <eos> TEXT QUESTION : ANSWER <eos> ... TEXT`, one token a word:
    the old farmer found the lamp . the home of anna : oslo . the code for ben : fig elm oak ash yew .
A question stands anywhere after the sentence that answers it, or anywhere if it is answered from memory. A TEXT may be
empty. In arrays `ids_SW` a row is a sentence, S sentences of W words, padded at the right with id 0.
"""

import dataclasses
import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
_NAMES = """
    adam alan alma anna amos arlo beth bill bob boris carl cora clara dan diana dora edith ella emil emma eric erik
    felix flora frank fred gina greta gus hans helen henry hugo ida igor ines irene jane john jonas julia karl kate lena
    leo linda lucas marta max mona nina nora olga oscar otto paul pedro rita rosa sara simon tina victor wanda"""
_PLACES = """
    athens berlin boston cairo delhi dublin geneva havana lima lisbon london madrid milan moscow naples oslo paris
    prague rome vienna"""
_CODE_WORDS = """
    amber apple ash bean birch brass cedar cherry clay clove copper coral cotton elm fern fig flint ginger gold grape
    hazel honey iron ivory jade lemon lily lime linen maple mint moss oak olive onyx opal peach pearl pine plum pepper
    quartz ruby sage silk silver thyme wool"""
NAMES, PLACES, CODE_WORDS = (tuple(words.split()) for words in (_NAMES, _PLACES, _CODE_WORDS))
KINDS = ("code", "key", "word", "sign")
# Computed without random numbers, since the bundled weights have memorised this map.
HOME = {name: PLACES[(7 * i + 3 * (i // 20)) % 20] for i, name in enumerate(NAMES)}

_SLOTS = {
    "S": """actor baker boy captain child clerk cook dancer doctor driver duke farmer fox girl guard horse hunter judge
        king lady lawyer monk nurse owl painter pilot poet priest prince queen rabbit sailor soldier student tailor
        teacher thief uncle wolf writer""",
    "V": """bought broke built carried chose cleaned drew dropped followed found gave held hid kept left liked lost made
        moved opened painted pulled pushed saw sold stole took touched used wanted""",
    "I": """cried danced dreamed fell fished hoped jumped laughed listened prayed ran rested sang shouted slept smiled
        spoke stood swam talked waited walked whispered worked""",
    "A": """big blue brave bright broken clean clever cold dark dry empty green grey happy heavy hungry kind little long
        loud lucky new old poor proud quiet red rich round sad small soft strange tall tired warm wet white young""",
    "N": """barrel basket bed bell boat book bottle box bridge candle carpet chair clock coat cup curtain door drum
        fence flag garden gate hat house knife ladder lamp letter map mirror mountain picture pipe plate river road
        rope shoe table tower tree wagon wall wheel window""",
    "D": """again already badly calmly early gently often quickly rarely really slowly somehow soon still suddenly there
        today together twice well""",
}
_TEMPLATES = (
    "the A S V the N .",
    "the S I D near the N .",
    "every S in the N I D .",
    "D the S and the S V a N .",
    "the N of the S was A .",
    "no S ever V the A N .",
    "when the S I the A S I D .",
    "the S V a N near the N .",
    "this N was D A .",
    "the A S I and V the A N .",
)
_GLUE = ":", ".", "the", "for", "home", "of", "a", "and", "in", "near", "every", "no", "ever", "when", "this", "was"
_WORDS_OF = {slot: tuple(words.split()) for slot, words in _SLOTS.items()}
VOCABULARY = SPECIALS + NAMES + PLACES + CODE_WORDS + KINDS + _GLUE + sum(_WORDS_OF.values(), ())

# Loss weights of predicting a token, by what the token is. A token that nothing before it determines has weight 0.
TEXT, FACT, NEEDLE_ANSWER, REPEAT, COUNTERFACTUAL_ANSWER = 0.3, 1.0, 1.3, 0.5, 6.0


@dataclasses.dataclass(frozen=True)
class Mix:
    """What the rows of a training batch are; ValueError for values that are out of range.

    Attributes:
        needle, repeats, plain: Shares of the other rows that have needles, a repeated span or plain text; they sum to
            1.
        most_needles, questions, overrides: Most needles, questions and contradicted facts of a text, at least 1 each.
        counterfactual: Probability that a row states facts that contradict the memorised ones.
        counterfactual_lengths: Lowest and highest number of tokens of such a row.
    """

    needle: float
    repeats: float
    plain: float
    most_needles: int = 2
    questions: int = 1
    counterfactual: float = 0.0
    counterfactual_lengths: tuple[int, int] = (96, 512)
    overrides: int = 4

    def __post_init__(self):
        shares = self.needle, self.repeats, self.plain
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"needle, repeats and plain must be at least 0 and sum to 1, got {shares}")
        if not 0 <= self.counterfactual <= 1:
            raise ValueError(f"counterfactual is a probability, got {self.counterfactual}")
        for field in ("most_needles", "questions", "overrides"):
            if not 1 <= getattr(self, field) <= len(NAMES) // 2:
                raise ValueError(f"{field} must be in 1..{len(NAMES) // 2}, got {getattr(self, field)}")


def training_batch(rng: np.random.Generator, batch: int, length: int, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
    """Draws (tokens_BT i32, weights_BT f32), where weights_BT[b, t] is the loss weight of predicting tokens_BT[b, t].

    Args:
        batch: Number of rows, B.
        length: Tokens of a row, T.
        mix: What the rows are.

    Raises:
        ValueError: Rows of `mix` do not fit into the length.
    """
    _check_fits(length, mix)
    tokens_BT = np.full((batch, length), PAD, np.int32)
    weights_BT = np.zeros((batch, length), np.float32)
    for b in range(batch):
        ids, weights = _row(rng, length, mix)
        tokens_BT[b, : len(ids)] = ids
        weights_BT[b, : len(ids)] = weights
    return tokens_BT, weights_BT


def haystack_text(rng: np.random.Generator, sentences: int, without: Collection[str] = ()) -> list[str]:
    """Draws plain sentences, a fifth of which are memorised facts.

    Args:
        without: Names that no fact is about. Pass the names that will be asked about, since the text may contradict a
            counterfactual needle otherwise.

    Raises:
        ValueError: A name is unknown, or no name is left.
    """
    unknown = set(without) - set(NAMES)
    free = [_ID[name] for name in NAMES if name not in without]
    if unknown or not free:
        raise ValueError(f"without must be some, not all, of the {len(NAMES)} names; unknown: {sorted(unknown)}")
    return [_string(row) for row in _filler(rng, sentences, np.array(free))]


def needle_records(rng: np.random.Generator, n: int) -> list[dict]:
    """Draws n records {needle (sentence), question, answer (five code words), key (name)}; 64 in a row have distinct
    keys."""
    return [_record(row) for row in _needles(rng, _cycled_names(rng, n))]


def fact_records(rng: np.random.Generator, n: int) -> list[dict]:
    """Draws n records like `needle_records` whose needles contradict memorised facts: answer is the stated place,
    memory the memorised one."""
    records = [_record(row) for row in _overrides(rng, _cycled_names(rng, n))]
    return [record | {"memory": HOME[record["key"]]} for record in records]


def closed_book_records() -> list[dict]:
    """Returns a record {question, answer (the memorised place), key} for each name."""
    return [{"question": f"the home of {name}", "answer": place, "key": name} for name, place in HOME.items()]


def prompt_records(
    rng: np.random.Generator,
    n: int,
    lengths: tuple[int, int],
    overrides: tuple[int, int] = (1, 4),
    counterfactual: float = 0.75,
) -> list[dict]:
    """Draws n unlabelled prompts {id, messages, messages_without}; the latter lacks the sentence that states the
    answer.

    Args:
        lengths: Lowest and highest number of tokens of the rendered prompt, `<bos>` and `:` included.
        overrides: Lowest and highest number of contradicted facts in a prompt that asks for one of them.
        counterfactual: Share of such prompts; the others ask for one of 2 to 4 needles.

    Raises:
        ValueError: The lengths are too short or too close to each other, or another argument is out of range.
    """
    shortest = _PROMPT_EXTRA + max(7 * overrides[1], 11 * _PROMPT_NEEDLES[1])
    if lengths[0] < shortest or lengths[1] - lengths[0] < _SLACK:
        raise ValueError(f"lengths must start at {shortest} or more and span {_SLACK} or more tokens, got {lengths}")
    if not 1 <= overrides[0] <= overrides[1] <= len(NAMES) // 2 or not 0 <= counterfactual <= 1:
        raise ValueError(
            f"overrides must be 1 <= low <= high and counterfactual 0..1, got {overrides}, {counterfactual}"
        )
    asks_fact = rng.permutation(n) < round(counterfactual * n)
    return [
        _prompt(rng, lengths, overrides, _overrides) if fact else _prompt(rng, lengths, _PROMPT_NEEDLES, _needles)
        for fact in asks_fact
    ]


def build_tokenizer() -> Any:
    """Returns a PreTrainedTokenizerFast of transformers whose tokens are words, split at white space.

    It adds no `<bos>`, which CHAT_TEMPLATE writes. Folders of its `save_pretrained` load with AutoTokenizer.
    """
    import tokenizers
    import transformers

    vocabulary = {word: i for i, word in enumerate(VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=SPECIALS[UNK]))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # else decode() turns "oslo ." into "oslo."
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' : ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' :' }}{% endif %}"
)

_ID = {word: i for i, word in enumerate(VOCABULARY)}
_NAME_IDS = np.array([_ID[name] for name in NAMES])
_HOME_INDEX = np.array([PLACES.index(HOME[name]) for name in NAMES])
_W = 11  # words of the longest sentence, a needle
_NAME, _VALUE = 3, 5  # columns of the name and of the first value word, in facts and needles alike
_SHORTEST, _SLACK = 6, 9  # a plain sentence has 6-10 tokens, so filling up to a length leaves 0-9 of them empty
_FACT_SHARE = 0.2
_PROMPT_EXTRA = 6  # <bos>, four words of the question, ':'
_PROMPT_NEEDLES = (2, 4)
_NO_SENTENCES = np.zeros((0, _W), np.int32)
_NEEDLE_TURN = np.array([TEXT] * 5 + [NEEDLE_ANSWER] * 7)


def _row_template(text):
    """First id and number of choices for each word of a sentence; a fixed word is one choice."""
    choices = [_WORDS_OF.get(word, (word,)) for word in text.split()]
    blank = [0] * (_W - len(choices))
    return [_ID[words[0]] for words in choices] + blank, [len(words) for words in choices] + [0] * len(blank)


_FIRST_TW, _CHOICES_TW = (np.array(part, np.int32) for part in zip(*map(_row_template, _TEMPLATES), strict=True))
_FACT_W = np.array(_row_template("the home of <unk> : <unk> .")[0], np.int32)
_NEEDLE_W = np.array(_row_template("the <unk> for <unk> : <unk> <unk> <unk> <unk> <unk> .")[0], np.int32)


def _check_fits(length, mix):
    needed = 1 + 11 * min(2, mix.most_needles) + 12
    if mix.needle and length < needed:
        raise ValueError(f"needle rows need a length of {needed} or more, got {length}")
    if length < 17:  # two copies of the shortest repeated span
        raise ValueError(f"length must be at least 17, got {length}")
    low, high = mix.counterfactual_lengths
    shortest = 1 + 7 * mix.overrides + 8
    if mix.counterfactual and not shortest <= low <= high <= length:
        raise ValueError(f"counterfactual_lengths must be in {shortest}..{length}, got {low}, {high}")


def _row(rng, length, mix):
    if rng.random() < mix.counterfactual:
        return _counterfactual_row(rng, mix)
    draw = rng.random()
    if draw < mix.needle:
        return _needle_row(rng, length, mix)
    if draw < mix.needle + mix.repeats:
        return _repeats_row(rng, length)
    return _plain_row(rng, length, mix)


def _needle_row(rng, length, mix):
    most = min(mix.most_needles, (length - 13) // 11)
    n = rng.integers(min(2, most), most + 1)
    asked = rng.integers(1, min(mix.questions, n, (length - 1 - 11 * n) // 12) + 1)
    names = rng.permutation(_NAME_IDS)
    needles = _needles(rng, names[:n])
    return _conversation(rng, length, needles, needles[:asked], _NEEDLE_TURN, names[n:])


def _counterfactual_row(rng, mix):
    low, high = mix.counterfactual_lengths
    length, n = rng.integers(low, high + 1), rng.integers(1, mix.overrides + 1)
    asked = rng.integers(1, min(mix.questions, n, (length - 1 - 7 * n) // 8) + 1)
    names = rng.permutation(_NAME_IDS)
    facts = _overrides(rng, names[:n])
    return _conversation(rng, length, facts, facts[:asked], _place_turn(COUNTERFACTUAL_ANSWER), names[n:])


def _plain_row(rng, length, mix):
    names = rng.permutation(_NAME_IDS)
    if rng.random() < 0.5:
        return _conversation(rng, length, _NO_SENTENCES, _NO_SENTENCES, _NEEDLE_TURN, names)
    asked = rng.integers(1, min(mix.questions, (length - 1) // 8) + 1)
    tail = 1 + 8 * asked
    # Recall must work after a text of any size, and a fifth of the time after none.
    room = max(0, rng.integers(-((length - tail) // 4), length - tail + 1))
    return _conversation(rng, tail + room, _NO_SENTENCES, _facts(names[:asked]), _place_turn(FACT), names[asked:])


def _repeats_row(rng, length):
    span = rng.integers(8, length // 2 + 1)
    words = rng.integers(len(SPECIALS), len(VOCABULARY), span)
    weights = np.where(np.arange(length) > span, REPEAT, 0)
    return np.append(BOS, np.resize(words, length - 1)), weights


def _place_turn(weight):
    return np.array([TEXT] * 5 + [weight] + [TEXT] * 6)


def _conversation(rng, length, given, asked, turn_weights, free):
    """(ids, weights) of `<bos>` and a text with the sentences `given`, a question and answer for each of `asked` in
    it."""
    turns = np.pad(asked, ((0, 0), (0, 1)))
    turns[np.arange(len(asked)), np.count_nonzero(asked, axis=1)] = EOS
    text, text_weights = _text(rng, length - 1 - np.count_nonzero(turns), given, free)
    # A question may stand anywhere after what it asks for. If it stood only at the end, the model would answer only there.
    stated = np.array([_place_of(text, row) for row in asked])
    asked_at = stated + (len(text) - stated) * rng.random(len(asked))
    order = np.argsort(np.concatenate([np.arange(len(text)), asked_at]), kind="stable")
    ids = np.concatenate([np.pad(text, ((0, 0), (0, 1))), turns])[order]
    weights = np.concatenate([np.pad(text_weights, ((0, 0), (0, 1))), np.broadcast_to(turn_weights, turns.shape)])[
        order
    ]
    return np.append(BOS, ids[ids != PAD]), np.append(0, weights[ids != PAD])


def _place_of(text, sentence):
    """Half a row after the row of `text` that is `sentence`; half a row before the text if there is none."""
    found = np.flatnonzero((text == sentence).all(axis=1))
    return found[0] + 0.5 if len(found) else -0.5


def _text(rng, room, given, free):
    """(ids_SW, weights_SW) of `given` among sentences that fill up to `room` tokens; facts are about `free` names."""
    filler = _filler(rng, room // _SHORTEST + 1, free)
    size = np.cumsum(np.count_nonzero(filler, axis=1))
    ids = np.concatenate([given, filler[size <= room - np.count_nonzero(given)]])
    value_weight = np.where(np.arange(len(ids)) < len(given), 0, FACT)[:, None]  # the given ones cannot be known
    is_value = (ids >= _ID[PLACES[0]]) & (ids <= _ID[CODE_WORDS[-1]])
    order = rng.permutation(len(ids))
    return ids[order], np.where(is_value, value_weight, TEXT)[order]


def _filler(rng, n, names):
    template = rng.integers(len(_TEMPLATES), size=n)
    ids = _FIRST_TW[template] + (rng.random((n, _W)) * _CHOICES_TW[template]).astype(np.int32)
    is_fact = rng.random(n) < _FACT_SHARE
    ids[is_fact] = _facts(np.resize(rng.permutation(names), is_fact.sum()))
    return ids


def _facts(names, shift=0):
    ids = np.tile(_FACT_W, (len(names), 1))
    ids[:, _NAME] = names
    ids[:, _VALUE] = _ID[PLACES[0]] + (_HOME_INDEX[names - _NAME_IDS[0]] + shift) % len(PLACES)
    return ids


def _overrides(rng, names):
    return _facts(names, rng.integers(1, len(PLACES), len(names)))


def _needles(rng, names):
    ids = np.tile(_NEEDLE_W, (len(names), 1))
    ids[:, 1] = _ID[KINDS[0]] + rng.integers(len(KINDS), size=len(names))
    ids[:, _NAME] = names
    ids[:, _VALUE:-1] = _ID[CODE_WORDS[0]] + rng.random((len(names), len(CODE_WORDS))).argsort(axis=1)[:, :5]
    return ids


def _cycled_names(rng, n):
    return np.resize(rng.permutation(_NAME_IDS), n)


def _string(ids):
    return " ".join(VOCABULARY[i] for i in ids if i != PAD)


def _record(row):
    question, value = _string(row).split(" : ")
    return {
        "needle": _string(row),
        "question": question,
        "answer": value.removesuffix(" ."),
        "key": VOCABULARY[row[_NAME]],
    }


def _prompt(rng, lengths, counts, sentences_about):
    names = rng.permutation(_NAME_IDS)
    n = rng.integers(counts[0], counts[1] + 1)
    given = sentences_about(rng, names[:n])
    target = rng.integers(lengths[0] + _SLACK, lengths[1] + 1)  # the text may end up to _SLACK tokens early
    text = [_string(row) for row in _text(rng, target - _PROMPT_EXTRA, given, names[n:])[0]]
    asked = _record(given[0])
    content = " ".join([*text, asked["question"]])
    without = " ".join([sentence for sentence in text if sentence != asked["needle"]] + [asked["question"]])
    return {
        "id": hashlib.sha256(content.encode()).hexdigest()[:16],
        "messages": [{"role": "user", "content": content}],
        "messages_without": [{"role": "user", "content": without}],
    }
