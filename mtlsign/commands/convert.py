"""Command `mtlsign convert`."""

from __future__ import annotations

from functools import partial

from mtlsign.config.cli import Output, job
from mtlsign.config.convert import ConvertSettings


@job(ConvertSettings)
def convert(settings: ConvertSettings) -> Output:
    """Write the weights of a model in another format as one safetensors file, for `mtlsign verify`.

    Only tensors are read. A file that needs code to be loaded is refused.
    """
    from mtlsign.models.conversion import convert_weights

    rename = None
    if settings.original is not None:
        from mtlsign.models.pretrained_transformer import in_original_names

        rename = partial(in_original_names, settings.original)
    conversion = convert_weights(
        settings.source, settings.output, key=settings.weights_key, base=settings.base, rename=rename
    )
    document = {
        "source": str(settings.source),
        "output": str(settings.output),
        "tensors": conversion.tensors,
        "bytes": conversion.byte_count,
        "sha256": conversion.digest,
        "statement": conversion.statement,
    }
    text = f"{settings.output}: {conversion.tensors} tensors, {conversion.byte_count:,} bytes"
    return Output(document, "\n".join(line for line in (conversion.statement, text) if line))
