import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer import CrossPolytope, HashFamily, Hyperplane, Random, ReformerLM
from reformer.attention.modules import SharedQueryKeyAttention
from reformer.config import ATTENTION_KINDS, POSITIONS, RESIDUALS
from reformer.hashing import buckets
from reformer.streams import Streams
from tests.reformer.helpers import (
    BATCH,
    SEQ,
    assert_all_close,
    integers,
    normal,
    pairwise,
    small_config,
    small_model,
    small_tokens,
    with_residual,
)
from tests.reformer.memory import allocations, tensor_bytes

KINDS = ATTENTION_KINDS
FAMILIES = (CrossPolytope(), Hyperplane(), Random())


# Shapes and losses.


MODELS: dict[str, tuple[Any, ...]] = {
    "layers": (("lsh",), ("local", "lsh"), ("full", "full_standard"), ("oracle",)),
    "residual": RESIDUALS,
    "positions": ("learned", "axial", "sinusoidal", "rotary"),
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "relu", "swiglu", "geglu"),
    "hash_dropout": (0.0, 0.2),
    "d_head": (6,),
    "merge": ("concat", "mean"),
    "tie_weights": (False, True),
    "n_hashes": (1, 5),
    "n_buckets": (None, 8, (2, 4)),
    "hashing": FAMILIES,
    "causality": ("strict", "bucket", "published"),
    "ff_chunk_length": (None, 5),
    "loss_chunk_length": (None, 3),
    "dropout": (0.0, 0.2),
    "seq": (1, 5, 29, 31),
}


@pytest.mark.parametrize(
    "row", pairwise(MODELS, allowed=lambda row: not (row["tie_weights"] and row["merge"] == "concat"))
)
def test_any_model_gives_logits_and_a_loss_that_all_its_parameters_follow(row: dict[str, Any]) -> None:
    settings = dict(row)
    tokens = small_tokens(settings.pop("seq"))
    targets = small_tokens(tokens.shape[1], seed=1)
    model = small_model(**settings)
    loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.shape == ()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    logits = model(tokens)
    assert logits.shape == (*tokens.shape, 23)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_all_close([model.loss(tokens, targets)], [expected], tolerance=1e-12)
    scores = model.score(tokens, targets)
    assert_all_close([scores.nll_nats / scores.scored], [expected], tolerance=1e-6)


def test_the_loss_of_a_fresh_model_is_that_of_a_guess() -> None:
    loss = float(small_model().loss(small_tokens(), small_tokens(seed=1)).detach())
    assert loss == pytest.approx(float(np.log(23)), abs=0.5)


def test_every_length_up_to_the_longest_works_and_is_a_prefix_of_the_longer_ones() -> None:
    for positions in POSITIONS:
        model = small_model(layers=KINDS, n_layers=5, positions=positions, d_head=6).eval()
        tokens = small_tokens(31)
        whole = model(tokens)
        for seq in (1, 2, 9, 10, 13, 30):
            assert_all_close([model(tokens[:, :seq])], [whole[:, :seq]], tolerance=1e-11)


@pytest.mark.parametrize("call", ["forward", "loss", "score"])
def test_more_tokens_than_max_length_are_a_value_error_and_no_draw(call: str) -> None:
    model = small_model()
    tokens = small_tokens(32)
    arguments = (tokens,) if call == "forward" else (tokens, tokens)
    with pytest.raises(
        ValueError, match="seq=32: longer than max_length=31; build the model with max_length=32"
    ):
        getattr(model, call)(*arguments)
    assert drawn(model) == 0


@pytest.mark.parametrize("call", ["forward", "loss", "score", "reconstruction_errors", "gradient_cosine"])
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "padded to 36, a multiple of 9.*; give at most 27 tokens, or build .* max_length=36"),
        (
            {"layers": ("local", "lsh"), "local_chunk_length": 5},
            "padded to 45, a multiple of 45.*; give at most 5 tokens, or build .* max_length=45",
        ),
    ],
    ids=["one chunk length", "two"],
)
def test_tokens_that_only_padding_makes_too_many_are_a_value_error_that_says_so_and_no_draw(
    settings: dict[str, Any], says: str, call: str
) -> None:
    model = small_model(conventions="transformers", causality="published", **settings)
    tokens = small_tokens()
    arguments = (tokens,) if call in ("forward", "reconstruction_errors") else (tokens, tokens)
    with pytest.raises(ValueError, match=rf"seq=29: {says}"):
        getattr(model, call)(*arguments)
    assert drawn(model) == 0


