"""Embedding over Ray Train: the two phases are two `fit()` calls, and between them the driver signs the spec.

A phase runs on any number of workers on any number of nodes. It checkpoints to the run's storage (every
epoch of phase 1, every 50 steps of phase 2) and goes on from there after a lost worker, node or driver, also
on another number of workers. Keys travel to the workers as objects, never as `train_loop_config`, which Ray's
dashboard shows.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtlsign.distributed import cluster
from mtlsign.distributed.progress_channel import ProgressChannel, forward_progress

# ruff: isort: split
import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ClusterError, MTLSignError
from mtlsign.models.loading import InputSpec
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.pipeline import ProgressCallback
from mtlsign.watermark.embedding.result import EmbeddingResult, Phase2Result, Rows, Tensors
from mtlsign.watermark.embedding.run_folder import EmbeddingRun, load_state, state_bytes
from mtlsign.watermark.embedding.worker import State, sum_over_group
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.reference import Reference

_STATE = "state.pt"


def embed_on_ray(
    settings: EmbedSettings,
    *,
    show: ProgressCallback | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> EmbeddingResult:
    """The main job on Ray: join or start a cluster, run `embedding.run` there.

    Args:
        s: the settings.
        show: called on the driver with rows of progress.
        say: called with lines for a person.

    Raises:
        MTLSignError: bad input, no room, unreachable storage, or a phase that failed past its retries.
    """
    cluster.require_owner(settings.owner)
    cluster.check_local_cpus(settings)
    return pipeline.run_embedding_job(settings, RayEmbeddingBackend(show), say=say)


class RayEmbeddingBackend:
    """Both phases through `TorchTrainer`."""

    def __init__(self, show: ProgressCallback | None = None) -> None:
        self._show = show
        self._each: dict[str, float] = {}

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Connect, check that there is room, and look at the data on every node that may hold a worker."""
        cluster.connect()
        self._each = cluster.resources(settings)
        cluster.wait_for_resources(settings, self._each)
        if cluster.is_single_machine():  # in a worker's process the imports alone take as long as the check
            return pipeline.inspect_task(settings)
        shapes: list[InputSpec] = cluster.run_on_each_node(
            lambda: pipeline.inspect_task(settings), self._each
        )
        return shapes[0]

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, graph: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Phase 1."""
        quiet = settings.model_copy(update={"owner": None, "passphrase_file": None})

        def phase(worker: RayWorkerContext) -> Any:
            tensors, rows = pipeline.run_phase1(quiet, graph, worker)
            return (serialize_safetensors(tensors), rows) if worker.rank == 0 else None

        data, rows = self._fit("clean", phase, settings, run)
        return parse_safetensors(data), rows

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        opening: KeyOpening,
        reference: Reference,
    ) -> Phase2Result:
        """Phase 2. The workers get the opened key; the identity stays on the driver."""
        quiet = settings.model_copy(update={"owner": None, "passphrase_file": None})
        secret = ray.put((serialize_safetensors(base_weights), opening, reference.data))

        def phase(worker: RayWorkerContext) -> Any:
            data, opened, kept = ray.get(secret)
            marked = pipeline.run_phase2(
                quiet, parse_safetensors(data), opened, Reference.from_bytes(kept), worker
            )
            return (
                (serialize_safetensors(marked.tensors), marked.head, marked.rows, marked.measured)
                if worker.rank == 0
                else None
            )

        data, head, rows, measured = self._fit("mark", phase, settings, run)
        return Phase2Result(parse_safetensors(data), head, rows, measured)

    def _fit(
        self, name: str, phase: Callable[[RayWorkerContext], Any], settings: EmbedSettings, run: EmbeddingRun
    ) -> Any:
        board = ray.remote(num_cpus=0)(ProgressChannel).remote()
        threads = max(1, int(self._each["CPU"]))
        finished = threading.Event()

        def loop() -> Any:
            torch.set_num_threads(threads)
            try:
                return phase(RayWorkerContext(board))
            except MTLSignError as error:
                return error  # every rank meets it alike, and trying again would not help

        trainer = TorchTrainer(
            loop,
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=self._each,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=run.folder.child("ray").ray_path(),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        watcher = threading.Thread(target=forward_progress, args=(board, self._show, finished), daemon=True)
        watcher.start()
        try:
            result = cluster.run_in_thread(lambda: trainer.fit().return_value)  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise ClusterError(
                f"failed past its {settings.max_failures} retries ({_cause(error)}); "
                f"mend that, then --resume {run.name}",
                field=f"phase {name!r}",
            ) from error
        finally:
            finished.set()
            watcher.join(timeout=5)
        if isinstance(result, MTLSignError):
            raise result
        return result


class RayWorkerContext:
    """One Ray Train worker as a `progress.Rank`."""

    def __init__(self, board: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self._board = board

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """All-reduce over the workers."""
        sum_over_group(tensors)

    def load_checkpoint(self) -> State | None:
        """The last checkpoint that Ray Train stored for this phase."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return load_state((Path(folder) / _STATE).read_bytes())

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Report to Ray Train (a barrier over all ranks); rank 0 hands in the checkpoint."""
        self.show_progress(row)
        if self.rank != 0 or state is None:
            ray.train.report(dict(row))
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _STATE).write_bytes(state_bytes(state()))
            ray.train.report(dict(row), checkpoint=Checkpoint.from_directory(folder))

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Rank 0 tells the driver; nobody waits for it."""
        if self.rank == 0:
            self._board.post.remote(dict(row))


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return (lines[-1] if lines else type(first).__name__)[:300]
