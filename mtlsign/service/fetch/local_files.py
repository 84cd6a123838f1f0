"""Opening of local files below an allowed folder without following links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from mtlsign.service.fetch.locations import LocalFile, location_refused
from mtlsign.service.problems import Problem


class MissingFile(Problem):
    """Problem of a location at which no file exists."""


@contextmanager
def open_below(location: LocalFile) -> Iterator[tuple[IO[bytes], int]]:
    """Open a regular file below the allowed folder; yield it and its size in bytes.

    Each path component is opened relative to the previous one with O_NOFOLLOW. A link is therefore never
    followed, even if an attacker creates it during the call.

    Raises:
        MissingFile: `unreachable`, the file does not exist.
        Problem: `pointer-refused`, the location is a link or not a file.
    """
    descriptor = -1
    try:
        descriptor = os.open(location.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(location.parts):
            last = i == len(location.parts) - 1
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_NONBLOCK if last else os.O_DIRECTORY)
            child = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = child
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise location_refused("The location is not a regular file. Name a file.")
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, FileNotFoundError):
            raise MissingFile("unreachable", "The file does not exist. Correct the location.") from None
        fix = "Name a regular file in regular folders."
        message = f"The location contains a link, or something that the service may not read. {fix}"
        raise location_refused(message) from None
    except Problem:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file, status.st_size