def test_as_many_tokens_as_fit_with_padding_are_no_error() -> None:
    for layers, longest in ((("lsh",), 27), (("local", "lsh"), 5)):
        model = small_model(
            conventions="transformers", causality="published", layers=layers, local_chunk_length=5
        )
        assert model.config.longest_input == longest
        assert model(small_tokens(longest)).isfinite().all()
        with pytest.raises(ValueError, match=f"give at most {longest} tokens"):
            model(small_tokens(longest + 1))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0), (0, 0)])
def test_an_empty_batch_gives_empty_logits_and_a_zero_loss(residual: str, batch: int, seq: int) -> None:
    model = small_model(layers=KINDS, n_layers=5, residual=residual, ff_chunk_length=5, loss_chunk_length=3)
    tokens = integers(23, batch, seq)
    assert model(tokens).shape == (batch, seq, 23)
    loss = model.loss(tokens, tokens)
    loss.backward()
    assert loss == 0
    assert model.score(tokens, tokens).scored == 0


# Causality and padding.


def moved_logits(model: ReformerLM, tokens: Tensor, changed: Tensor, *, until: int) -> float:
    before, after = model(tokens)[:, :until], model(changed)[:, :until]
    return float(((after - before).abs().amax(dim=-1) > 1e-11 * before.abs().max()).double().mean())


@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("layers", [("lsh",), ("local", "lsh"), ("full", "lsh", "full_standard")], ids=str)
def test_no_logit_of_a_strict_model_depends_on_later_tokens(
    hashing: HashFamily, layers: tuple[str, ...]
) -> None:
    settings: dict[str, Any] = {
        "hashing": hashing,
        "layers": layers,
        "max_length": 127,
        "n_buckets": 8,
        "n_hashes": 3,
        "n_layers": 3,
    }
    tokens, until = small_tokens(101), 67
    other = small_tokens(127, seed=9)
    perturbed = {
        "change": torch.cat([tokens[:, :until], other[:, : 101 - until]], dim=1),
        "insert": torch.cat([tokens[:, :until], other[:, :11], tokens[:, until:]], dim=1),
        "delete": torch.cat([tokens[:, :until], tokens[:, until + 11 :]], dim=1),
        "lengthen": torch.cat([tokens, other[:, :17]], dim=1),
        "cut": tokens[:, :until],
    }
    published = small_model(causality="published", **settings).eval()
    strict = small_model(causality="strict", **settings).eval()
    for name, changed in perturbed.items():
        if (hashing, name) != (Random(), "change"):
            assert moved_logits(published, tokens, changed, until=until) >= 0.2, name
        assert moved_logits(strict, tokens, changed, until=until) == 0, name


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_positions_in_attention_and_hash_dropout_leave_it_at_that(positions: str) -> None:
    settings: dict[str, Any] = {
        "layers": ("lsh", "oracle", "local"),
        "positions": positions,
        "hash_dropout": 0.5,
        "d_head": 6,
        "max_length": 127,
        "n_buckets": 8,
    }
    tokens, until = small_tokens(101), 67
    changed = torch.cat([tokens[:, :until], small_tokens(127, seed=9)[:, : 127 - until]], dim=1)
    published = small_model(causality="published", **settings).eval()
    strict = small_model(causality="strict", **settings).eval()
    assert moved_logits(published, tokens, changed, until=until) >= 0.2
    assert moved_logits(strict, tokens, changed, until=until) == 0


@pytest.mark.parametrize(
    "layers", [("lsh",), ("local",), ("full",), ("full_standard",), ("oracle",)], ids=str
)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_tokens_at_padding_move_no_real_logit_and_padding_behind_is_as_if_absent(
    layers: tuple[str, ...], residual: str
) -> None:
    model = small_model(layers=layers, residual=residual).eval()
    tokens, other = small_tokens(), small_tokens(seed=9)
    real = normal(BATCH, SEQ, seed=5) > -0.5
    logits = model(tokens, padding_mask=real)
    changed = model(torch.where(real, tokens, other), padding_mask=real)
    assert_all_close([changed[real]], [logits[real]], tolerance=1e-12)
    assert not torch.allclose(model(tokens)[real], logits[real])
    behind = torch.arange(SEQ).expand(BATCH, SEQ) < 19
    short = model(tokens[:, :19])
    assert_all_close([model(tokens, padding_mask=behind)[:, :19]], [short], tolerance=1e-12)


