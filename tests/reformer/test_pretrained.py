"""Weights of transformers: the same logits on either side."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer import (
    CrossPolytope,
    Hyperplane,
    ReformerClassifier,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerLM,
    ReformerMaskedLM,
)
from reformer.pretrained import Model, load_pretrained, save_pretrained
from tests.reformer.helpers import pairwise

VOCAB, HEADS, HEAD_WIDTH, WIDTH = 37, 3, 5, 22
#: Of the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
ADDS_HEAD_BIAS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ARCHITECTURES = ("ReformerModelWithLMHead", "ReformerForMaskedLM", "ReformerForSequenceClassification")
FACTORS: dict[str, tuple[Any, ...]] = {
    "architecture": ARCHITECTURES,
    "attn_layers": (["lsh"], ["local"], ["local", "lsh", "local"], ["lsh", "lsh"]),
    "num_hashes": (1, 2, 4),
    "num_buckets": (8, [2, 4], [4]),
    "chunks": ((8, 4), (4, 8), (6, 4)),
    "before": (1, 2),
    "axial": (True, False),
    "length": (3, 4, 7, 8, 24, 48, 53),
    "padding": ("none", "last tokens", "first tokens", "scattered"),
    "hidden_act": ("relu", "gelu"),
}


def peer(row: dict[str, Any]) -> nn.Module:
    """A model of transformers with random weights, in eval mode."""
    lsh_chunk, local_chunk = row["chunks"]
    causal = row["architecture"] == "ReformerModelWithLMHead"
    config = transformers.ReformerConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=HEAD_WIDTH,
        feed_forward_size=29, attn_layers=row["attn_layers"], axial_pos_embds=row["axial"],
        axial_pos_shape=(8, 12), axial_pos_embds_dim=(9, 13), lsh_attn_chunk_length=lsh_chunk,
        local_attn_chunk_length=local_chunk, num_buckets=row["num_buckets"], num_hashes=row["num_hashes"],
        lsh_num_chunks_before=row["before"], local_num_chunks_before=row["before"],
        local_num_chunks_after=0 if causal else 1, max_position_embeddings=96, is_decoder=causal,
        hash_seed=11, hidden_act=row["hidden_act"], num_labels=4,
    )  # fmt: skip
    torch.manual_seed(5)
    model: nn.Module = getattr(transformers, row["architecture"])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if row["architecture"] != "ReformerForSequenceClassification":
        settle_head_bias(model)
    return model.eval()


def settle_head_bias(model: Any) -> None:
    """Zero what 5.0 to 5.23 carry along without adding it, and make one of the two that 5.24 carries."""
    head = model.lm_head
    with torch.no_grad():
        head.bias.copy_(head.decoder.bias if ADDS_HEAD_BIAS else torch.zeros(VOCAB))


def padding_of(kind: str, seq: int) -> Tensor:
    real = torch.ones(2, seq, dtype=torch.bool)
    if kind == "last tokens":
        real[1, -(seq // 3) :] = seq < 3
    if kind == "first tokens":
        real[1, : seq // 3] = False
    if kind == "scattered":
        real[0, 1::3] = False
    return real


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    logits: Tensor = model(tokens, attention_mask=real.long()).logits
    return logits


@pytest.fixture(autouse=True)
def _one_rotation_for_all_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers draws rotations in the dtype of the vectors, which makes float64 other ones."""
    randn = torch.randn

    def drawn_in_float32(*size: Any, dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
        return randn(*size, dtype=torch.float32, **settings).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", drawn_in_float32)


@torch.no_grad()
def assert_same_logits(theirs: nn.Module, ours: Model, *, seq: int, padding: str) -> None:
    """Exactly so in float64. In float32 theirs are off by up to 0.4 % at tokens that see only themselves:
    there they normalise scores of −10⁵, where neighbouring numbers are 0.008 apart.

    At real tokens alone: theirs lets padding attend to real tokens, where ours gives 0. So the classes of a
    row that begins with padding differ too, which are read off there.
    """
    theirs, ours = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    tokens = torch.randint(1, VOCAB, (2, seq), generator=torch.Generator().manual_seed(seq))
    real = padding_of(padding, seq)
    expected = logits_of(theirs, tokens, real)
    found = ours(tokens, padding_mask=None if bool(real.all()) else real)
    read = real if found.ndim == 3 else real[:, 0]
    expected, found = expected[read], found[read]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE[found.dtype] * float(expected.abs().max())


@pytest.mark.parametrize("row", pairwise(FACTORS))
def test_logits_are_those_of_transformers_there_and_back(row: dict[str, Any], tmp_path: Path) -> None:
    theirs = peer(row)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    assert_same_logits(theirs, ours, seq=row["length"], padding=row["padding"])
    save_pretrained(ours, tmp_path / "ours")
    back = getattr(transformers, row["architecture"]).from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(back, ours, seq=row["length"], padding=row["padding"])
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers_in_float32(architecture: str, tmp_path: Path) -> None:
    """Ours are theirs of float64, also at tokens that see only themselves: theirs of float32 are not."""
    theirs = peer({**ROW, "architecture": architecture, "num_hashes": 4, "attn_layers": ["lsh"]})
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(1, VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = logits_of(copy.deepcopy(theirs).double(), tokens, torch.ones_like(tokens))
    with torch.no_grad():
        found = load_pretrained(tmp_path)(tokens)
    assert found.dtype is torch.float32
    assert float((found - expected).abs().max()) <= TOLERANCE[torch.float32] * float(expected.abs().max())


ROW: dict[str, Any] = {name: levels[0] for name, levels in FACTORS.items()}


def saved(tmp_path: Path, *, architecture: str = ARCHITECTURES[0], **changes: Any) -> Path:
    """A directory of transformers whose config was edited."""
    folder = tmp_path / "saved"
    peer({**ROW, "architecture": architecture}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_buckets": None}, "num_buckets=null: .* give n_buckets="),
        ({"hidden_act": "silu"}, "hidden_act='silu': use relu or gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true: "),
        ({"axial_pos_shape": [8, 3, 4]}, r"axial_pos_shape=\[8, 3, 4\]: two factors"),
        ({"architectures": ["ReformerForQuestionAnswering"]}, "architectures=.*: use one of"),
        ({"attn_layers": ["lsh", "lsh"]}, "reformer.encoder.layers.1.* not among the weights"),
        ({"feed_forward_size": 31}, r"feed_forward.dense.dense.* of shape .*: the config asks for \(31"),
        ({"is_decoder": False}, "causal=False: "),
        ({"attn_layers": ["full"]}, r"attn_layers=\['full'\]: transformers has .*; use lsh and local"),
        ({"attn_layers": ["lsh", "lhs"]}, r"attn_layers=\['lsh', 'lhs'\]: .*; use lsh and local"),
        ({"attn_layers": []}, r"attn_layers=\[\]: .*; use lsh and local"),
    ],
)
def test_what_cannot_be_represented_is_named(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        load_pretrained(saved(tmp_path, **changes))


def test_a_share_of_dropout_for_the_classifier_alone_is_refused_where_there_is_one(tmp_path: Path) -> None:
    classifier = saved(tmp_path / "classifier", architecture=ARCHITECTURES[2], classifier_dropout=0.3)
    with pytest.raises(ValueError, match=r"classifier_dropout=0.3: .*; use null, or 0.05 as hidden_dropout"):
        load_pretrained(classifier)
    language_model = load_pretrained(saved(tmp_path / "language model", classifier_dropout=0.3))
    assert language_model.config.dropout == 0.05
    for share in (None, 0.05):
        load_pretrained(saved(tmp_path / str(share), architecture=ARCHITECTURES[2], classifier_dropout=share))


def test_an_open_bucket_count_is_given(tmp_path: Path) -> None:
    ours = load_pretrained(saved(tmp_path, num_buckets=None), n_buckets=8)
    assert_same_logits(peer(ROW), ours, seq=24, padding="none")


def test_pickled_weights_are_read_without_running_what_is_in_them(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    torch.save(peer(ROW).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_logits(peer(ROW), load_pretrained(folder), seq=24, padding="none")
    torch.save({"reformer": print}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_pretrained(folder)


def sharded(tmp_path: Path) -> Path:
    """A directory whose weights are in several files."""
    folder = tmp_path / "sharded"
    peer(ROW).save_pretrained(folder, max_shard_size="8KB")
    return folder


def test_weights_in_several_files_are_read_from_all_of_them(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    assert_same_logits(peer(ROW), load_pretrained(folder), seq=24, padding="none")


def test_an_index_that_names_no_files_or_missing_ones_is_told_of(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}: not there; .*index.json names it"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: no weight_map"):
        load_pretrained(folder)


def test_what_was_saved_last_is_read_where_weights_in_several_files_were_before(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    model = ReformerLM(ReformerConfig(**EXPRESSIBLE))
    save_pretrained(model, folder)
    theirs = transformers.ReformerModelWithLMHead.from_pretrained(folder)
    assert torch.equal(load_pretrained(folder).embedding.weight, model.embedding.weight)
    assert torch.equal(theirs.get_input_embeddings().weight, model.embedding.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_read_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    peer(ROW).to(dtype).save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {dtype}
    ours = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    widened = transformers.ReformerModelWithLMHead.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(widened, ours, seq=24, padding="none")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json: not there"):
        load_pretrained(tmp_path)
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_pretrained(folder)


EXPRESSIBLE: dict[str, Any] = {
    "vocab_size": VOCAB, "max_length": 48, "d_model": 10, "n_heads": 2, "n_layers": 2, "chunk_length": 8,
    "causality": "published", "duplicates": "sum", "seams": "reference", "conventions": "transformers",
    "activation": "relu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"causality": "strict"}, "causality='strict': .*; use causality='published'"),
        ({"duplicates": "count"}, "duplicates='count': .*; use duplicates='sum'"),
        ({"conventions": "own"}, "conventions='own': .*; use conventions='transformers'"),
        ({"layers": ("full",)}, r"layers=\('full',\): .*; use lsh and local layers"),
        ({"positions": "rotary", "n_heads": 5}, "positions='rotary': .*; use positions='axial' or 'learned'"),
        ({"activation": "swiglu"}, "activation='swiglu': .*; use activation='relu' or 'gelu'"),
        ({"norm": "rms_norm"}, "norm='rms_norm': .*; use norm='layer_norm'"),
        ({"merge": "mean"}, "merge='mean': .*; use merge='concat'"),
        ({"seams": "masked"}, "seams='masked': .*; use seams='reference'"),
        ({"logit_scale": "sqrt_d"}, "logit_scale='sqrt_d': .*; use logit_scale='trax'"),
        ({"tie_weights": True, "merge": "mean"}, "tie_weights=True: .*; use tie_weights=False"),
        ({"hashing": Hyperplane()}, r"hashing=Hyperplane\(\): .*; use hashing=CrossPolytope\("),
        (
            {"hashing": CrossPolytope(data_rotation=True)},
            r"hashing=.*data_rotation=True\): .*; use hashing=CrossPolytope\(data_rotation=False\)",
        ),
        ({"bucket_mask": True}, "bucket_mask=True: .*; use bucket_mask=None"),
        ({"hash_dropout": 0.2}, "hash_dropout=0.2: .*; use hash_dropout=0.0"),
    ],
)
def test_what_transformers_cannot_express_is_not_saved(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        save_pretrained(ReformerLM(ReformerConfig(**{**EXPRESSIBLE, **settings})), tmp_path / "x")
    assert not (tmp_path / "x").exists()


class OtherLM(ReformerLM):
    """Of a name that transformers does not know."""


@pytest.mark.parametrize("build", [OtherLM, ReformerEncoderDecoder])
def test_a_model_of_another_type_is_not_saved(build: Any, tmp_path: Path, unchecked: None) -> None:
    says = f"model of type {build.__name__}: .*; give a ReformerLM, ReformerMaskedLM or ReformerClassifier"
    with pytest.raises(ValueError, match=says):
        save_pretrained(build(ReformerConfig(**EXPRESSIBLE)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_head_bias_is_kept_and_the_one_that_counts_is_read(tmp_path: Path) -> None:
    model = ReformerLM(ReformerConfig(**EXPRESSIBLE))
    nn.init.ones_(model.head.projection.bias)  # type: ignore[arg-type]
    save_pretrained(model, tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    assert weights["lm_head.bias"].equal(weights["lm_head.decoder.bias"])
    for unread in ({"lm_head.decoder.bias"}, {"lm_head.bias"}, set()):
        kept = {name: value for name, value in weights.items() if name not in unread}
        if not unread:
            kept["lm_head.bias"] = torch.zeros(VOCAB)  # no part of the logits in any version that has both
        safetensors.save_file(kept, tmp_path / "model.safetensors")
        bias = load_pretrained(tmp_path).state_dict()["head.projection.bias"]
        assert bool((bias == 1).all()), unread


@pytest.mark.parametrize("kind", [ReformerLM, ReformerMaskedLM, ReformerClassifier])
def test_models_of_ours_are_read_there(kind: type[Model], tmp_path: Path) -> None:
    settings = {**EXPRESSIBLE, "causal": kind is ReformerLM, "n_chunks_after": 0, "local_n_chunks_after": 0}
    if kind is ReformerClassifier:
        settings["n_classes"] = 5
    torch.manual_seed(3)
    ours = kind(ReformerConfig(**settings)).eval()
    if kind is not ReformerClassifier:
        nn.init.normal_(ours.head.projection.bias, std=float(ADDS_HEAD_BIAS))  # type: ignore[arg-type]
    save_pretrained(ours, tmp_path)
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, seq=29, padding="last tokens")
    assert_same_logits(theirs, load_pretrained(tmp_path), seq=29, padding="last tokens")
