"""Launcher of jobs as separate processes, as a user starts them, with separate Ray, owner and home folder.

Every process is ended with the test session.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mtlsign.watermark.keys.identity import Identity
from tests.helpers.job_session import JobSession

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

#: Flags of a small run that uses several kinds of perturbation.
SMALL = shlex.split(
    "--task digits --width 8 --key-size 256 --phase1.epochs 4 --phase1.batch 64 --phase2.batch 64 "
    "--phase2.steps 150 --phase2.lr 0.002 --phase2.margin 2 --lambda2 0.5 "
    "--perturbation.kinds noise,pruned,fine_tuned --perturbation.inner-steps 2 "
    "--perturbation.noise-sigma 0.1 --seed 0 --cpus-per-worker 1 --insecure-test-key"
)


def environment(home: Path, ray: Path, **more: str) -> dict[str, str]:
    """Return environment variables without the user's Ray, accounts and identity."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MTLSIGN_", "COV"))}
    return plain | {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "RAY_TMPDIR": str(ray),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def _enable_sigint() -> None:
    """Restore the default handler, because children of a shell's background job ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Job:
    """One started process; `out` and `err` are its output until now."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], folder: Path, stdin: int = subprocess.DEVNULL
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = folder / "out", folder / "err"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=dict(env), stdin=stdin, stdout=out,
                stderr=err, start_new_session=True, preexec_fn=_enable_sigint,
            )  # fmt: skip
        self._known: dict[int, str] = {}

    @property
    def out(self) -> str:
        return self.stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.read_text(errors="replace")

    def wait(self, code: int | None = 0, timeout: float = 800) -> str:
        """Wait for the end, check the exit code, and return standard output."""
        try:
            exit_code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout:.0f} s\n{self.out[-2000:]}\n{self.err[-4000:]}"
            ) from None
        assert code is None or exit_code == code, (
            f"exit code {exit_code}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        )
        return self.out

    def until(self, condition: Callable[[], T], timeout: float = 800) -> T:
        """Poll until `condition()` is true while the process runs; return its value."""
        end = time.monotonic() + timeout
        while not (value := condition()):
            assert self.process.poll() is None, f"ended early\n{self.out[-2000:]}\n{self.err[-4000:]}"
            assert time.monotonic() < end, f"waited {timeout:.0f} s\n{self.err[-4000:]}"
            time.sleep(0.05)
        return value

    def workers(self) -> list[int]:
        """Return the process ids of its Ray Train workers."""
        return sorted(pid for pid, name in self.process_tree().items() if "RayTrainWorker" in name)

    def process_tree(self) -> dict[int, str]:
        """Return process id -> command line of it and its descendants, orphaned ones included."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = entry.read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        pending, tree = [self.process.pid, *self._known], dict.fromkeys(self._known, "")
        while pending:
            pid = pending.pop()
            tree[pid] = ""
            pending += [child for child in parents.get(pid, ()) if child not in tree]
        alive = {pid for children in parents.values() for pid in children}
        self._known = {pid: _command(pid) for pid in tree if pid in alive}
        return self._known

    def kill(self) -> None:
        """Send SIGKILL to the driver alone; wait for the end of all processes that could train or write."""
        self.process_tree()
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 120
        while (
            survivors := [c for c in self.process_tree().values() if not _idle(c)]
        ) and time.monotonic() < end:
            time.sleep(0.2)
        assert not survivors, "still running: " + ", ".join(survivors)

    def end(self) -> None:
        """End it and its descendants by process id."""
        self.process_tree()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        for pid in self.process_tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(15)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _idle(command: str) -> bool:
    """Return True for helpers of Ray without a task, which may end some time after their raylet."""
    return not command or "Agent" in command or "dashboard" in command or command.startswith("ray-dashboard")


class JobLauncher:
    """Starts jobs that share one owner (a file with a passphrase) and ends them all.

    Ray writes to `ray`, a short path, because names of its sockets are limited to about 107 bytes.
    """

    def __init__(self, folder: Path, ray: Path) -> None:
        self.folder, self.ray, self.home = folder, ray, folder / "home"
        self.home.mkdir(parents=True)
        self.owner, self.passphrase_file, self.passphrase = (
            folder / "owner.json",
            folder / "pass",
            b"a phrase to look for",
        )
        self.passphrase_file.touch(mode=0o600)
        self.passphrase_file.write_bytes(self.passphrase + b"\n")
        self.identity = Identity.generate()
        self.identity.save(self.owner, self.passphrase)
        self._jobs: list[Job] = []

    @property
    def as_owner(self) -> tuple[str, ...]:
        return "--owner", str(self.owner), "--passphrase-file", str(self.passphrase_file)

    def python(self, *command: str, **env: str) -> Job:
        """Start a Python program."""
        job = Job(command, environment(self.home, self.ray, **env), self.folder / f"job{len(self._jobs)}")
        self._jobs.append(job)
        return job

    @contextlib.contextmanager
    def session(self, **env: str) -> Iterator[JobSession]:
        """Run a process for several jobs until the context ends."""
        command, folder = ("-m", "tests.helpers.job_session"), self.folder / f"job{len(self._jobs)}"
        process = Job(command, environment(self.home, self.ray, **env), folder, subprocess.PIPE)
        self._jobs.append(process)
        session = JobSession(process)
        try:
            yield session
        finally:
            session.end()

    def embed(self, *flags: str, storage: str | Path, workers: int = 2, **env: str) -> Job:
        """Start jobs/embed.py on the small task; later flags override earlier ones."""
        always = *SMALL, *self.as_owner, "--workers", str(workers), "--storage", str(storage)
        return self.python("jobs/embed.py", *always, *flags, **env)

    def resume(self, run: str, *flags: str, storage: str | Path, **env: str) -> Job:
        """Start jobs/embed.py --resume."""
        always = *self.as_owner, "--storage", str(storage)
        return self.python("jobs/embed.py", "--resume", run, *always, *flags, **env)

    def cli(self, *arguments: str, **env: str) -> Job:
        """Start Ray's own command line."""
        return self.python("-m", "ray.scripts.scripts", *arguments, **env)

    def node(self, *arguments: str, **env: str) -> Job:
        """Start a node in the foreground; ending the process ends exactly that node."""
        always = "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"
        node = self.cli(*always, *arguments, **env)
        node.until(lambda: "--block" in node.out and any("raylet" in c for c in node.process_tree().values()))
        return node

    def head(self, **env: str) -> tuple[Job, str, str]:
        """Start a head node with two CPUs: (process, GCS address, dashboard URL)."""
        gcs, dashboard = free_port(), free_port() + 1
        node = self.node(
            "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2",
            f"--dashboard-port={dashboard}", **env,
        )  # fmt: skip
        return node, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"

    def end(self) -> None:
        for job in reversed(self._jobs):
            job.end()


@dataclass(frozen=True)
class FinishedRun:
    """An uninterrupted run on two workers, with which other runs are compared."""

    job: Job
    storage: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobLauncher]:
    with tempfile.TemporaryDirectory(prefix="mtlsign-", ignore_cleanup_errors=True) as ray:
        launcher = JobLauncher(tmp_path_factory.mktemp("jobs"), Path(ray))
        try:
            yield launcher
        finally:
            launcher.end()


@pytest.fixture(scope="session")
def baseline_run(jobs: JobLauncher) -> FinishedRun:
    storage = jobs.folder / "baseline"
    job = jobs.embed("--run", "base", storage=storage)
    job.wait()
    return FinishedRun(job, storage, result_of(storage, "base"))


def exit_code_of(name: str, *argv: str) -> int:
    """Call a job in this process, which has imported torch already; return its exit code."""
    from mtlsign.config import cli

    main = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"]
    with pytest.raises(SystemExit) as ended:
        cli.run(main, argv)
    return int(str(ended.value.code))


def free_port() -> int:
    """Return a free port outside 10002-19999, which Ray gives to its workers."""
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no free port")


def result_of(storage: Path, run: str) -> dict[str, Any]:
    """Return the result.json of a finished run."""
    result: dict[str, Any] = json.loads((storage / "runs" / run / "result.json").read_text())
    return result


def checkpoints(storage: Path, run: str, phase: str) -> list[Path]:
    """Return the checkpoints that Ray Train stored of a running phase."""
    return sorted((storage / "runs" / run / "ray" / phase).glob("checkpoint_*"))
