import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer
from reformer import (
    BitSampling,
    Codeword,
    CrossPolytope,
    DecodeState,
    HadamardCrossPolytope,
    HashFamily,
    Hyperplane,
    OrthogonalHyperplane,
    Random,
    RecomputeWarning,
    ReformerConfig,
    ReformerLM,
    Syndrome,
)
from reformer.attention.modules import Attended, SharedQueryKeyAttention
from reformer.generation import CachedDecode, RecomputedDecode, start_decode
from tests.reformer.helpers import (
    BATCH,
    assert_all_close,
    integers,
    normal,
    pairwise,
    small_config,
    small_model,
    small_tokens,
)
from tests.reformer.operands import LargestOperand

LENGTH = 61
PUBLISHED = {"causality": "published", "layers": ("lsh",)}


def model_of(*, dtype: torch.dtype = torch.float64, **settings: Any) -> ReformerLM:
    """A small model of mixed layers in eval mode, for sequences that are not a whole number of chunks."""
    defaults = {"max_length": LENGTH, "layers": ("lsh", "local"), "n_layers": 2}
    return small_model(dtype=dtype, **(defaults | settings)).eval()


def decoded_logits(
    model: ReformerLM, tokens: Tensor, *, prompt: int, padding_mask: Tensor | None = None
) -> Tensor:
    """Logits from the last token of the prompt on, a token at a time."""
    state = model.start_decode(
        tokens[:, :prompt],
        max_new_tokens=tokens.shape[1] - prompt,
        padding_mask=None if padding_mask is None else padding_mask[:, :prompt],
    )
    assert isinstance(state, CachedDecode)
    steps = [state.step(token) for token in tokens[:, prompt:].unbind(dim=1)]
    start = model.start_decode(
        tokens[:, :prompt],
        max_new_tokens=1,
        padding_mask=None if padding_mask is None else padding_mask[:, :prompt],
    )
    return torch.stack([start.logits, *steps], dim=1)


# Cached decoding equals the parallel pass.


DECODES: dict[str, tuple[Any, ...]] = {
    "layers": (
        ("lsh",),
        ("local",),
        ("full",),
        ("full_standard",),
        ("oracle",),
        ("local", "lsh"),
        ("lsh", "full", "full_standard"),
        ("local", "lsh", "oracle"),
    ),
    "duplicates": ("count", "sum"),
    "n_hashes": (1, 2, 4),
    "n_buckets": (2, 8, (2, 4), None),
    "n_chunks_before": (1, 2, 3),
    "chunk_length": (3, 7),
    "local_n_chunks_before": (0, 1, 2),
    "local_chunk_length": (None, 5),
    "logit_scale": ("trax", "sqrt_d"),
    "seams": ("masked", "reference"),
    "positions": ("learned", "axial", "sinusoidal", "rotary"),
    "residual": ("plain", "checkpoint", "reversible", "reversible_exact"),
    "merge": ("concat", "mean"),
    "n_layers": (1, 2, 3),
    "prompt": (1, 2, 20, 21, 38, LENGTH - 1),
    "padding": ("none", "left", "anywhere"),
}


