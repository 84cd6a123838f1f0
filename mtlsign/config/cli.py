"""Command-line helpers: settings of a job from its flags, the outcome of a job as an exit code.

Exit codes: 0, the job ran (its verdict is in the output); 2, invalid input or unreachable service, with one line on
stderr; 3, the job ran, but its own result does not reach the policy, with one line on stderr; 1, a defect of the
program, with its traceback; 130, interrupted.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from mtlsign.config.base import Settings
from mtlsign.config.sources import command_line
from mtlsign.errors import MTLSignError, RejectedResultError
from mtlsign.reports import console

S = TypeVar("S", bound=Settings)
#: Packages that `pip install mtlsign` leaves out; the extra `all` has them.
OPTIONAL_PACKAGES = {
    "boto3", "botocore", "fastapi", "matplotlib", "pyarrow", "python_multipart", "ray", "sklearn",
    "starlette", "tokenizers", "uvicorn",
}  # fmt: skip


def parse(kind: type[S], argv: Sequence[str], *, description: str = "", program: str | None = None) -> S:
    """Return settings from flags, environment, `--config FILE` and defaults, in this order of precedence.

    Args:
        kind: the settings class.
        argv: arguments of the command line.
        description: text above the list of settings in the help.
        program: name of the program in the help [that of this process].

    Raises:
        SettingsError: a name or value is invalid; the message names the nearest setting.
        SystemExit: the help was requested and printed.
    """
    program = program or os.path.basename(sys.argv[0])
    return kind.of(command_line(kind, argv, description=description, program=program))


@dataclass(frozen=True)
class Output:
    """Result of a job: a JSON document for `--json`, lines for a person otherwise.

    Attributes:
        document: JSON values.
        text: lines for a person.
        problem: sentence that states how the result misses the policy, with the fix; None if it does not.
    """

    document: Any
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Job(Generic[S]):
    """A function of settings as a command: it parses flags, prints the output and sets the exit code."""

    kind: type[S]
    function: Callable[[S], Output | None]
    name: str
    description: str
    positional: str | None
    variants: Mapping[str, Job[Any]]

    def __call__(self, argv: Sequence[str]) -> None:
        """Run the job with these arguments.

        Raises:
            MTLSignError: the input is invalid, a service cannot be reached, or the result misses the policy.
        """
        for name, variant in self.variants.items():
            if any(word.split("=")[0] == f"--{name}" for word in argv):
                variant(argv)
                return
        if self.positional is not None and argv and not argv[0].startswith("-"):
            argv = [f"--{self.positional}={argv[0]}", *argv[1:]]
        settings = parse(self.kind, argv, description=self.description, program=f"mtlsign {self.name}")
        output = self.function(settings)
        if output is None:
            return
        if settings.json_output:
            console.print_json(output.document)
        elif output.text:
            print(output.text)
        if output.problem is not None:
            raise RejectedResultError(output.problem)

    def run(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the job as the program of this process. Own tasks and models are imported from its folder."""
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        run(self, argv, resumes="resume" in self.kind.model_fields)


def job(
    kind: type[S],
    *,
    name: str | None = None,
    positional: str | None = None,
    variants: Mapping[str, Job[Any]] | None = None,
) -> Callable[[Callable[[S], Output | None]], Job[S]]:
    """Turn a function of settings into a command.

    Args:
        kind: the settings class; its fields are the flags.
        name: name of the command [that of the function].
        positional: setting that the first argument gives if it is not a flag.
        variants: commands that run instead when their flag is present.
    """

    def decorate(function: Callable[[S], Output | None]) -> Job[S]:
        command = name or function.__name__.replace("_", "-")
        return Job(
            kind, function, command, inspect.cleandoc(function.__doc__ or ""), positional, variants or {}
        )

    return decorate


def run(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, *, resumes: bool = False
) -> NoReturn:
    """Call `main(argv)` and exit with the code of its outcome.

    Args:
        main: the job.
        argv: its arguments [those of this process].
        resumes: whether the job has `--resume`, which the message of an interruption then names.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except MTLSignError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL_PACKAGES:
            raise
        print(f"error: {package} is not installed. Run pip install 'mtlsign[all]'.", file=sys.stderr)
        sys.exit(MTLSignError.exit_code)
    except KeyboardInterrupt:
        hint = "; continue with --resume NAME" if resumes else ""
        print(f"interrupted{hint}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)
