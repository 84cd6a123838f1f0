"""Recognition of files and folders that are no model in safetensors form, with the fix for each."""

from __future__ import annotations

from mtlsign.service.problems import Problem
from mtlsign.storage.file_formats import other_format

#: First bytes of other formats of weights.
_MAGIC = (
    (b"GGUF", "a GGUF model"), (b"PK\x03\x04", "a PyTorch checkpoint"), (b"\x80\x02", "a pickled object"),
    (b"\x80\x04", "a pickled object"), (b"\x89HDF\r\n", "an HDF5 file"),
)  # fmt: skip
#: Files of a Hugging Face folder, in the order in which they are looked for.
HUGGING_FACE_FILES = (
    "model.safetensors.index.json", "model.safetensors", "config.json", "pytorch_model.bin"
)  # fmt: skip


def problem_of_suffix(name: str) -> Problem | None:
    """Return the problem of a file whose name has the suffix of another format, or None."""
    kind = other_format(name)
    return None if kind is None else _other_format(f"The location names {kind}.")


def problem_of_content(head: bytes) -> Problem | None:
    """Return the problem of a file whose first bytes are those of another format, or None."""
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    return None if kind is None else _other_format(f"The file is {kind}.")


def _other_format(finding: str) -> Problem:
    reason = "The service reads safetensors and, below its locations, GGUF files, which hold no code."
    fix = "Convert it on your machine (mtlsign convert, or safetensors.torch.save_file) and give that file."
    return Problem("not-a-model", f"{finding} {reason} {fix}")


def problem_of_folder(names: frozenset[str]) -> Problem:
    """Return the problem of a folder without a manifest.

    Args:
        names: those of `HUGGING_FACE_FILES` that the folder has.
    """
    if "model.safetensors.index.json" in names:
        detail = (
            "The location is a Hugging Face folder whose weights are split into several files. "
            "Load it, and save it again as one .safetensors file."
        )
    elif "model.safetensors" in names:
        detail = (
            "The location is a Hugging Face folder. Give its file instead: add /model.safetensors to the "
            "location."
        )
    elif names:
        detail = (
            "The location is a Hugging Face folder without model.safetensors. "
            "Save its weights with save_pretrained(…, safe_serialization=True)."
        )
    else:
        detail = (
            "The location is a folder without a manifest.json, which every model folder of this package has. "
            "Give the location of a model folder or of a .safetensors file."
        )
    return Problem("not-a-model", detail)


def problem_of_file_name() -> Problem:
    """Return the problem of a file whose name does not show its format."""
    detail = "The location is a file whose name does not end in .safetensors. Rename a safetensors file."
    return Problem("not-a-model", detail)
