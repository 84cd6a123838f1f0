"""Pretrained transformers: a Hugging Face folder or GGUF file as a network of this package, and back.

The network is `Transformer`, built from integers and closed lists, so that a verifier needs neither the
library nor code of the folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models import architectures
from mtlsign.models.conversion import read_weights
from mtlsign.models.tensor_names import map_names
from mtlsign.models.transformer import NORM_EPS, Transformer
from mtlsign.storage.json_io import read_json_object

_MAX_CONFIG = 1 << 20
#: Matrices whose rows rotary positions turn in pairs.
_ROTARY = ("attention.query.weight", "attention.key.weight")
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
#: Names of activations in configurations -> those of this package.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class PretrainedTransformer:
    """Pretrained network.

    Attributes:
        network: the network in float32; a new matrix of outputs has random values.
        architecture: JSON object of the spec, for `mtlsign.embed`.
        original: tensors of the file, under its names.
        names: name in the network -> name in the file.
        token_type: vector [embedding] of token type 0, which the network adds to its positions; None without.
        is_gguf: whether the file stores the pairs of rotary positions as neighbours.
    """

    network: Transformer
    architecture: Mapping[str, object]
    original: Mapping[str, Tensor]
    names: Mapping[str, str]
    token_type: Tensor | None
    is_gguf: bool

    def in_original_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the file's tensors with the trained values of a network, under the file's names and types.

        Args:
            tensors: state dict of a network of the same architecture.
        """
        written = dict(self.original)
        for name, source in self.names.items():
            if name not in tensors:
                continue
            value, original = tensors[name].detach().cpu(), self.original[source]
            if self.is_gguf and name.endswith(_ROTARY):
                value = _neighbour_rotary_rows(value, self.network.shape.head_size)
            if name == "positions.weight" and self.token_type is not None:
                if torch.equal(value, original.float() + self.token_type):
                    continue  # the difference would be rounded
                value = value - self.token_type
            written[source] = value.to(original.dtype).contiguous()
        return written


def pretrained_architecture(
    source: str | Path, *, classes: int | None, pooling: str | None = None
) -> dict[str, object]:
    """Return the architecture of a pretrained transformer; see `load_pretrained_transformer`."""
    source = Path(source).expanduser()
    config = _gguf_config(source) if source.suffix.lower() == ".gguf" else _read_config(source)
    fields = _fields(config)
    if classes is None and not fields.get("causal"):
        raise ModelError("An encoder has no outputs. Give the number of classes.", field="classes")
    if classes is None:
        tied = int(bool(config.get("tie_word_embeddings", False)))
        fields |= {"classes": fields["vocabulary"], "pooling": "tokens", "tied": tied}
    else:
        fields |= {"classes": classes, "pooling": pooling or ("last" if fields.get("causal") else "mean")}
    return {"arch": "transformer", **fields}


def load_pretrained_transformer(
    source: str | Path, *, classes: int | None = None, pooling: str | None = None
) -> PretrainedTransformer:
    """Load a BERT encoder or Llama decoder from a Hugging Face folder, or a Llama decoder from a GGUF file.

    Args:
        source: a folder with config.json and weights, or a .gguf file.
        classes: outputs of a new matrix after pooling; None for a decoder's outputs at every token.
        pooling: see `TransformerShape`; "mean" for encoders and "last" for decoders by default.

    Raises:
        ModelError: files are missing or damaged, or the network is of another kind.
    """
    source = Path(source).expanduser()
    architecture = pretrained_architecture(source, classes=classes, pooling=pooling)
    checkpoint = read_weights(source)
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    is_gguf = source.suffix.lower() == ".gguf"
    network = architectures.build(architecture)
    assert isinstance(network, Transformer)
    token_type = next((t[0] for name, t in tensors.items() if name.endswith(_TOKEN_TYPES)), None)
    names = _load(network, tensors, token_type, is_gguf=is_gguf, new_head=classes is not None)
    return PretrainedTransformer(network.eval(), architecture, checkpoint.tensors, names, token_type, is_gguf)


