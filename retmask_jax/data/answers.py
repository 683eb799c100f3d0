"""Answers against references in any script: words, ROUGE-1 recall, and whether one text holds the words of another."""

import functools
import re
import unicodedata

# Scripts written without spaces between words, by first and last code point; their tokens are characters.
_UNSPACED = (
    # Thai, Lao, Burmese, Khmer, the scripts of the Tai, Balinese, Javanese
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19DF),
    (0x1A20, 0x1AAF),
    (0x1B00, 0x1B7F),
    (0xA980, 0xA9FF),
    (0xAA60, 0xAADF),
    # Chinese, Japanese, Yi
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x312F),
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),
    (0xF900, 0xFAFF),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_JOINERS = "\u200c\u200d"  # inside words of Persian and of the scripts of India


def words(text: str) -> list[str]:
    """Returns the words of a text in any script, case folded and without punctuation, as `holds` compares them.

    In scripts without spaces (Chinese, Japanese, Thai, ...) each character is a word, with the marks that belong to it.
    Compatible forms are equal (NFKC: full-width letters, composed accents), and so are the decimal digits of all
    scripts.

    >>> words("Die Straße, 12 km"), words("東京はA1")
    (['die', 'strasse', '12', 'km'], ['東', '京', 'は', 'a1'])
    """
    if text.isascii():
        return re.findall(r"\w+", text.lower())
    return _split(text, lambda char: char == "_" or unicodedata.category(char)[0] in "LMN")


def holds(text: str, part: str) -> bool:
    """Returns whether the words of `part`, at least one, occur in `text` in a row.

    >>> holds("In the cat, he said", "THE CAT"), holds("concatenate", "cat"), holds("首都は東京です", "東京")
    (True, False, True)
    """
    wanted = " ".join(words(part))
    return bool(wanted) and f" {wanted} " in f" {' '.join(words(text))} "


def rouge1_recall(answer: str, reference: str) -> float:
    """Returns the ROUGE-1 recall, from 0 to 1, of an answer against a reference, over `rouge_tokens`."""
    return _scorer().score(reference, answer)["rouge1"].recall


def rouge_tokens(text: str) -> list[str]:
    """Returns the tokens that ROUGE counts.

    ASCII text is split by rouge-score's tokenizer, with its stemmer for English; it knows no other letters. Other text
    is split as in `words`, but also at "_" and at signs such as "½", as rouge-score does.

    >>> rouge_tokens("She walked 2 miles"), rouge_tokens("Она шла")
    (['she', 'walk', '2', 'mile'], ['она', 'шла'])
    """
    if text.isascii():
        return _english().tokenize(text)
    tokens = _split(text, lambda char: unicodedata.category(char) in _ROUGE)
    return [token for word in tokens for token in (_english().tokenize(word) if word.isascii() else [word])]


_ROUGE = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl"}


class _Tokenizer:
    """`rouge_tokens` in the form that rouge-score takes."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_tokens(text)


@functools.cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_Tokenizer())


@functools.cache
def _english():
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def _split(text: str, of_words) -> list[str]:
    """Runs of characters for which of_words holds. Characters of scripts without spaces stand alone; marks stay with
    the character before them."""
    text = "".join(char if of_words(char) or char in _JOINERS else " " for char in text)
    tokens: list[str] = []
    last = ""  # the kind of the character before: "word", "character", or "" where no token is open
    for char in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        if char in _JOINERS and last and not tokens[-1].isascii():
            continue
        kind = _kind(char) if of_words(char) else ""
        if kind == "mark":
            if last:
                tokens[-1] += char
            continue
        if kind == "word" and last == "word":
            tokens[-1] += _plain(char)
        elif kind:
            tokens.append(_plain(char))
        last = kind
    return tokens


@functools.cache
def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category[0] == "M":
        return "mark"
    unspaced = category[0] == "L" or category == "Nl"
    return "character" if unspaced and any(a <= ord(char) <= b for a, b in _UNSPACED) else "word"


def _plain(char: str) -> str:
    """Decimal digits of any script as 0 to 9."""
    value = unicodedata.decimal(char, None)
    return char if value is None else str(value)
