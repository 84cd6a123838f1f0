"""Recognition of files and folders that are no model in safetensors form, with the fix for each."""

from __future__ import annotations

from mtlsign.service.problems import Problem

#: Suffixes of other formats of weights.
_SUFFIXES = {
    ".pt": "PyTorch", ".pth": "PyTorch", ".bin": "PyTorch", ".ckpt": "checkpoint", ".pkl": "pickle",
    ".gguf": "GGUF", ".ggml": "GGML", ".onnx": "ONNX", ".h5": "HDF5", ".keras": "Keras", ".npz": "NumPy",
    ".msgpack": "Flax", ".tflite": "TFLite", ".pb": "TensorFlow",
}  # fmt: skip
#: First bytes of other formats of weights.
_MAGIC = (
    (b"GGUF", "GGUF"), (b"PK\x03\x04", "PyTorch"), (b"\x80\x02", "pickle"), (b"\x80\x04", "pickle"),
    (b"\x89HDF\r\n", "HDF5"),
)  # fmt: skip
_PICKLES = {"PyTorch", "checkpoint", "pickle"}
#: Files of a Hugging Face folder, in the order in which they are looked for.
HUGGING_FACE_FILES = (
    "model.safetensors.index.json", "model.safetensors", "config.json", "pytorch_model.bin"
)  # fmt: skip


def problem_of_suffix(name: str) -> Problem | None:
    """Return the problem of a file whose name has the suffix of another format, or None."""
    _, dot, suffix = name.rpartition(".")
    kind = _SUFFIXES.get(f"{dot}{suffix}".lower())
    finding = f"The location names a {kind} file (.{suffix.lower()})."
    return None if kind is None else _other_format(finding, kind)


def problem_of_content(head: bytes) -> Problem | None:
    """Return the problem of a file whose first bytes are those of another format, or None."""
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    return None if kind is None else _other_format(f"The file has the {kind} format.", kind)


def _other_format(finding: str, kind: str) -> Problem:
    reason = "It can hold code, so the service never opens it." if kind in _PICKLES else "It is not read."
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
