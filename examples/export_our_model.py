"""Write a model that was marked here as a file of another program, and read its attacked model back.

    uv run examples/export_our_model.py MODEL best.pth --program wrt
    uv run examples/export_our_model.py best.pth attacked.safetensors --program wrt --back

MODEL is a public model: a folder of `jobs/embed.py` or a .safetensors file, whose tensors have the names of
the other program's network. The toolbox's `embed.py` loads the file as a pretrained model and writes a second
mark over the first; so does DICTION's code, as `path_model` of its configuration. The toolbox's `steal.py`
also needs a key of a scheme that it knows: pass one to `write_toolbox_file` in Python. With --back, the file
for `jobs/verify.py` is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mtlsign.models.checkpoints import read_checkpoint
from mtlsign.schemes.other_formats import (
    read_diction_tensors,
    read_toolbox_tensors,
    write_diction_file,
    write_toolbox_file,
)
from mtlsign.storage.safetensors_io import serialize_safetensors


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="public model; with --back a file of the program")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--program", choices=("wrt", "diction"), required=True)
    parser.add_argument("--back", action="store_true", help="read a file of the program")
    options = parser.parse_args(arguments)
    is_toolbox = options.program == "wrt"
    if options.back:
        read = read_toolbox_tensors if is_toolbox else read_diction_tensors
        options.target.write_bytes(serialize_safetensors(read(options.source)))
    else:
        write = write_toolbox_file if is_toolbox else write_diction_file
        write(options.target, read_checkpoint(options.source).tensors)
    print(f"wrote {options.target}")


if __name__ == "__main__":
    main()
