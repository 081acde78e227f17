"""Weights in the format of Hugging Face transformers: read, and written where it can express the model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer.config import ReformerConfig
from reformer.hashing.buckets import Buckets
from reformer.hashing.cross_polytope import CrossPolytope
from reformer.models import ReformerClassifier, ReformerLM, ReformerMaskedLM

Model = ReformerLM | ReformerMaskedLM | ReformerClassifier

#: Classes of transformers, and ours.
_ARCHITECTURES: Mapping[str, type[Model]] = {
    "ReformerModelWithLMHead": ReformerLM,
    "ReformerForMaskedLM": ReformerMaskedLM,
    "ReformerForSequenceClassification": ReformerClassifier,
}
#: Attention kinds of transformers, in our words too.
_KINDS = {"lsh", "local"}
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
#: What a config leaves unsaid: the defaults of transformers 5.
_DEFAULTS: Mapping[str, Any] = {
    "attention_head_size": 64,
    "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"],
    "axial_pos_embds": True,
    "axial_pos_shape": [64, 64],
    "axial_pos_embds_dim": [64, 192],
    "chunk_size_feed_forward": 0,
    "chunk_size_lm_head": 0,
    "classifier_dropout": None,
    "feed_forward_size": 512,
    "hash_seed": None,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.05,
    "hidden_size": 256,
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "local_attention_probs_dropout_prob": 0.05,
    "local_attn_chunk_length": 64,
    "local_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_after": 0,
    "lsh_num_chunks_before": 1,
    "max_position_embeddings": 4096,
    "num_attention_heads": 12,
    "num_buckets": None,
    "num_hashes": 1,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}


def load_pretrained(directory: Path | str, *, n_buckets: Buckets | None = None) -> Model:
    """A Reformer of Hugging Face transformers, with the same logits.

    The bias of a language model's head counts, as in transformers 4 and from 5.24 on; 5.0 to 5.23 carry one
    along without adding it.

    Args:
        directory: with `config.json` and the weights as safetensors, or pickled (read without running code).
        n_buckets: of models whose config leaves `num_buckets` open: transformers fixes it by the first input
            that it happens to see.

    Returns:
        A `ReformerLM`, `ReformerMaskedLM` or `ReformerClassifier` in eval mode, by the `architectures` of the
        config.

    Raises:
        ValueError: names the field of the config that cannot be represented, or the weight that does not fit.
        FileNotFoundError: names the file that is not there.
    """
    folder = Path(directory)
    given = _read_json(folder / _CONFIG)
    build = _ARCHITECTURES.get(_architecture(given))
    if build is None:
        raise ValueError(
            f"architectures={given.get('architectures')}: use one of {', '.join(_ARCHITECTURES)}"
        )
    weights = _read_weights(folder)
    config = config_from_transformers(given, n_buckets=n_buckets)
    model = build(config)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = _weight_names(config)
    for ours in state:
        theirs = names[ours]
        found = weights.get(theirs.name, weights.get(theirs.other or theirs.name))
        if found is None:
            raise ValueError(f"{theirs.name}: not among the weights in {folder}")
        value = theirs.read(found)
        if value.shape != state[ours].shape:
            raise ValueError(
                f"{theirs.name} of shape {tuple(value.shape)}: the config asks for {tuple(state[ours].shape)}"
            )
        state[ours] = value.to(state[ours].dtype)
    model.load_state_dict(state, strict=False)
    return model.eval()


def save_pretrained(model: Model, directory: Path | str) -> None:
    """Write a directory that transformers reads, with the same logits there.

    Where the bias of a language model's head is not zero, this needs transformers 5.24: 5.0 to 5.23 add none.

    Args:
        model: what to write.
        directory: made if it is not there; `config.json` and `model.safetensors` in it are replaced.

    Raises:
        ValueError: names the setting that transformers cannot express, and the one that it can.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    config = config_to_transformers(model)
    names = _weight_names(model.config)
    weights = {}
    for ours, value in model.state_dict().items():
        if isinstance(value, Tensor):
            theirs = names[ours]
            for name in filter(None, (theirs.name, theirs.other)):
                weights[name] = theirs.write(value.detach().cpu()).clone(
                    memory_format=torch.contiguous_format
                )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def config_from_transformers(given: Mapping[str, Any], *, n_buckets: Buckets | None = None) -> ReformerConfig:
    """Our config of one of theirs, as read from `config.json`.

    Args:
        given: their fields; what is not there has their default.
        n_buckets: as in `load_pretrained`.

    Raises:
        ValueError: names the field that cannot be represented.
    """
    field = {**_DEFAULTS, **{key: value for key, value in given.items() if key in _DEFAULTS}}
    layers = tuple(field["attn_layers"])
    if not layers or not set(layers) <= _KINDS:
        raise ValueError(f"attn_layers={list(layers)}: transformers has two kinds; use lsh and local")
    causal = bool(field["is_decoder"])
    hidden, heads = field["hidden_size"], field["num_attention_heads"]
    buckets = n_buckets if n_buckets is not None else field["num_buckets"]
    if buckets is None and "lsh" in layers:
        raise ValueError(
            "num_buckets=null: transformers fixes it by the first input that it sees; give n_buckets="
        )
    if field["tie_word_embeddings"]:
        raise ValueError(
            "tie_word_embeddings=true: the head sees both streams and cannot share the embedding"
        )
    if field["hidden_act"] not in ("relu", "gelu"):
        raise ValueError(f"hidden_act={field['hidden_act']!r}: use relu or gelu")
    classifies = _architecture(given) == "ReformerForSequenceClassification"
    if classifies and field["classifier_dropout"] not in (None, field["hidden_dropout_prob"]):
        raise ValueError(
            f"classifier_dropout={field['classifier_dropout']}: one share serves the classifier and the "
            f"branches; use null, or {field['hidden_dropout_prob']} as hidden_dropout_prob is"
        )
    axial = field["axial_pos_embds"]
    return ReformerConfig(
        vocab_size=field["vocab_size"],
        max_length=field["max_position_embeddings"],
        d_model=hidden,
        d_ff=field["feed_forward_size"],
        n_heads=heads,
        d_head=field["attention_head_size"],
        n_layers=len(layers),
        layers=layers,
        causal=causal,
        n_hashes=field["num_hashes"],
        n_buckets=_as_buckets(buckets),
        chunk_length=field["lsh_attn_chunk_length"],
        n_chunks_before=field["lsh_num_chunks_before"],
        n_chunks_after=field["lsh_num_chunks_after"],
        causality="published",
        duplicates="sum",
        seams="reference",
        logit_scale="trax",
        local_chunk_length=field["local_attn_chunk_length"],
        local_n_chunks_before=field["local_num_chunks_before"],
        local_n_chunks_after=field["local_num_chunks_after"],
        conventions="transformers",
        positions="axial" if axial else "learned",
        axial_shape=_pair("axial_pos_shape", field["axial_pos_shape"]) if axial else None,
        axial_dims=_pair("axial_pos_embds_dim", field["axial_pos_embds_dim"]) if axial else None,
        norm_eps=field["layer_norm_eps"],
        activation=field["hidden_act"],
        dropout=field["hidden_dropout_prob"],
        attention_dropout=field["lsh_attention_probs_dropout_prob"],
        local_attention_dropout=field["local_attention_probs_dropout_prob"],
        ff_chunk_length=field["chunk_size_feed_forward"] or None,
        loss_chunk_length=field["chunk_size_lm_head"] or None,
        n_classes=_n_classes(given) if classifies else None,
        hash_seed=field["hash_seed"] or 0,
    )