@pytest.mark.parametrize("row", pairwise(DECODES))
def test_cached_decoding_gives_the_logits_of_the_parallel_pass(row: dict[str, Any]) -> None:
    settings = dict(row)
    prompt, padding = settings.pop("prompt"), settings.pop("padding")
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if padding == "left":
        real[0, : prompt // 2] = False
    elif padding == "anywhere":
        real = normal(BATCH, LENGTH, seed=5) > -0.5
    real[:, prompt - 1 :] = True
    model, tokens = model_of(**({"d_head": 6} | settings)), small_tokens(LENGTH)
    with torch.no_grad():
        expected = model(tokens, padding_mask=real)[:, prompt - 1 :]
    logits = decoded_logits(model, tokens, prompt=prompt, padding_mask=real)
    assert_all_close([logits], [expected], tolerance=1e-9)


FAMILIES: tuple[HashFamily, ...] = (
    BitSampling(),
    Codeword(),
    CrossPolytope(),
    HadamardCrossPolytope(),
    Hyperplane(),
    OrthogonalHyperplane(),
    Random(),
    Syndrome(row_weight=2),
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_so_it_does_for_every_hash_family(family: HashFamily) -> None:
    model, tokens = model_of(layers=("lsh",), hashing=family), small_tokens(LENGTH)
    expected = model(tokens)[:, 19:]
    assert_all_close([decoded_logits(model, tokens, prompt=20)], [expected], tolerance=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_hashes": 3},
        {"hash_seed": 1},
        {"hashing": Hyperplane(), "n_hashes": 1},
        {"kind": "full"},
        {"kind": "oracle"},
        {"kind": "random"},
        {"kind": "knock_out"},
    ],
    ids=str,
)
def test_so_it_does_under_other_settings_of_attention(settings: dict[str, Any]) -> None:
    model, tokens = model_of(), small_tokens(LENGTH)
    plain = model(tokens)[:, 19:]
    with model.attending(**settings):
        expected = model(tokens)[:, 19:]
        logits = decoded_logits(model, tokens, prompt=20)
    assert not torch.allclose(expected, plain)
    assert_all_close([logits], [expected], tolerance=1e-9)


def test_so_it_does_after_training_forwards_moved_the_hash_draw() -> None:
    model, tokens = model_of(n_hashes=1), small_tokens(LENGTH)
    before = decoded_logits(model, tokens, prompt=20)
    model.train()
    model(tokens)
    model.eval()
    logits = decoded_logits(model, tokens, prompt=20)
    assert not torch.allclose(logits, before)
    assert_all_close([logits], [model(tokens)[:, 19:]], tolerance=1e-9)


def test_so_it_does_over_many_chunks() -> None:
    # Stores are cleared out many times, and rings go round.
    length = 311
    model = model_of(max_length=length, n_hashes=2, n_buckets=4, chunk_length=3, local_chunk_length=5)
    tokens = small_tokens(length)
    logits = decoded_logits(model, tokens, prompt=10)
    assert_all_close([logits], [model(tokens)[:, 9:]], tolerance=1e-9)


# In float32 a bucket near a tie may flip.


@contextmanager
def recorded_buckets(model: ReformerLM) -> Iterator[dict[int, list[Tensor]]]:
    """Buckets of each layer, a tensor a pass."""
    recorded: dict[int, list[Tensor]] = {}

    def record(module: SharedQueryKeyAttention, _: Any, attended: Attended) -> None:
        assert attended.buckets is not None
        recorded.setdefault(module.layer, []).append(attended.buckets)

    layers = [module for module in model.modules() if isinstance(module, SharedQueryKeyAttention)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    yield recorded
    for handle in handles:
        handle.remove()


@contextmanager
def given_buckets(model: ReformerLM, buckets: dict[int, Tensor]) -> Iterator[None]:
    """Each pass takes the buckets of its own positions from these."""

    def give(
        module: SharedQueryKeyAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions, seq = kwargs["call"].positions, args[0].shape[1]
        start = 0 if positions is None else int(positions[0, 0])
        return args, kwargs | {"buckets": buckets[module.layer][..., start : start + seq]}

    layers = [module for module in model.modules() if isinstance(module, SharedQueryKeyAttention)]
    handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_narrow_types_decode_as_in_parallel_given_the_same_buckets(
    dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of(dtype=dtype, layers=("lsh",), n_layers=3)
    tokens = small_tokens(LENGTH)
    with torch.no_grad(), recorded_buckets(model) as recorded:
        expected = model(tokens)
    with given_buckets(model, {layer: passes[0] for layer, passes in recorded.items()}):
        logits = decoded_logits(model, tokens, prompt=7)
    assert_all_close([logits], [expected[:, 6:]], tolerance=tolerance)


def test_hardly_a_bucket_flips_in_float32(record_property: Any) -> None:
    model = model_of(dtype=torch.float32, layers=("lsh",), n_layers=3, n_hashes=4)
    tokens = small_tokens(LENGTH)
    with torch.no_grad(), recorded_buckets(model) as recorded:
        model(tokens)
        parallel = {layer: passes.pop()[..., 7:] for layer, passes in recorded.items()}
        state = model.start_decode(tokens[:, :7], max_new_tokens=LENGTH - 7)
        for token in tokens[:, 7:].unbind(dim=1):
            state.step(token)
    stepped = {layer: torch.cat(passes[1:], dim=-1) for layer, passes in recorded.items()}
    flipped = torch.stack([stepped[layer] != parallel[layer] for layer in parallel]).double().mean()
    record_property("share_of_flipped_buckets", float(flipped))
    assert flipped < 1e-3


def test_every_step_hashes_by_the_rotation_of_the_prompt() -> None:
    model, tokens = model_of(layers=("lsh",), n_layers=1), small_tokens(LENGTH)
    same = tokens.clone()
    # Without positions a token's bucket in the first layer is that of its id, at any step.
    same[:] = 3
    assert model.positions is not None
    for parameter in model.positions.parameters():
        torch.nn.init.zeros_(parameter)
    with recorded_buckets(model) as recorded:
        state = model.start_decode(same[:, :5], max_new_tokens=50)
        for token in same[:, 5:55].unbind(dim=1):
            state.step(token)
    buckets = torch.cat(recorded[0], dim=-1)
    assert buckets.shape[-1] == 55
    assert (buckets == buckets[:1, :, :, :1]).all()


# Batches and ragged prompts.


def prompts(lengths: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths with padding behind them, and which tokens are real."""
    tokens = integers(23, len(lengths), max(lengths), seed=seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens, real


KINDS = ("lsh", "local", "full", "full_standard")


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("layers", [("lsh",), ("local",), ("full",), ("full_standard",), KINDS], ids=str)
@pytest.mark.parametrize("lengths", [(20, 20, 20), (1, 14, 23, 6)], ids=["even", "ragged"])
def test_each_row_of_a_batch_is_written_on_as_if_alone(
    layers: tuple[str, ...], lengths: tuple[int, ...], positions: str
) -> None:
    model = model_of(layers=layers, n_layers=len(layers), d_head=6, positions=positions)
    tokens, real = prompts(lengths)
    together = model.generate(tokens, max_new_tokens=17, padding_mask=real)
    assert together.shape == (len(lengths), 17)
    assert len({tuple(row.tolist()) for row in together}) > 1
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, :length], max_new_tokens=17)
        assert torch.equal(together[row : row + 1], alone), row


def test_ragged_rows_have_the_logits_of_their_own_parallel_pass() -> None:
    model = model_of(layers=KINDS, n_layers=4, d_head=6)
    lengths = (1, 14, 23)
    tokens, real = prompts(lengths)
    new = integers(23, 3, 30, seed=7)
    state = model.start_decode(tokens, max_new_tokens=30, padding_mask=real)
    logits = torch.stack([state.logits, *(state.step(token) for token in new.unbind(dim=1))], dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens[row, :length], new[row]])[None]
        assert_all_close([logits[row]], [model(alone)[0, length - 1 :]], tolerance=1e-9)


def test_what_stands_at_padding_and_how_much_of_it_is_behind_moves_nothing() -> None:
    model = model_of(layers=KINDS, n_layers=4, d_head=6)
    tokens, real = prompts((5, 14, 9))
    written = model.generate(tokens, max_new_tokens=20, padding_mask=real)
    other = torch.where(real, tokens, (tokens + 1) % 23)
    other = torch.cat([other, integers(23, 3, 40)], dim=1)
    real = torch.cat([real, torch.zeros(3, 40, dtype=torch.bool)], dim=1)
    assert torch.equal(model.generate(other, max_new_tokens=20, padding_mask=real), written)


# Greedy, and what is left as it was.


def greedy_by_hand(model: ReformerLM, tokens: Tensor, *, count: int) -> Tensor:
    """The most likely next token again and again, by parallel passes alone."""
    prompt = tokens.shape[1]
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens[:, prompt:]


@pytest.mark.parametrize("prompt", [1, 6, 20])
def test_greedy_writing_takes_the_most_likely_token_each_time(prompt: int) -> None:
    model, tokens = model_of(), small_tokens(prompt)
    written = model.generate(tokens, max_new_tokens=25)
    assert written.dtype == torch.int64
    assert torch.equal(written, greedy_by_hand(model, tokens, count=25))
    assert torch.equal(model.generate(tokens, max_new_tokens=7), written[:, :7])


def test_a_prompt_may_be_continued_up_to_the_longest_sequence() -> None:
    model, tokens = model_of(), small_tokens(20)
    assert model.generate(tokens, max_new_tokens=LENGTH - 20).shape == (BATCH, LENGTH - 20)


@pytest.mark.parametrize("rows", [0, BATCH])
def test_no_rows_give_no_tokens(rows: int) -> None:
    model = model_of(layers=("lsh", "local", "full", "full_standard", "oracle"), n_layers=5)
    written = model.generate(small_tokens(8)[:rows], max_new_tokens=3, temperature=1.0)
    assert written.shape == (rows, 3)


def test_sampling_follows_seed_and_row_and_leaves_the_global_streams_alone(unchecked: None) -> None:
    model, tokens = model_of(), small_tokens(9)[:1].repeat(3, 1)
    settings = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 15, "top_p": 0.95}
    # Unchecked, since beartype draws from Python's stream which items it looks at.
    before = torch.get_rng_state(), random.getstate()
    written = model.generate(tokens, **settings)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert len({tuple(row.tolist()) for row in written}) == 3
    torch.manual_seed(7)
    assert torch.equal(model.generate(tokens, **settings), written)
    # A row draws the same whatever the others are, and however many.
    other = torch.cat([tokens[:2], small_tokens(9, seed=5)])
    assert torch.equal(model.generate(other, **settings)[:2], written[:2])
    assert not torch.equal(model.generate(tokens, **settings, seed=1), written)


def test_one_token_to_draw_from_is_greedy() -> None:
    model, tokens = model_of(), small_tokens(9)
    greedy = model.generate(tokens, max_new_tokens=20)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(model.generate(tokens, max_new_tokens=20, temperature=2.0, **narrow), greedy)


def test_modes_draws_state_and_gradients_are_left_as_they_were() -> None:
    model, tokens = model_of(dropout=0.3, attention_dropout=0.3, hash_dropout=0.3), small_tokens(9)
    expected = model.generate(tokens, max_new_tokens=20)
    model.train()
    model.get_submodule("blocks.1").eval()
    modes = [module.training for module in model.modules()]
    state = {name: x.clone() for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    draw = model.get_extra_state()["draw"]
    written = model.generate(tokens, max_new_tokens=20)
    assert torch.equal(written, expected)
    assert [module.training for module in model.modules()] == modes
    assert model.get_extra_state()["draw"] == draw
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items())
    assert set(state) == {name for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error_too() -> None:
    model = model_of().train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(small_tokens(9), max_new_tokens=LENGTH)
    assert all(module.training for module in model.modules())


def test_decoding_runs_under_autocast() -> None:
    model, tokens = model_of(dtype=torch.float32, layers=KINDS, n_layers=4, d_head=6), small_tokens(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(tokens, max_new_tokens=5).shape == (BATCH, 5)


# Cost.


def test_the_cost_of_a_token_does_not_grow_with_the_length() -> None:
    length = 3001
    model = model_of(max_length=length, n_buckets=4, axial_shape=None, positions="axial", n_layers=4)
    tokens = small_tokens(length)
    largest, kept = [], []
    for prompt in (750, length - 10):
        state = model.start_decode(tokens[:, :prompt], max_new_tokens=10)
        new = tokens[:, :5].clone().unbind(dim=1)
        with LargestOperand() as operand:
            for token in new:
                state.step(token)
        largest.append(operand.numel)
        kept.append([x.shape for x in cached_tensors(state)])
    assert largest[0] == largest[1] < 50_000
    assert kept[0] == kept[1]
    assert len(kept[0]) >= 8


def cached_tensors(state: DecodeState) -> list[Tensor]:
    caches = vars(state)["_call"].caches.of_layer.values()
    return [x for cache in caches for x in vars(cache).values() if isinstance(x, Tensor)]


# Where nothing can be cached.


RECOMPUTED: tuple[dict[str, Any], ...] = (
    {"causality": "published"},
    {"causality": "bucket"},
    {"causality": "published", "seams": "reference"},
    {"causality": "published", "duplicates": "sum", "n_chunks_before": 0, "n_chunks_after": 1},
    {"conventions": "transformers"},
    {"conventions": "transformers", "layers": ("local",)},
)


@pytest.mark.parametrize("settings", RECOMPUTED, ids=str)
def test_what_looks_ahead_is_read_again_for_each_token_and_says_so_once(settings: dict[str, Any]) -> None:
    model, tokens = model_of(**settings), small_tokens(9)
    with pytest.warns(RecomputeWarning, match="each new token costs a pass over all before it") as warned:
        written = model.generate(tokens, max_new_tokens=15)
    assert len(warned) == 1
    assert torch.equal(written, greedy_by_hand(model, tokens, count=15))


def test_that_warning_names_the_conventions_and_those_that_can_be_cached() -> None:
    model = model_of(conventions="transformers")
    with pytest.warns(RecomputeWarning, match=r"conventions='transformers': .*use .* and conventions='own'"):
        model.generate(small_tokens(9), max_new_tokens=1)


def test_without_an_lsh_layer_nothing_looks_ahead() -> None:
    model, tokens = model_of(causality="published", layers=("local", "full")), small_tokens(9)
    assert torch.equal(model.generate(tokens, max_new_tokens=5), greedy_by_hand(model, tokens, count=5))
    model = model_of(causality="published", layers=("lsh",))
    with model.attending(kind="full"):
        model.generate(tokens, max_new_tokens=5)


def test_recomputed_rows_are_written_on_as_if_alone_too() -> None:
    model = model_of(**PUBLISHED)
    lengths = (1, 14, 9)
    tokens, real = prompts(lengths)
    with pytest.warns(RecomputeWarning):
        together = model.generate(tokens, max_new_tokens=10, padding_mask=real)
    for row, length in enumerate(lengths):
        with pytest.warns(RecomputeWarning):
            alone = model.generate(tokens[row : row + 1, :length], max_new_tokens=10)
        assert torch.equal(together[row : row + 1], alone)


def test_recomputing_and_caching_agree_where_both_are_right() -> None:
    model, tokens = model_of(), small_tokens(20)
    call = model.attention_call()
    arguments = {"ends": torch.full((BATCH,), 20), "padding_mask": None, "room": 10, "call": call}
    cached = model.start_decode(tokens, max_new_tokens=10)
    with pytest.warns(RecomputeWarning), torch.no_grad():
        recomputed = RecomputedDecode(model, model.head, tokens, **arguments)
    for token in small_tokens(10, seed=4).unbind(dim=1):
        assert_all_close([cached.step(token)], [recomputed.step(token)], tolerance=1e-9)


# Refusals.


@pytest.mark.parametrize(
    ("tokens", "settings", "says"),
    [
        (
            small_tokens(20),
            {"max_new_tokens": LENGTH - 19},
            f"max_new_tokens={LENGTH - 19}: with a prompt of 20 more than max_length={LENGTH}; "
            f"ask for fewer, or build the model with max_length={LENGTH + 1}",
        ),
        (small_tokens(5), {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        (
            small_tokens(0),
            {},
            r"tokens of shape \(2, 0\): a row without a real token has nothing to go on from",
        ),
        (
            small_tokens(3),
            {"padding_mask": torch.tensor([[True, False, False], [False, False, False]])},
            r"tokens of shape \(2, 3\): a row without a real token",
        ),
        (
            small_tokens(3),
            {"padding_mask": torch.ones(2, 3)},
            r"padding_mask of shape \(2, 3\) and torch.float32",
        ),
        (small_tokens(3)[0], {}, r"tokens of shape \(3,\): give \[batch, seq\]"),
        (small_tokens(3), {"temperature": -1.0}, "temperature=-1.0"),
        (small_tokens(3), {"top_k": 0}, "top_k=0"),
        (small_tokens(3), {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_what_cannot_be_written_is_a_value_error(
    tokens: Tensor, settings: dict[str, Any], says: str, unchecked: None
) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=says):
        model.generate(tokens, **({"max_new_tokens": 5} | settings))


def test_more_tokens_than_padding_leaves_room_for_are_refused_before_the_first_is_written() -> None:
    # 61 tokens are 6 chunks of 9, and a rest that padding would make a seventh of.
    model = model_of(conventions="transformers")
    with pytest.raises(
        ValueError,
        match="max_new_tokens=35: with a prompt of 20 padded to 63 as in transformers, "
        "more than max_length=61; ask for fewer, or build the model with max_length=63",
    ):
        model.generate(small_tokens(20), max_new_tokens=35)
    with pytest.warns(RecomputeWarning):
        assert model.generate(small_tokens(20), max_new_tokens=34).shape == (BATCH, 34)


def test_a_state_refuses_more_tokens_than_it_was_started_for() -> None:
    model, tokens = model_of(), small_tokens(9)
    state = model.start_decode(tokens, max_new_tokens=1)
    state.step(tokens[:, 0])
    with pytest.raises(ValueError, match="max_new_tokens: all are written; start with more to go on"):
        state.step(tokens[:, 0])


def test_a_model_in_training_is_not_decoded_from() -> None:
    with pytest.raises(ValueError, match=r"training mode: dropout .* call model.eval\(\) before"):
        model_of().train().start_decode(small_tokens(9), max_new_tokens=1)


def test_buckets_that_follow_the_data_are_refused() -> None:
    family = CrossPolytope(data_rotation=True)
    model = model_of(causality="published", hashing=family)
    with pytest.raises(ValueError, match="use data_rotation=False to generate"):
        model.generate(small_tokens(9), max_new_tokens=1)
    with model.attending(kind="random"), pytest.warns(RecomputeWarning):
        model.generate(small_tokens(9), max_new_tokens=1)


def test_a_bidirectional_model_is_refused() -> None:
    model = reformer.ReformerMaskedLM(bidirectional()).eval()
    with pytest.raises(ValueError, match="causal=False: a token may see later ones"):
        start_decode(model, model.head, small_tokens(9), max_new_tokens=1, padding_mask=None)


def bidirectional() -> ReformerConfig:
    return small_config(causal=False)