def in_original_names(source: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a marked network under the names of the pretrained one.

    Args:
        source: folder or file of the pretrained network.
        tensors: state dict of a network that was made from it, with its own outputs or new ones.

    Raises:
        ModelError: as `load_pretrained_transformer`, or the tensors are those of another network.
    """
    # Only new outputs, after pooling, have a bias.
    loaded = load_pretrained_transformer(source, classes=2 if "fc.bias" in tensors else None)
    state = loaded.network.state_dict()
    for name in loaded.names:
        if name not in tensors or tensors[name].shape != state[name].shape:
            raise ModelError(
                f"The weights do not come from this pretrained network, such as at {name!r}. "
                "Give the folder that was marked.",
                field="original",
            )
    return loaded.in_original_names(tensors)


def _output_matrix(tensors: Mapping[str, Tensor]) -> str:
    for name in ("lm_head.weight", "output.weight"):
        if name in tensors:
            return name
    raise ModelError(
        "The file has no matrix of outputs. If they are tied to the token vectors, set tie_word_embeddings "
        "in config.json.",
        field="weights",
    )


def _load(
    network: Transformer,
    tensors: dict[str, Tensor],
    token_type: Tensor | None,
    *,
    is_gguf: bool,
    new_head: bool,
) -> dict[str, str]:
    """Copy the tensors of a file into a network; return their names."""
    head = [] if network.fc is None else [f"fc.{name}" for name, _ in network.fc.named_parameters()]
    names = map_names(network.state_dict(), tensors, optional=head)
    if head and not new_head:
        names["fc.weight"] = _output_matrix(tensors)
    state = network.state_dict()
    for name, source in names.items():
        value = tensors[source]
        if is_gguf and name.endswith(_ROTARY):
            value = _half_rotary_rows(value, network.shape.head_size)
        if value.shape != state[name].shape:
            raise ModelError(
                f"{source!r} is {list(value.shape)} and should be {list(state[name].shape)}. "
                "Give the configuration of the same model.",
                field="weights",
            )
        state[name] = value
    if token_type is not None:  # every token of a single text has type 0
        state["positions.weight"] = state["positions.weight"] + token_type
    network.load_state_dict(state)
    return names


def _neighbour_rotary_rows(rows: Tensor, size: int) -> Tensor:
    """Return the rows of `_half_rotary_rows` in the order of GGUF."""
    pairs: Tensor = rows.reshape(-1, 2, size // 2, rows.shape[1]).transpose(1, 2)
    return pairs.reshape(rows.shape)


def _half_rotary_rows(rows: Tensor, size: int) -> Tensor:
    """Return rows in which number i turns with i + size / 2; GGUF stores such pairs as neighbours."""
    pairs: Tensor = rows.reshape(-1, size // 2, 2, rows.shape[1]).transpose(1, 2)
    return pairs.reshape(rows.shape)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no config.json. Give the folder of a Hugging Face model or a .gguf file.",
            field="model",
        )
    try:
        with path.open("rb") as file:
            return read_json_object(file.read(_MAX_CONFIG + 1), "config.json", limit=_MAX_CONFIG)
    except (ArtifactError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Download it again.", field="model") from None


def _fields(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the fields of the architecture that a configuration describes.

    Raises:
        ModelError: the kind of network or one of its options is not supported.
    """
    kind = config.get("model_type")
    if kind not in ("bert", "llama", "mistral"):
        raise ModelError(
            f"A network of the kind {kind!r:.40} is not supported. Use BERT or Llama.", field="model"
        )
    heads = _integer(config, "num_attention_heads")
    size = _integer(config, "hidden_size")
    activation = _ACTIVATIONS.get(str(config.get("hidden_act", "gelu")))
    unsupported = [
        name
        for name, expected in (
            ("position_embedding_type", "absolute"), ("rope_scaling", None), ("attention_bias", False),
            ("mlp_bias", False), ("sliding_window", None), ("is_decoder", False),
        )
        if config.get(name, expected) not in (expected, None)
    ]  # fmt: skip
    if activation is None or unsupported:
        raise ModelError(
            f"The option {(unsupported or ['hidden_act'])[0]!r} of the configuration is not supported.",
            field="model",
        )
    fields: dict[str, object] = {
        "vocabulary": _integer(config, "vocab_size"),
        "embedding": size,
        "heads": heads,
        "kv_heads": _integer(config, "num_key_value_heads", heads),
        "head_size": _integer(config, "head_dim", size // heads),
        "inner": _integer(config, "intermediate_size"),
        "layers": _integer(config, "num_hidden_layers"),
        "length": _integer(config, "max_position_embeddings"),
        "activation": activation,
        "norm_eps": _nearest_eps(config),
    }
    if kind == "bert":
        return fields | {"norm": "layer", "order": "post", "positions": "learned", "bias": 1}
    return fields | {
        "norm": "rms", "order": "pre", "positions": "rotary", "gated": 1, "bias": 0, "causal": 1,
        "rotary_base": _rotary_base(config),
    }  # fmt: skip


def _rotary_base(config: Mapping[str, Any]) -> int:
    """Return the base of rotary positions without scaling, in the two forms of configurations."""
    rotary = config.get("rope_parameters")
    rotary = rotary if isinstance(rotary, dict) else {}
    base = rotary.get("rope_theta", config.get("rope_theta")) or 10_000
    plain = rotary.get("rope_type", "default") == "default" and rotary.get("partial_rotary_factor", 1) == 1
    if not plain or not isinstance(base, int | float) or base != round(base):
        raise ModelError("The rotary positions of the configuration are not supported.", field="model")
    return round(base)


def _nearest_eps(config: Mapping[str, Any]) -> str:
    """Return the supported value that a configuration means, also if it was stored in float32."""
    value = config.get("layer_norm_eps", config.get("rms_norm_eps"))
    fitting = [
        eps for eps in NORM_EPS if type(value) is float and math.isclose(value, float(eps), rel_tol=1e-3)
    ]
    if not fitting:
        raise ModelError(
            f"The norms add {value!r:.20} to the variance. Only {', '.join(NORM_EPS)} are supported.",
            field="model",
        )
    return fitting[0]


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ModelError(f"The configuration has no whole number {name!r}. Correct it.", field="model")
    return value


def _gguf_config(path: Path) -> dict[str, Any]:
    """Return the configuration that the metadata of a GGUF file describes."""
    if not path.is_file():
        raise ModelError(f"The file {path} does not exist. Give the path of a model.", field="model")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            f"{path.name!r} needs the library gguf. Install it with `pip install gguf`.", field="model"
        ) from None
    try:
        reader = GGUFReader(str(path))
        kind = str(reader.fields["general.architecture"].contents())
        vocabulary = next(int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight")
        is_tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    except Exception as error:  # the library raises almost anything on damaged bytes
        raise ModelError(f"{path} cannot be read ({type(error).__name__}).", field="model") from None

    def value(name: str) -> Any:
        entry = reader.fields.get(f"{kind}.{name}")
        return None if entry is None else entry.contents()

    return {
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "tie_word_embeddings": is_tied,
        "hidden_size": value("embedding_length"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "max_position_embeddings": value("context_length"),
        "rope_theta": value("rope.freq_base"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
    }