def config_to_transformers(model: Model) -> dict[str, Any]:
    """Their config of our model.

    Raises:
        ValueError: names the setting that they cannot express, and the one that they can.
    """
    architecture = _name_of(model)
    config = model.config
    for name, needed in (
        ("causality", "published"),
        ("duplicates", "sum"),
        ("seams", "reference"),
        ("logit_scale", "trax"),
        ("conventions", "transformers"),
        ("tie_weights", False),
        ("merge", "concat"),
        ("norm", "layer_norm"),
        ("hashing", CrossPolytope()),
        ("bucket_mask", None),
        ("hash_dropout", 0.0),
    ):
        if getattr(config, name) != needed and not (name == "causality" and not config.causal):
            _refuse(name, getattr(config, name), f"use {name}={needed!r}")
    if config.positions not in ("axial", "learned"):
        _refuse("positions", config.positions, "use positions='axial' or 'learned'")
    if config.activation not in ("relu", "gelu"):
        _refuse("activation", config.activation, "use activation='relu' or 'gelu'")
    kinds = {config.kind(layer) for layer in range(config.n_layers)}
    if not kinds <= _KINDS:
        _refuse("layers", config.layers, "use lsh and local layers")
    n_buckets = config.bucket_count
    axial = config.positions == "axial"
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "reformer",
        "attention_head_size": config.head_width,
        "attn_layers": [config.kind(layer) for layer in range(config.n_layers)],
        "axial_pos_embds": axial,
        "axial_pos_shape": list(config.axial_grid) if axial else _DEFAULTS["axial_pos_shape"],
        "axial_pos_embds_dim": list(config.axial_split) if axial else _DEFAULTS["axial_pos_embds_dim"],
        "chunk_size_feed_forward": config.ff_chunk_length or 0,
        "chunk_size_lm_head": config.loss_chunk_length or 0,
        "feed_forward_size": config.feed_forward_width,
        "hash_seed": config.hash_seed,
        "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout,
        "hidden_size": config.d_model,
        "is_decoder": config.causal,
        "layer_norm_eps": config.norm_eps,
        "local_attention_probs_dropout_prob": config.local_dropout,
        "local_attn_chunk_length": config.local_chunk_length or config.chunk_length,
        "local_num_chunks_after": _after(config.local_n_chunks_after, causal=config.causal),
        "local_num_chunks_before": config.local_n_chunks_before,
        "lsh_attention_probs_dropout_prob": config.attention_dropout,
        "lsh_attn_chunk_length": config.chunk_length,
        "lsh_num_chunks_after": _after(config.n_chunks_after, causal=config.causal),
        "lsh_num_chunks_before": config.n_chunks_before,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.n_heads,
        "num_buckets": list(n_buckets) if isinstance(n_buckets, tuple) else n_buckets,
        "num_hashes": config.n_hashes,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    if isinstance(model, ReformerClassifier):
        fields["id2label"] = {str(index): f"LABEL_{index}" for index in range(config.n_classes or 0)}
        fields["label2id"] = {f"LABEL_{index}": index for index in range(config.n_classes or 0)}
    return fields


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """What a parameter of ours is called there, and how its values are laid out.

    Attributes:
        name: its name there.
        other: a second name, which some versions of theirs read and others leave out of their files.
        read: their values in our shape.
        write: our values in theirs.
    """

    name: str
    other: str | None = None
    read: Callable[[Tensor], Tensor] = lambda value: value
    write: Callable[[Tensor], Tensor] = lambda value: value


