"""Starts the jobs as a user would, with a Ray, an owner and a home of their own; leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
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

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

#: A small run that still uses every snapshot kind; two workers unless the test says otherwise.
SMALL = shlex.split(
    "--task digits --width 16 --key-size 256 --epochs 6 --batch 64 --primary-batch 64 --steps 150 "
    "--wm-lr 0.01 --noise 0.1 --lambda1 0.02 --lambda2 0.5 --distillation 2 --snapshots noise,pruned,tuned "
    "--deep-lr 0.3 --seed 0 --cpus-per-worker 1 --insecure-test-key"
)


def environment(home: Path, ray: Path, **more: str) -> dict[str, str]:
    """A process environment that knows no Ray, no account and no identity but its own."""
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


def _heed_ctrl_c() -> None:
    """A shell's background job ignores SIGINT and hands that down, to a test run and what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Job:
    """One started process; `out` and `err` are its files so far."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout, self.stderr = folder / "out", folder / "err"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=dict(env), stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True, preexec_fn=_heed_ctrl_c,
            )  # fmt: skip
        self._family: dict[int, str] = {}

    @property
    def out(self) -> str:
        return self.stdout.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.stderr.read_text(errors="replace")

    def wait(self, code: int | None = 0, timeout: float = 800) -> str:
        """Wait for its end, check the exit code, return standard output."""
        try:
            found = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout:.0f} s\n{self.out[-2000:]}\n{self.err[-4000:]}"
            ) from None
        assert code is None or found == code, f"exit code {found}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self.out

    def until(self, found: Callable[[], T], timeout: float = 800) -> T:
        """Poll until `found()` is true while the process lives; its value."""
        end = time.monotonic() + timeout
        while not (value := found()):
            assert self.process.poll() is None, f"ended early\n{self.out[-2000:]}\n{self.err[-4000:]}"
            assert time.monotonic() < end, f"waited {timeout:.0f} s\n{self.err[-4000:]}"
            time.sleep(0.05)
        return value

    def workers(self) -> list[int]:
        """Process ids of its Ray Train workers."""
        return sorted(pid for pid, name in self.family().items() if "RayTrainWorker" in name)

    def family(self) -> dict[int, str]:
        """It and its descendants: process id → command line; those seen earlier too, if they live."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = entry.read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        todo, found = [self.process.pid, *self._family], dict.fromkeys(self._family, "")
        while todo:
            pid = todo.pop()
            found[pid] = ""
            todo += [child for child in parents.get(pid, ()) if child not in found]
        alive = {pid for children in parents.values() for pid in children}
        self._family = {pid: _command(pid) for pid in found if pid in alive}
        return self._family

    def kill(self) -> None:
        """SIGKILL to the driver alone; returns when nothing that could still train or write is left."""
        self.family()
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 120
        while (left := [c for c in self.family().values() if not _idle(c)]) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left, "outlived the driver: " + ", ".join(left)

    def end(self) -> None:
        """End whatever of it still runs, by process id."""
        self.family()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(15)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _idle(command: str) -> bool:
    """Ray's helpers without a task, which may notice late that their raylet is gone."""
    return not command or "Agent" in command or "dashboard" in command or command.startswith("ray-dashboard")


class Jobs:
    """Makes jobs that share one owner (a file with a passphrase) and ends them all.

    Ray's files go to `ray`, a short path: its sockets' names are limited to about 107 bytes.
    """

    def __init__(self, folder: Path, ray: Path) -> None:
        self.folder, self.ray, self.home = folder, ray, folder / "home"
        self.home.mkdir(parents=True)
        self.owner, self.passphrase_file, self.passphrase = (
            folder / "owner.json",
            folder / "pass",
            b"a phrase to look for",
        )
        self.passphrase_file.write_bytes(self.passphrase + b"\n")
        self.identity = Identity.generate()
        self.identity.save(self.owner, self.passphrase)
        self._made: list[Job] = []

    @property
    def as_owner(self) -> tuple[str, ...]:
        return "--owner", str(self.owner), "--passphrase-file", str(self.passphrase_file)

    def python(self, *command: str, **env: str) -> Job:
        """Start a Python program."""
        job = Job(command, environment(self.home, self.ray, **env), self.folder / f"job{len(self._made)}")
        self._made.append(job)
        return job

    def embed(self, *flags: str, storage: str | Path, workers: int = 2, **env: str) -> Job:
        """Start jobs/embed.py on the small task; flags given later win."""
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
        """A node in the foreground; ending the process ends exactly that node."""
        always = "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"
        node = self.cli(*always, *arguments, **env)
        node.until(lambda: "--block" in node.out and any("raylet" in c for c in node.family().values()))
        return node

    def head(self, **env: str) -> tuple[Job, str, str]:
        """A head node with two CPUs: (process, GCS address, dashboard URL)."""
        gcs, dashboard = free_port(), free_port() + 1
        node = self.node(
            "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2",
            f"--dashboard-port={dashboard}", **env,
        )  # fmt: skip
        return node, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"

    def end(self) -> None:
        for job in reversed(self._made):
            job.end()


@dataclass(frozen=True)
class Finished:
    """An uninterrupted run over two workers: what every other run is compared with."""

    job: Job
    storage: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with tempfile.TemporaryDirectory(prefix="mtlsign-", ignore_cleanup_errors=True) as ray:
        made = Jobs(tmp_path_factory.mktemp("jobs"), Path(ray))
        try:
            yield made
        finally:
            made.end()


@pytest.fixture(scope="session")
def baseline(jobs: Jobs) -> Finished:
    storage = jobs.folder / "baseline"
    job = jobs.embed("--run", "base", storage=storage)
    job.wait()
    return Finished(job, storage, result_of(storage, "base"))


def free_port() -> int:
    """Away from 10002-19999, which Ray gives to its workers."""
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no free port")


def result_of(storage: Path, run: str) -> dict[str, Any]:
    """A finished run's result.json."""
    found: dict[str, Any] = json.loads((storage / "runs" / run / "result.json").read_text())
    return found


def checkpoints(storage: Path, run: str, phase: str) -> list[Path]:
    """What Ray Train stored of a phase that is under way."""
    return sorted((storage / "runs" / run / "ray" / phase).glob("checkpoint_*"))
