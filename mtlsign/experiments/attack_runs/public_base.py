"""Public base model that an attacker knows, under the names of the marked network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mtlsign.attacks.fine_tuning import last_layer
from mtlsign.models.conversion import read_weights
from mtlsign.models.pretrained_transformer import load_pretrained_transformer
from mtlsign.models.tensor_names import map_names
from mtlsign.models.transformer import Transformer


def load_public_base(source: str, network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a public base that the network has under the same name and in the same shape.

    Args:
        source: a Hugging Face folder or GGUF file for a transformer of this package; otherwise a file or
            folder that `jobs/convert.py` reads. Outputs that the base does not have are left out.
        network: the marked network; its weights are not read.

    Raises:
        ModelError: the source is missing, damaged, or of another network.
    """
    path, state = Path(source).expanduser(), network.state_dict()
    if isinstance(network, Transformer) and (
        path.suffix.lower() == ".gguf" or (path / "config.json").is_file()
    ):
        return _fitting(_pretrained(path, network), state)
    outputs = [name for name, module in network.named_modules() if module is last_layer(network)]
    optional = [name for name in state if name.rpartition(".")[0] in outputs]
    tensors = read_weights(path).tensors
    return _fitting({n: tensors[s] for n, s in map_names(state, tensors, optional=optional).items()}, state)


def _pretrained(path: Path, network: Transformer) -> dict[str, Tensor]:
    """Return the weights of a pretrained transformer; new outputs, which have random values, are left out."""
    of_tokens = network.shape.pooling == "tokens"
    loaded = load_pretrained_transformer(
        path,
        classes=None if of_tokens else network.shape.classes,
        pooling=None if of_tokens else network.shape.pooling,
    )
    state = loaded.network.state_dict()
    return {name: tensor for name, tensor in state.items() if of_tokens or not name.startswith("fc.")}


def _fitting(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the network's names and shapes as floats of the network's types."""
    return {
        name: tensor.to(state[name].dtype)
        for name, tensor in tensors.items()
        if name in state and tensor.shape == state[name].shape
    }