def _weight_names(config: ReformerConfig) -> dict[str, _Weight]:
    """Every parameter of ours by its name there."""
    embeddings = "reformer.embeddings"
    names = {
        "embedding.weight": _Weight(name=f"{embeddings}.word_embeddings.weight"),
        "positions.weight": _Weight(name=f"{embeddings}.position_embeddings.embedding.weight"),
        "positions.rows": _Weight(
            name=f"{embeddings}.position_embeddings.weights.0",
            read=lambda value: value[:, 0],
            write=lambda value: value[:, None],
        ),
        "positions.columns": _Weight(
            name=f"{embeddings}.position_embeddings.weights.1",
            read=lambda value: value[0],
            write=lambda value: value[None],
        ),
        "head.norm.weight": _Weight(name="reformer.encoder.layer_norm.weight"),
        "head.norm.bias": _Weight(name="reformer.encoder.layer_norm.bias"),
    }
    head = {"projection": "lm_head.decoder"} if config.n_classes is None else {
        "dense": "classifier.dense", "projection": "classifier.out_proj"
    }  # fmt: skip
    for ours, theirs in head.items():
        names[f"head.{ours}.weight"] = _Weight(name=f"{theirs}.weight")
        other = "lm_head.bias" if theirs == "lm_head.decoder" else None
        names[f"head.{ours}.bias"] = _Weight(name=f"{theirs}.bias", other=other)
    for layer in range(config.n_layers):
        for ours, theirs in _BLOCK.items():
            names[f"blocks.{layer}.{ours}"] = _Weight(name=f"reformer.encoder.layers.{layer}.{theirs}")
    return names


