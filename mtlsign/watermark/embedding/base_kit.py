"""W0 from an owner kit, to mark further copies of one network, such as one for each recipient."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import KeyMaterialError
from mtlsign.models import architectures
from mtlsign.models.loading import custom_factories
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import read_kit


def load_base_weights(
    settings: EmbedSettings, architecture: Mapping[str, object], secret: EncryptionSecret
) -> dict[str, Tensor]:
    """Return the state dict of W0 that the kit `settings.base_kit` holds.

    Args:
        settings: complete settings.
        architecture: fields of the spec's `architecture`, which must be those of the kit.
        secret: the owner's encryption secret.

    Raises:
        KeyMaterialError: the kit is another owner's or damaged, belongs to another architecture, or holds
            only a part of W0.
        ArtifactError, StorageError: the kit cannot be fetched.
    """
    kit = read_kit(str(settings.base_kit), secret, endpoint=settings.endpoint)
    committed = kit.opening.parse().architecture
    if committed != dict(architecture):
        differing = sorted(
            name for name in {*committed, *architecture} if committed.get(name) != architecture.get(name)
        )
        raise KeyMaterialError(
            f"The kit belongs to another architecture: {', '.join(differing)} differ. "
            "Give the --model, --width, --stem and --task of the first run.",
            field="base-kit",
        )
    weights = parse_safetensors(kit.base_weights)
    model = architectures.build(architecture, factories=custom_factories(architecture))
    missing = sorted(set(model.state_dict()) - set(weights))
    if missing:
        raise KeyMaterialError(
            f"The kit holds only a part of W0; {len(missing)} tensors are missing, such as {missing[0]}. "
            "Use a kit with a spread head.",
            field="base-kit",
        )
    return weights