@pytest.mark.parametrize("causality", ["bucket", "published"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_nor_do_tokens_at_padding_where_rotations_are_made_of_the_tokens(
    causality: str, residual: str
) -> None:
    settings: dict[str, Any] = {"causality": causality, "residual": residual, "n_buckets": 16}
    model = small_model(hashing=CrossPolytope(data_rotation=True), hash_dropout=0.2, **settings)
    real = normal(BATCH, SEQ, seed=5) > -0.5
    start = copy.deepcopy(model)
    logits = model(small_tokens(), padding_mask=real)
    changed = start(torch.where(real, small_tokens(), small_tokens(seed=9)), padding_mask=real)
    assert_all_close([changed[real]], [logits[real]], tolerance=1e-12)


@pytest.mark.parametrize("layers", [("lsh",), ("local",), ("full",)], ids=str)
def test_a_padding_mask_of_numbers_is_a_value_error(layers: tuple[str, ...], unchecked: None) -> None:
    model = small_model(layers=layers)
    with pytest.raises(ValueError, match=r"padding_mask of shape \(2, 29\) and torch.int64: give bool"):
        model(small_tokens(), padding_mask=torch.ones(BATCH, SEQ, dtype=torch.int64))


# The hash draw.


def drawn(model: ReformerLM) -> int:
    return int(model.get_extra_state()["draw"])


def test_each_training_forward_draws_once_and_nothing_else_does() -> None:
    model = small_model()
    tokens = small_tokens()
    model(tokens)
    assert drawn(model) == 1
    model.loss(tokens, tokens)
    assert drawn(model) == 2
    model.score(tokens, tokens)
    assert drawn(model) == 3
    loss = model.loss(tokens, tokens)
    loss.backward()
    assert drawn(model) == 4
    model.eval()
    model(tokens)
    model.score(tokens, tokens)
    assert drawn(model) == 4


def test_a_new_draw_changes_a_training_forward_and_eval_repeats_itself() -> None:
    model, tokens = small_model(n_hashes=1), small_tokens()
    assert not torch.allclose(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_hash_seed_alone_decides_the_draws() -> None:
    models = [small_model(hash_seed=seed, n_hashes=1).eval() for seed in (0, 0, 1)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    logits = []
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        logits.append(model(small_tokens()))
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_an_automatic_bucket_count_does_not_follow_the_first_input() -> None:
    # In transformers the first sequence that a model sees fixes it, and saves it in the config.
    settings: dict[str, Any] = {"n_buckets": None, "max_length": 127, "layers": ("lsh",), "n_hashes": 1}
    used, short, long = small_model(**settings).eval(), small_tokens(9), small_tokens(127)

    def fresh(**changes: Any) -> Tensor:
        model = small_model(**(settings | changes)).eval()
        model.load_state_dict(used.state_dict())
        logits: Tensor = model(long)
        return logits

    used(short)
    assert torch.equal(used(long), fresh())
    of_short = buckets.automatic(max_length=short.shape[1], chunk_length=used.config.chunk_length)
    assert not torch.allclose(fresh(n_buckets=of_short), fresh())


def test_the_state_carries_the_counter_and_a_resumed_model_draws_on(tmp_path: Path) -> None:
    model, tokens = small_model(dropout=0.0, n_hashes=1), small_tokens()
    for _ in range(3):
        model(tokens)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    resumed = small_model(n_hashes=1)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert drawn(resumed) == 3
    assert torch.equal(resumed(tokens), model(tokens))
    assert drawn(resumed) == drawn(model) == 4


def test_a_copy_of_a_model_has_a_counter_of_its_own() -> None:
    model = small_model()
    other = copy.deepcopy(model)
    other(small_tokens())
    assert (drawn(model), drawn(other)) == (0, 1)


# Changing attention on trained weights.


def shared_layers(model: ReformerLM) -> list[SharedQueryKeyAttention]:
    return [module for module in model.modules() if isinstance(module, SharedQueryKeyAttention)]


@pytest.mark.parametrize(
    "settings",
    [
        {"n_hashes": 5},
        {"hashing": Hyperplane()},
        {"hash_seed": 1},
        {"kind": "full"},
        {"kind": "oracle"},
        {"kind": "random"},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_attending_changes_the_model_inside_and_only_inside(settings: dict[str, Any], training: bool) -> None:
    model, tokens = small_model(n_hashes=1).train(training), small_tokens()
    start = copy.deepcopy(model)
    before = model(tokens)
    model = copy.deepcopy(start)
    with model.attending(**settings):
        inside = model(tokens)
    assert not torch.allclose(inside, before)
    model.load_state_dict(start.state_dict())
    assert torch.equal(model(tokens), before)


def test_attending_equals_a_model_built_that_way() -> None:
    model = small_model(n_hashes=1).eval()
    for settings in ({"n_hashes": 5}, {"hashing": Hyperplane()}, {"hash_seed": 1}):
        built = small_model(**({"n_hashes": 1} | settings)).eval()
        built.load_state_dict(model.state_dict())
        with model.attending(**settings):
            assert torch.equal(model(small_tokens()), built(small_tokens()))
    built = small_model(layers=("full",)).eval()
    built.load_state_dict(model.state_dict())
    with model.attending(kind="full"):
        assert torch.equal(model(small_tokens()), built(small_tokens()))
    with built.attending(kind="lsh", n_hashes=1):
        assert torch.equal(built(small_tokens()), model(small_tokens()))


def test_attending_nests_and_the_inner_setting_wins() -> None:
    model, tokens = small_model(n_hashes=1).eval(), small_tokens()
    with model.attending(n_hashes=3):
        three = model(tokens)
    with model.attending(n_hashes=5, hash_seed=1):
        with model.attending(n_hashes=3, hash_seed=0):
            assert torch.equal(model(tokens), three)
        with model.attending(kind="full"):
            full = model(tokens)
        five = model(tokens)
    assert not torch.allclose(five, three)
    with model.attending(kind="full"):
        assert torch.equal(model(tokens), full)


def test_attending_ends_with_an_exception_too() -> None:
    model, tokens = small_model().eval(), small_tokens()
    before = model(tokens)
    with pytest.raises(KeyError), model.attending(kind="knock_out"):
        raise KeyError
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "none"}, "kind='none': use one of lsh, full, oracle, random, knock_out"),
        ({"n_hashes": 0}, "n_hashes=0: must be at least 1"),
        ({"hashing": Hyperplane()}, "n_buckets=6: the hyperplane family makes powers of two"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_changes(settings: dict[str, Any], says: str) -> None:
    model, tokens = small_model(n_buckets=6).eval(), small_tokens()
    before = model(tokens)
    with pytest.raises(ValueError, match=says), model.attending(**settings):
        pass
    assert torch.equal(model(tokens), before)


def test_a_knocked_out_model_is_its_feed_forward_layers_alone() -> None:
    model, tokens = small_model().eval(), small_tokens()
    with model.attending(kind="knock_out"):
        knocked_out = model(tokens)
        # Without attention a token's logits depend on the token and its position alone.
        changed = tokens.clone()
        changed[:, 3] = (changed[:, 3] + 1) % 23
        moved = (model(changed) - knocked_out).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [3]
    for layer in shared_layers(model):
        nn.init.zeros_(layer.output.weight)
    assert torch.equal(model(tokens), knocked_out)


def test_more_rounds_come_nearer_to_full_attention() -> None:
    model, tokens = small_model(causality="published", layers=("lsh",), n_layers=1).eval(), small_tokens()
    with model.attending(kind="full"):
        full = model(tokens)

    def distance(n_hashes: int) -> float:
        with model.attending(n_hashes=n_hashes):
            return float((model(tokens) - full).norm().detach())

    assert distance(64) < distance(1) / 5


def test_embeddings_are_token_plus_position_with_dropout_in_training_alone() -> None:
    model, tokens = small_model(dropout=0.25, merge="mean"), small_tokens()
    with model.attending(kind="knock_out"):
        for block in model.blocks.modules():
            if isinstance(block, nn.Linear):
                nn.init.zeros_(block.weight)
                nn.init.zeros_(block.bias) if block.bias is not None else None
        model.eval()
        embedded = model.embedding(tokens) + model.positions(SEQ)
        assert_all_close([model(tokens)], [model.head(Streams(embedded, embedded))], tolerance=1e-12)
        model.train()
        model.head.eval()
        torch.manual_seed(3)
        training = model(tokens)
        torch.manual_seed(3)
        dropped = F.dropout(embedded, 0.25)
        assert_all_close([training], [model.head(Streams(dropped, dropped))], tolerance=1e-12)


# Parameters.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_state_holds_each_parameter_once(tied: bool, residual: str) -> None:
    model = small_model(layers=KINDS, n_layers=5, residual=residual, tie_weights=tied, merge="mean")
    state = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert sum(x.numel() for x in state.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("trained_with", RESIDUALS)
def test_weights_of_one_residual_kind_serve_the_others(trained_with: str) -> None:
    model = small_model(residual=trained_with)
    steps(model, count=3)
    others = {residual: with_residual(model.eval(), residual) for residual in RESIDUALS}
    logits = {residual: other(small_tokens()) for residual, other in others.items()}
    assert {tuple(other.state_dict()) for other in others.values()} == {tuple(model.state_dict())}
    assert torch.equal(logits["checkpoint"], logits["plain"])
    assert torch.equal(logits["reversible"], logits["plain"])
    assert not torch.equal(logits["reversible_exact"], logits["plain"])
    assert_all_close([logits["reversible_exact"]], [logits["plain"]], tolerance=1e-3)


def test_tied_weights_stay_tied_through_conversion_copying_and_loading() -> None:
    model = small_model(tie_weights=True, merge="mean", dtype=torch.float64)
    others = [copy.deepcopy(model), copy.deepcopy(model).float().double()]
    loaded = small_model(tie_weights=True, merge="mean")
    loaded.load_state_dict(model.state_dict())
    for other in (*others, loaded):
        other.eval()
        before = other(small_tokens())
        with torch.no_grad():
            other.embedding.weight.zero_()
        after = other(small_tokens())
        bias = after[0, 0]
        assert not torch.allclose(before, after)
        # With a zero matrix the head gives its bias alone.
        assert_all_close([after], [bias.expand_as(after)], tolerance=1e-12)


# Training.


def steps(model: ReformerLM, *, count: int = 12, seed: int = 3) -> list[float]:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for index in range(count):
        tokens = small_tokens(seed=index % 3)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_same_seed_gives_the_same_training_run_to_the_bit(residual: str) -> None:
    def run(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(seed)
        settings = {"residual": residual, "dropout": 0.1, "attention_dropout": 0.1, "n_hashes": 2}
        model = ReformerLM(small_config(**settings))
        return steps(model, seed=seed), model.state_dict()

    (first, state), (again, same_state), (other, _) = run(3), run(3), run(4)
    assert first == again
    assert first != other
    assert first[-1] < first[0] - 0.1
    for name, value in state.items():
        assert (
            torch.equal(value, same_state[name]) if isinstance(value, Tensor) else value == same_state[name]
        )


@pytest.mark.parametrize(
    ("residual", "tolerance"), [("checkpoint", 1e-12), ("reversible", 1e-8), ("reversible_exact", 1e-3)]
)
def test_training_follows_plain_training(residual: str, tolerance: float) -> None:
    plain = small_model(residual="plain", dropout=0.1)
    other = with_residual(plain, residual)
    assert_all_close([torch.tensor(steps(other))], [torch.tensor(steps(plain))], tolerance=tolerance)


@pytest.fixture
def streams() -> Iterator[None]:
    """All global random streams are where they were."""
    python, numpy = random.getstate(), repr(np.random.get_state(legacy=False))
    yield
    assert random.getstate() == python
    assert repr(np.random.get_state(legacy=False)) == numpy


def test_without_dropout_the_global_streams_are_untouched(unchecked: None, streams: None) -> None:
    # Unchecked, since beartype draws from Python's stream which items it looks at.
    model = small_model(layers=KINDS, n_layers=5)
    before = torch.get_rng_state()
    tokens = small_tokens()
    model.loss(tokens, tokens).backward()
    model.eval()
    with model.attending(kind="random", n_hashes=3):
        model.score(tokens, tokens)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_dropout_the_global_stream_goes_on_as_dropout_alone_moves_it() -> None:
    """Two models that hash differently leave the stream in the same place: hashing takes nothing from it."""
    places = []
    for settings in ({"n_hashes": 1}, {"n_hashes": 5, "hashing": Random(), "hash_seed": 7}):
        model = small_model(dropout=0.1, **settings)
        torch.manual_seed(3)
        model.loss(small_tokens(), small_tokens()).backward()
        places.append(torch.get_rng_state())
    assert torch.equal(*places)
    torch.manual_seed(3)
    assert not torch.equal(torch.get_rng_state(), places[0])


# Memory.


def peak_of_training(**settings: Any) -> int:
    """Bytes at the fullest moment of a loss and its gradients, in float32."""
    model = small_model(
        dtype=torch.float32, max_length=509, chunk_length=37, residual="reversible", n_layers=2, **settings
    )
    tokens = integers(23, BATCH, 509)
    return allocations(lambda: model.loss(tokens, tokens).backward()).peak


def test_no_more_logits_than_a_block_s_are_ever_there() -> None:
    vocab_size = 6007
    logits = tensor_bytes(BATCH, 509, vocab_size)
    assert peak_of_training(vocab_size=vocab_size, loss_chunk_length=13) < 0.5 * logits
    assert peak_of_training(vocab_size=vocab_size) > logits


def test_no_more_wide_activations_than_a_block_s_are_ever_there() -> None:
    d_ff = 6007
    wide = tensor_bytes(BATCH, 509, d_ff)
    assert peak_of_training(d_ff=d_ff, ff_chunk_length=13) < 0.5 * wide
    assert peak_of_training(d_ff=d_ff) > wide