_BLOCK = {
    "attention_norm.weight": "attention.layer_norm.weight",
    "attention_norm.bias": "attention.layer_norm.bias",
    "attention.query_key.weight": "attention.self_attention.query_key.weight",
    "attention.query.weight": "attention.self_attention.query.weight",
    "attention.key.weight": "attention.self_attention.key.weight",
    "attention.value.weight": "attention.self_attention.value.weight",
    "attention.output.weight": "attention.output.dense.weight",
    "feed_forward_norm.weight": "feed_forward.layer_norm.weight",
    "feed_forward_norm.bias": "feed_forward.layer_norm.bias",
    "feed_forward.wide.weight": "feed_forward.dense.dense.weight",
    "feed_forward.wide.bias": "feed_forward.dense.dense.bias",
    "feed_forward.narrow.weight": "feed_forward.output.dense.weight",
    "feed_forward.narrow.bias": "feed_forward.output.dense.bias",
}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; give the directory of a saved Reformer")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    # In the order of transformers: what `save_pretrained` wrote comes before shards that were there.
    if (folder / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif (folder / _INDEX).is_file():
        files = _shards(folder)
    elif (folder / _PICKLED).is_file():
        pickled: dict[str, Tensor] = torch.load(folder / _PICKLED, map_location="cpu", weights_only=True)
        return pickled
    else:
        raise FileNotFoundError(f"{folder}: neither {_WEIGHTS} nor {_PICKLED} is there")
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(folder / file)
    return weights


def _shards(folder: Path) -> list[str]:
    """The files that an index divides the weights over."""
    index = _read_json(folder / _INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / _INDEX}: no weight_map; give the directory of a saved Reformer")
    files = sorted(set(index["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: not there; {_INDEX} names it")
    return files


def _architecture(given: Mapping[str, Any]) -> str:
    return str((given.get("architectures") or [""])[0])


def _name_of(model: Model) -> str:
    for name, kind in _ARCHITECTURES.items():
        if type(model) is kind:
            return name
    *others, last = (kind.__name__ for kind in _ARCHITECTURES.values())
    raise ValueError(
        f"model of type {type(model).__name__}: transformers has no such architecture; "
        f"give a {', '.join(others)} or {last}"
    )


def _n_classes(given: Mapping[str, Any]) -> int:
    """transformers writes the number of labels only as their names, and none for its default of two."""
    return int(given.get("num_labels") or len(given.get("id2label") or (0, 1)))


def _as_buckets(buckets: Any) -> Buckets | None:
    if isinstance(buckets, (list, tuple)):
        return int(buckets[0]) if len(buckets) == 1 else _pair("num_buckets", buckets)
    return None if buckets is None else int(buckets)


def _pair(name: str, values: Any) -> tuple[int, int]:
    if len(values) != 2:
        raise ValueError(f"{name}={list(values)}: two factors can be represented, not {len(values)}")
    return int(values[0]), int(values[1])


def _after(chunks: int | None, *, causal: bool) -> int:
    return chunks if chunks is not None else (0 if causal else 1)


def _refuse(name: str, value: object, mend: str) -> None:
    raise ValueError(f"{name}={value!r}: transformers has no such setting; {mend}")
