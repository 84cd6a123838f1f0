"""Networks of the timm library, built by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.factories import Factory
from mtlsign.models.families.base import CHANNELS, CLASSES, ArchitectureFamily, Field, IntegerField

PREFIX = "timm/"
#: Larger networks are rejected before any memory is allocated for them.
MAX_PARAMETERS = 400_000_000

_NAME = re.compile(r"[A-Za-z0-9_]{1,100}")
_STEM = re.compile(r"(stem|conv_stem|conv_?[01]\b|(features\.)?(bn|act|norm)[01]\b|act2\b|relu|layer0)")


class TimmFamily(ArchitectureFamily):
    """`timm/NAME`, with the image `size` in pixels for networks that have a fixed one."""

    usage = f"{PREFIX}NAME"
    fields: Mapping[str, Field] | None = {
        "channels": CHANNELS,
        "classes": CLASSES,
        "size": IntegerField(21, 1024, required=False),
    }

    def includes(self, arch: str) -> bool:
        """Return whether `arch` has the form of a timm name; hub addresses do not."""
        return arch.startswith(PREFIX) and _NAME.fullmatch(arch[len(PREFIX) :]) is not None

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return the image size, if it is given."""
        return {} if size is None else {"size": size}

    def has_fixed_size(self, arch: str) -> bool:
        """Return whether timm builds the network for one image size, as it does vision transformers."""
        try:
            from timm.models import get_pretrained_cfg
        except ImportError:
            return False
        config = get_pretrained_cfg(arch[len(PREFIX) :], allow_unregistered=True)
        return bool(config is not None and config.fixed_input_size)

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build the network of a timm name, without pretrained weights.

        Raises:
            ModelError: timm is not installed, does not know the name, or rejects the options; or the
                network has more than `MAX_PARAMETERS` parameters.
        """
        try:
            import timm
        except ImportError:
            raise ModelError(
                "timm is not installed. Install the extra `mtlsign[timm]`.", field="model"
            ) from None
        name = arch[len(PREFIX) :]
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"Use a similar one, such as {', '.join(near)}." if near else "See timm.list_models()."
            raise ModelError(f"timm has no model {name!r}. {hint}", field="model")
        keywords = _keywords(options)
        try:
            with torch.device("meta"):
                shapes = timm.create_model(name, pretrained=False, **keywords)
            _check_parameter_count(arch, shapes)
            model: nn.Module = timm.create_model(name, pretrained=False, **keywords)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"timm cannot build {name!r} with {keywords} ({type(error).__name__}: {str(error)[:120]}). "
                "Use other values.",
                field="model",
            ) from None
        return model

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the modules that timm's `feature_info` lists after the stem."""
        modules = dict(model.named_modules())
        info = getattr(model, "feature_info", None)
        entries = getattr(info, "info", info)
        if not isinstance(entries, list | tuple):
            return ()
        names = [entry.get("module") for entry in entries if isinstance(entry, Mapping)]
        stages = dict.fromkeys(n for n in names if isinstance(n, str) and n and not _STEM.match(n))
        return [name for name in stages if name in modules]

    def pretrained_weights(self, arch: str, options: Mapping[str, object]) -> Mapping[str, Tensor]:
        """Return timm's weights from its hub or cache. Raises `ModelError` if they are unavailable."""
        name = arch[len(PREFIX) :]
        try:
            import timm

            model = timm.create_model(name, pretrained=True, **_keywords(options))
        except Exception as error:
            raise ModelError(
                f"timm's weights of {name!r} are unavailable ({type(error).__name__}). "
                "Download them and give the file.",
                field="weights",
            ) from None
        weights: Mapping[str, Tensor] = model.state_dict()
        return weights


def _keywords(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the keyword arguments of `timm.create_model` for the fields of an architecture."""
    size = {"img_size": options["size"]} if "size" in options else {}
    return {"in_chans": options["channels"], "num_classes": options["classes"], **size}


def _check_parameter_count(arch: str, model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_PARAMETERS:
        raise ModelError(
            f"{arch} has {count:,} parameters, more than the limit of {MAX_PARAMETERS:,}. "
            "Use a smaller model.",
            field="model",
        )
