"""Sources of a residual stream: vectors of W0 from which a verifier finds the coordinates of the stream."""

from __future__ import annotations

from torch import Tensor, nn

from mtlsign.models.residual_stream import ResidualStream, source_vectors
from mtlsign.watermark.verification.embedding_frame import MAX_ROWS, vocabulary_tensors


def stream_tensors(model: nn.Module, stream: ResidualStream) -> dict[str, Tensor]:
    """Return the reference's tensors of a stream's sources.

    They are `S/rows` float16 [r, d] for every source S, and `S/mean` and `S/axes` for the embedding of
    the tokens (`embedding_rows`). The vectors of a matrix between stages include the gain of its norm.

    Args:
        model: the unmarked network W0.
        stream: its residual stream.
    """
    tensors: dict[str, Tensor] = {}
    parameters = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for stage in stream.parts:
        for name in stage.sources:
            source = parameters[name]
            if name in stream.mergings:
                source = source * parameters[stream.gains[name]]
            vectors = stage_vectors(name, source, stream, stage.size)
            if vectors is not None:
                tensors[f"{name}/rows"] = vectors[:MAX_ROWS].half().clone()
    words = _words_name(model, stream)
    if words is not None:
        tensors |= vocabulary_tensors(words, parameters[words])
    return tensors


def stage_vectors(name: str, tensor: Tensor, stream: ResidualStream, size: int) -> Tensor | None:
    """Return the vectors of a source, [r, size]; None if it has another size.

    Args:
        name: of the source.
        tensor: its values; of a matrix between stages [size, in].
        stream: the residual stream.
        size: numbers of one vector of the stage that it starts.
    """
    if name not in stream.mergings:
        return source_vectors(tensor, size)
    return tensor.T if tensor.dim() == 2 and tensor.shape[0] == size else None


def _words_name(model: nn.Module, stream: ResidualStream) -> str | None:
    """Return the embedding that is used first, which is that of the tokens; None without one."""
    modules = dict(model.named_modules())
    embeddings = (n for n in stream.sources if isinstance(modules[n.rpartition(".")[0]], nn.Embedding))
    return next(embeddings, None)
