"""Table of the stored forms: names of the companions, and the function that computes the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from mtlsign.models.derived_weights.bitsandbytes import four_bits
from mtlsign.models.derived_weights.companions import Companions
from mtlsign.models.derived_weights.low_rank import ALPHAS, with_adapter
from mtlsign.models.derived_weights.packed import compressed, quanto_packed, torchao
from mtlsign.models.derived_weights.reparametrised import pruned, spectral_norm, weight_norm
from mtlsign.models.derived_weights.scaled import scaled, scaled_rows

WEIGHT = "weight"
_PARAMETRIZED = "parametrizations.weight."


@dataclass(frozen=True)
class Form:
    """A stored form of a kernel `X.weight`. All suffixes follow the prefix `X.`.

    Attributes:
        required: suffixes that a file must have; the form is recognised by them alone.
        optional: suffixes of further companions.
        compute: function that computes the kernel, or raises `ModelError`.
    """

    required: tuple[str, ...]
    compute: Callable[[Companions], Tensor]
    optional: tuple[str, ...] = ()

    @property
    def marker(self) -> str:
        """Suffix by which the form is searched: the first one that is not the kernel's own."""
        return next(suffix for suffix in self.required if suffix != WEIGHT)


def _four_bits(table: str) -> Form:
    return Form(
        (WEIGHT, f"weight.quant_state.bitsandbytes__{table}", "weight.absmax"),
        partial(four_bits, table=table),
        ("weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    )


def _adapter(kernel: str, down: str, up: str) -> Form:
    return Form((kernel, down, up), partial(with_adapter, kernel=kernel, down=down, up=up), ALPHAS)


#: The order is that in which a layer stored in several forms is read.
FORMS: tuple[Form, ...] = (
    Form(
        ("weight_g", "weight_v"),
        partial(weight_norm, magnitude="weight_g", direction="weight_v"),
    ),
    Form(
        (_PARAMETRIZED + "original0", _PARAMETRIZED + "original1"),
        partial(weight_norm, magnitude=_PARAMETRIZED + "original0", direction=_PARAMETRIZED + "original1"),
    ),
    Form(
        ("weight_orig", "weight_u", "weight_v"),
        partial(spectral_norm, kernel="weight_orig", left="weight_u", right="weight_v"),
    ),
    Form(
        (_PARAMETRIZED + "original", _PARAMETRIZED + "0._u", _PARAMETRIZED + "0._v"),
        partial(
            spectral_norm,
            kernel=_PARAMETRIZED + "original",
            left=_PARAMETRIZED + "0._u",
            right=_PARAMETRIZED + "0._v",
        ),
    ),
    Form(("weight_orig", "weight_mask"), pruned),
    Form(
        ("weight_packed", "weight_scale", "weight_shape"),
        compressed,
        ("weight_zero_point", "weight_g_idx"),
    ),
    Form(
        (WEIGHT, "weight_scale"),
        partial(scaled, kernel=WEIGHT, scale="weight_scale", zero_point="weight_zero_point"),
        ("weight_zero_point",),
    ),
    Form((WEIGHT, "weight_scale_inv"), partial(scaled, kernel=WEIGHT, scale="weight_scale_inv")),
    Form((WEIGHT, "SCB"), scaled_rows, ("weight_format",)),
    _four_bits("nf4"),
    _four_bits("fp4"),
    Form(
        ("weight._data", "weight._scale"),
        partial(scaled, kernel="weight._data", scale="weight._scale"),
    ),
    Form(("weight._data._data", "weight._scale", "weight._shift"), quanto_packed),
    Form(
        ("_weight_qdata", "_weight_scale"),
        torchao,
        (
            "_weight_zero_point",
            "_weight_act_pre_scale",
            "_weight_act_quant_scale",
            "_weight_act_quant_zero_point",
        ),
    ),
    _adapter(WEIGHT, "lora_A.weight", "lora_B.weight"),
    _adapter(WEIGHT, "lora_A", "lora_B"),
    _adapter(WEIGHT, "lora_down.weight", "lora_up.weight"),
    _adapter("base_layer.weight", "lora_A.weight", "lora_B.weight"),
    _adapter("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"),
)
