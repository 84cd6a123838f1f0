"""Word carrier: integers become sequences of words (docs/format.md, section "Word carrier").

A word is a token id of the owner's network. The carrier holds no text and no tokenizer, so that a verifier
needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtlsign.errors import CarrierError
from mtlsign.models.input_spec import InputSpec, TextSpec
from mtlsign.storage.strict_json import raise_invalid
from mtlsign.watermark.carriers.base import Carrier
from mtlsign.watermark.keys.opening import keystream
from mtlsign.watermark.keys.spec import CarrierSpec, WordCarrierSpec, digit_count, parse_carrier

#: Token ids before the first word: padding and the unknown word.
RESERVED_IDS = 2
#: Number of words that sequences are chosen from, and words of a sequence.
DEFAULT_BASE, DEFAULT_LENGTH = 1024, 8
#: Largest number of token ids of a key set.
MAX_ELEMENTS = 2**24
#: The key of the words after the digits is public and the same for all owners.
_DIGIT_KEY = bytes(32)


@dataclass(frozen=True)
class WordCarrier(Carrier):
    """Sequences of the most frequent words of the owner's vocabulary.

    The first words are the digits of the integer in the base, most significant first. Further words are
    digits of a public hash of the integer.
    """

    spec: WordCarrierSpec

    @classmethod
    def make(cls, n: int, input_spec: InputSpec) -> dict[str, int | str]:
        """Return the spec's `carrier` object: sequences of 8 of the 1,024 most frequent words, if possible.

        Args:
            n: key size.
            input_spec: texts of the primary task.

        Raises:
            CarrierError: the task has no texts, or its vocabulary or texts are too small for n integers.
        """
        if not isinstance(input_spec, TextSpec):
            raise CarrierError(f"Words need texts, not {input_spec}. Use QR codes.", field="carrier")
        base = min(DEFAULT_BASE, input_spec.vocabulary - RESERVED_IDS)
        length = min(DEFAULT_LENGTH, input_spec.length)
        digits = digit_count(n, base) if base >= 2 else length + 1
        if digits > length:
            raise CarrierError(
                f"{max(base, 0)} words in sequences of {length} are too few for {n} integers. "
                "Use a larger vocabulary or a smaller key.",
                field="carrier",
            )
        return {"kind": "words", "base": base, "digits": digits, "length": length}

    @classmethod
    def parse(cls, fields: Mapping[str, object] | CarrierSpec) -> Self:
        """Return the carrier of a spec's `carrier` object, which may be checked already.

        Raises:
            KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
        """
        spec = fields if isinstance(fields, CarrierSpec) else parse_carrier(dict(fields))
        if not isinstance(spec, WordCarrierSpec):
            raise_invalid("carrier.kind", "The value must be words")
        return cls(spec)

    @property
    def element_shape(self) -> tuple[int]:
        """Words of one sequence."""
        return (self.spec.length,)

    def sample(self, count: int = 2, device: torch.device | str = "cpu") -> Tensor:
        """Return sequences of one word, int64 [count, length]."""
        return torch.ones(count, self.spec.length, dtype=torch.int64, device=device)

    def number_count(self, n: int) -> int:
        """Return how many token ids n sequences hold."""
        return n * self.spec.length

    def check(self, n: int) -> None:
        """Raise CarrierError if n sequences hold more than 2^24 token ids."""
        if self.number_count(n) > MAX_ELEMENTS:
            raise CarrierError(
                f"{n} sequences hold over {MAX_ELEMENTS} words. Use a smaller n or shorter sequences.",
                field="carrier",
            )

    def inputs(self, integers: npt.NDArray[np.int64]) -> Tensor:
        """Return key sequences, int64 [n, length], on the CPU.

        Raises:
            CarrierError: an integer is negative or has more than `digits` digits, or `check` fails.
        """
        self.check(len(integers))
        base, digits, length = self.spec.base, self.spec.digits, self.spec.length
        rows = np.empty((len(integers), length), dtype=np.int64)
        for row, integer in zip(rows, integers.tolist(), strict=True):
            if not 0 <= integer < base**digits:
                raise CarrierError(
                    f"{integer} is not from 0 to {base}^{digits} - 1. Use a smaller integer.", field="carrier"
                )
            row[:digits] = [integer // base ** (digits - 1 - place) % base for place in range(digits)]
            row[digits:] = _hashed_words(integer, base, length - digits)
        return torch.from_numpy(rows + RESERVED_IDS)


def _hashed_words(integer: int, base: int, count: int) -> list[int]:
    """Return `count` numbers of the keystream `mtlsign/v1/words/<integer>` under a key of 32 zero bytes."""
    stream = keystream(_DIGIT_KEY, b"mtlsign/v1/words/%d" % integer, 8 * count)
    return [number % base for number in np.frombuffer(stream, dtype=">u8").tolist()]
