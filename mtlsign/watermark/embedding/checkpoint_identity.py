"""Identity of a phase: everything that determines its computation, as a digest that its checkpoints name.

A run folder may be a mixture of several runs, after a partial copy or deletion. A checkpoint with another
identity is refused, because it would continue the embedding of another key.
"""

from __future__ import annotations

import hashlib
import json

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ArtifactError
from mtlsign.watermark.embedding.worker import State
from mtlsign.watermark.verification.detector import WatermarkDetector

#: Settings that phase 1 depends on: runs that agree in them have the same W0.
PHASE1_SETTINGS = (
    *("task", "data", "tokenizer", "model", "width", "stem", "weights", "weights_key", "adapter"),
    *("phase1.initial_weights", "phase1.epochs", "phase1.batch", "phase1.optimizer", "phase1.lr"),
    *("phase1.weight_decay", "amp", "seed"),
)
#: Those that earlier versions did not have.
_ADDED = ("tokenizer", "adapter", "phase1.initial_weights")
_PHASE2_SETTINGS = ("task", "lambda1", "lambda2", "r_func", "amp", "seed")
_PHASE2_GROUPS = ("phase2.", "perturbation.")
_FIELD = "belongs_to"


def phase1_identity(settings: EmbedSettings) -> str:
    """Return the identity of phase 1 (64 hex); the folder of the data is not part of it.

    SGD, the words of GloVe and random weights, the only choices of earlier versions, are not part of it
    either, so that their runs can be resumed.
    """
    optional = {"data"} if settings.phase1.optimizer == "adam" else {"data", "phase1.optimizer"}
    optional |= {name for name in _ADDED if settings.value_of(name) is None}
    return _digest(settings, [name for name in PHASE1_SETTINGS if name not in optional], b"phase 1")


def phase2_identity(settings: EmbedSettings, detector: WatermarkDetector, *, adapter: bytes = b"") -> str:
    """Return the identity of phase 2 (64 hex): its settings and the keys, which it does not reveal.

    The first key is hashed itself. Further keys are represented by their bits.

    Args:
        settings: complete settings.
        detector: the owner's detector.
        adapter: digest of the adapter that is trained; empty without one.
    """
    names = [name for name in settings.flat_dump() if name.startswith(_PHASE2_GROUPS)]
    labels = detector.labels.cpu().numpy().tobytes()
    return _digest(settings, [*_PHASE2_SETTINGS, *names], b"phase 2" + detector.key + labels + adapter)


def with_identity(state: State, identity: str) -> State:
    """Return the checkpoint with the identity of its phase."""
    return {**state, _FIELD: identity}


def require_identity(state: State, identity: str) -> None:
    """Raise `ArtifactError` if a checkpoint names another identity or none."""
    if state.get(_FIELD) != identity:
        raise ArtifactError(
            "A checkpoint of this run belongs to another key or to other settings, or has version 0. "
            "Restore the files of the run, or start a new run.",
            field="resume",
        )


def _digest(settings: EmbedSettings, names: list[str], context: bytes) -> str:
    values = settings.flat_dump()
    text = json.dumps({name: values[name] for name in sorted(names)}, sort_keys=True)
    return hashlib.sha256(b"mtlsign/v1/checkpoint " + context + text.encode()).hexdigest()
