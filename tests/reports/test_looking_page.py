"""The page of what heads look at, on made-up results: what it holds, how large it is, and that nothing gets out of it."""

import base64
import json
import re

import numpy as np
import pytest
from helpers_looks import made_up
from helpers_results import Page

import retmask_jax as rm
from retmask_jax.reports.looking.page import looking_page, page_data
from retmask_jax.reports.looking.view import Look


def data_of(page):
    """What the page's program would read."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpacked(data, reply, step, layer, head):
    """[(position, weight), ...] of one head and step, as the page's program finds them."""
    counts = np.frombuffer(base64.b64decode(reply["counts"]), np.uint8)
    entries = np.frombuffer(base64.b64decode(reply["keys"]), "<u4")
    place = (step * data["layers"] + layer) * data["heads"] + head
    first = int(counts[:place].sum())
    return [(int(entry >> 12), (entry & 4095) / 4095) for entry in entries[first : first + int(counts[place])]]


def test_the_page_holds_the_keys_of_every_head_and_step():
    looks = made_up()
    data = data_of(looking_page(looks))
    assert (data["tokens"], data["span"], data["chosen"]) == (looks.texts, [10, 12], [6, 8])
    for reply, kept in zip(looks.replies, data["replies"], strict=True):
        assert (kept["name"], kept["tokens"]) == (reply.name, reply.texts)
        for model, chances in reply.probabilities.items():
            np.testing.assert_allclose(kept[model], chances, rtol=2e-3)
        for step, layer, head in np.ndindex(reply.keys.shape[:3]):
            found = unpacked(data, kept, step, layer, head)
            expected = [
                (int(key), float(weight))
                for key, weight in zip(reply.keys[step, layer, head], reply.weights[step, layer, head], strict=True)
                if weight >= 1 / 400
            ]
            assert [key for key, _ in found] == [key for key, _ in expected]
            np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], atol=1 / 8000)
    np.testing.assert_allclose(data["scores"], looks.scores.mean.ravel(), rtol=1e-3)


def test_of_large_models_and_long_texts_the_strongest_keys_stay():
    """Those of the chosen heads in full."""
    heads = [(16, 3), (17, 4), (30, 31)]
    looks = made_up((32, 32), 8000, (" ".join("abcdefghijklmnopqrstuvwx"),) * 2, heads=heads)
    looks.replies[0].weights[:, 17, 4] = 1 / 64
    looks.replies[0].keys[:, 17, 4] = np.arange(64)
    page = looking_page(looks)
    assert 500_000 < len(page.encode()) < 2_000_000
    data = data_of(page)
    assert len(unpacked(data, data["replies"][0], 5, 17, 4)) == 64
    kept = [len(unpacked(data, data["replies"][0], 5, 3, head)) for head in range(32)]
    assert min(kept) >= 1 and max(kept) <= 8


NASTY = '</script><script>alert("1")</script><!-- & \u2028 <b onclick=x>'


def test_no_text_of_a_prompt_or_an_answer_gets_out_of_the_data():
    texts = ["<s>", NASTY, *(f" w{i}" for i in range(2, 40))]
    looks = made_up(texts=texts, model=NASTY)
    looks.replies[0].texts[1] = NASTY
    page = looking_page(looks)
    assert data_of(page)["tokens"] == texts and data_of(page)["replies"][0]["tokens"][1] == NASTY
    assert page.count("<script") == 2 == page.count("</script>")
    assert "<b onclick" not in page and "<!--" not in page
    assert [attributes for tag, attributes in Page(page).tags if "onclick" in attributes] == []


def test_the_page_asks_for_nothing_else():
    page = looking_page(made_up())
    assert "http" not in page and "@import" not in page and "url(" not in page
    assert not [tag for tag, attributes in Page(page).tags if {"src", "href"} & attributes.keys()]


def test_in_a_notebook_the_page_is_in_a_frame_of_its_own(tmp_path):
    look = Look(made_up(model='a "b" <i>'))
    shown = look._repr_html_()
    ((tag, attributes),) = Page(shown + "x").tags
    assert tag == "iframe" and attributes["srcdoc"] == str(looking_page(look.looks))
    look.save(tmp_path / "new" / "look.html")
    assert (tmp_path / "new" / "look.html").read_text() == attributes["srcdoc"]
    assert repr(look) == "Look(40 tokens, heads [(1, 2), (2, 0)], untouched: ' 7 1 .', masked: ' no .')"


def test_attention_and_patterns_have_the_axes_they_say():
    """CircuitsVis takes heads x destination x source, with one list of tokens for both."""
    look = Look(made_up())
    assert look.attention.shape == (3, 43, 2) and len(look.tokens) == 43
    tokens, patterns = look.patterns()
    assert tokens == ["<s>", " w10", " w11", " w12", " w39", " 7", " 1"]
    assert patterns.shape == (2, 7, 7) and patterns.dtype == np.float32
    expected = np.zeros((7, 7))
    expected[[4, 5, 6], [1, 2, 3]], expected[4:, 0] = 0.6, 0.3
    np.testing.assert_allclose(patterns[1], expected)
    assert look.patterns(least=0.5)[0] == [" w10", " w11", " w12", " w39", " 7", " 1"]


def test_one_call_gives_a_page_of_the_bundled_model():
    look = rm.look(rm.load("bundled"), heads=4, max_new_tokens=4)
    data = page_data(look.looks)
    assert data["layers"] == 4 and data["heads"] == 8 and {head // 8 for head in data["chosen"]} == {1}
    assert data["span"] and len(data["tokens"]) <= 256
    best = look.heads[0]
    (key, weight), *_ = unpacked(data, data["replies"][0], 0, *best)
    assert data["tokens"][key] == data["replies"][0]["tokens"][0] and weight > 0.5
    assert look.attention[0, key, 0] == pytest.approx(weight, abs=1e-3)
