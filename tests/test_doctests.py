"""Every public name has an example in its docstring, which runs as it stands and prints what it says; annotations are
complete, and true of every call in them and of arrays of other kinds."""

import doctest
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import jaxtyped

import retmask_jax as rm
from retmask_jax.generation import logprobs
from retmask_jax.generation.decode import generate
from retmask_jax.model.masking import normalise
from retmask_jax.training import losses

PUBLIC = [name for name in rm.__all__ if name != "__version__"]
METHODS = [
    f"{name}.{method}"
    for name in ("LanguageModel", "HeadScores")
    for method, value in vars(getattr(rm, name)).items()
    if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod))
]
NAMES = [*PUBLIC, *METHODS, *(f"Interventions.{name}" for name in ("none", "__or__", "save", "load"))]


FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(rm, name))]
ARRAYS = [  # public functions and methods of which arguments or results are arrays
    "forward",
    "sequence_logprobs",
    "dpo_loss",
    "mask_heads",
    "mask_queries",
    "needle_recall",
    "look",
    "LanguageModel.logits",
    "LanguageModel.generate",
    "HeadScores.from_array",
    "from_params",
]


def checked(function):
    """The function, which raises where an argument or the result is not as annotated."""
    if isinstance(function, classmethod):
        return classmethod(checked(function.__func__))
    return jaxtyped(typechecker=beartype)(function)


@pytest.fixture
def checked_api(monkeypatch):
    """Everything public with its annotations checked at every call."""
    for name in FUNCTIONS:
        monkeypatch.setattr(rm, name, checked(getattr(rm, name)))
    for name in METHODS:
        kind, method = name.split(".")
        monkeypatch.setattr(getattr(rm, kind), method, checked(vars(getattr(rm, kind))[method]))


def fits(value) -> bool:
    """Whether the fields of a dataclass of arrays are as annotated, with one size per axis."""
    with jaxtyped("context"):
        return all(is_bearable(getattr(value, name), hint) for name, hint in typing.get_type_hints(type(value)).items())


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_prints_what_it_says(name, checked_api, tmp_path, monkeypatch):
    """In a folder and with names of its own, as it would be pasted, and with annotations checked at every call."""
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(docstring(name), {}, name, None, None)
    assert example.examples, f"{name} has no example"
    assert any(line.want for line in example.examples), f"the example of {name} prints nothing"
    told = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=told.append).failed == 0, "".join(told)


def docstring(name):
    value = rm
    for part in name.split("."):
        value = getattr(value, part)
    return value.__doc__ or ""


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_every_parameter_and_result_is_annotated(name):
    kind, _, method = name.partition(".")
    function = inspect.unwrap(getattr(getattr(rm, kind), method) if method else getattr(rm, kind))
    signature = inspect.signature(function)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
    assert bare == [] and signature.return_annotation is not signature.empty
    assert (name in ARRAYS) == ("jaxtyping" in str(signature))


def test_arrays_of_every_kind_keep_to_the_annotations(read_golden, checked_api):
    """NumPy, JAX and lists; under jit, vmap and grad; with and without a row axis."""
    lm, (B, T) = read_golden("bf16").lm.with_kernel("plain"), (2, 9)
    L, H = lm.config.n_layers, lm.config.n_heads
    tokens = np.random.default_rng(0).integers(4, lm.config.vocab_size, (B, T)).astype(np.int32)
    assert rm.forward(lm.config, lm.params, tokens.tolist(), [T, T]).shape == (B, T, lm.config.vocab_size)
    assert lm.logits(jnp.asarray(tokens), positions=np.array([[0], [3]])).shape == (B, 1, lm.config.vocab_size)

    def score(gates):
        masked = rm.Interventions(head_mask=gates)
        return checked(logprobs.sequence_logprobs)(lm.config, lm.params, tokens, tokens > 0, interventions=masked).sum()

    slope = jax.jit(jax.vmap(jax.grad(score)))(jnp.zeros((1, L, H)))
    assert slope.shape == (1, L, H)
    for heads in ([], [(0, 0)]):
        masks = rm.mask_heads(lm.config, heads)
        assert fits(masks) and fits(rm.stack([masks] * B))
        assert fits(normalise(lm.config, masks)) and fits(normalise(lm.config, rm.stack([masks] * B), B))
    out = checked(generate)(lm.config, lm.params, tokens, [T, T], max_new_tokens=2, probe=True)
    assert fits(out)


def test_losses_keep_to_the_annotations():
    logits, logps = jnp.zeros((2, 3, 5)), jnp.zeros(4)
    assert checked(losses.contrast_loss)(logits, logits, 0.5).shape == (2, 3)
    assert checked(rm.dpo_loss)(logps, logps, None, None, kind="simpo").shape == (4,)


@pytest.mark.parametrize(
    "call",
    [
        lambda lm: checked(rm.forward)(lm.config, lm.params, np.zeros((2, 3), np.float32)),
        lambda lm: checked(rm.forward)(lm.config, lm.params, np.zeros((2, 3), int), np.array([3])),
        lambda lm: checked(rm.dpo_loss)(jnp.zeros(4), jnp.zeros(3), None, None),
        lambda lm: checked(losses.contrast_loss)(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 4)), 0.5),
        lambda lm: checked(rm.mask_heads)(lm.config, [(0, 0)], jnp.zeros((2, 3))),
    ],
)
def test_the_check_sees_a_wrong_shape_or_kind(call, tiny):
    with pytest.raises((BeartypeCallHintViolation, TypeError)):
        call(tiny)
    wrong = rm.Interventions(head_mask=np.zeros((3, 4), bool), rope_mask=np.zeros((3, 5, 2), bool))
    assert not fits(wrong)
