"""Embedding backend on Ray Train: one `fit()` call for each phase; the driver signs the spec in between.

A phase runs on any number of workers on any number of nodes. It stores checkpoints in the run's folder (every
epoch of phase 1, every 50 steps of phase 2). After losing a worker, a node or the driver, it continues from
the last checkpoint, also with another number of workers. Keys travel to the workers as objects, never as
`train_loop_config`, because Ray's dashboard shows that.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
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
from mtlsign.errors import ArtifactError, ClusterError, MTLSignError
from mtlsign.models.input_spec import InputSpec
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.commitment import needs_response_bases
from mtlsign.watermark.embedding.pipeline import ProgressCallback
from mtlsign.watermark.embedding.result import EmbeddingResult, Phase2Result, Rows, Tensors
from mtlsign.watermark.embedding.run_folder import RAY, EmbeddingRun, load_state, state_bytes
from mtlsign.watermark.embedding.worker import State, sum_over_group
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.verification.reference import Reference

_STATE_FILE = "state.pt"
_CHECKPOINTS_KEPT = 2


def embed_on_ray(
    settings: EmbedSettings,
    *,
    on_progress: ProgressCallback | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> EmbeddingResult:
    """Run the embedding job on Ray: join or start a cluster and run both phases there.

    Args:
        settings: the settings of the job.
        on_progress: called on the driver with rows of progress.
        log: called with lines for the terminal.

    Returns:
        The marked model, the owner kit and the metrics.

    Raises:
        MTLSignError: an input is invalid, resources are missing, the storage is unreachable, or a phase
            failed more often than it may be restarted.
    """
    cluster.require_owner(settings.owner)
    cluster.check_local_cpus(settings)
    return pipeline.run_embedding_job(settings, RayEmbeddingBackend(on_progress), log=log)


class RayEmbeddingBackend:
    """Embedding backend that runs both phases with `TorchTrainer`."""

    def __init__(self, on_progress: ProgressCallback | None = None) -> None:
        self._on_progress = on_progress
        self._resources: dict[str, float] = {}

    def inspect_task(self, settings: EmbedSettings) -> InputSpec:
        """Connect, check the resources, and inspect the data on every node that could hold a worker."""
        cluster.connect()
        self._resources = cluster.worker_resources(settings)
        cluster.wait_for_resources(settings, self._resources)
        if cluster.is_single_machine():  # in a worker process, the imports alone take as long as the check
            return pipeline.inspect_task(settings)
        specs: list[InputSpec] = cluster.run_on_each_node(
            lambda: pipeline.inspect_task(settings), self._resources
        )
        return specs[0]

    def train_clean(
        self, settings: EmbedSettings, run: EmbeddingRun, architecture: Mapping[str, object]
    ) -> tuple[Tensors, Rows]:
        """Run phase 1; return W0 and the rows of its history.

        Args:
            settings: the settings of the job.
            run: the folder of the run, which receives the checkpoints.
            architecture: the architecture of the model.
        """
        public = _without_identity(settings)

        def phase(worker: RayWorkerContext) -> tuple[bytes, Rows] | None:
            tensors, rows = pipeline.run_phase1(public, architecture, worker)
            return (serialize_safetensors(tensors), rows) if worker.rank == 0 else None

        data, rows = self._fit("clean", phase, settings, run)
        return parse_safetensors(data), rows

    def response_bases(
        self, settings: EmbedSettings, base_weights: Tensors, architecture: Mapping[str, object]
    ) -> dict[str, torch.Tensor] | None:
        """Compute W0's response bases in a task on a node that holds the data.

        Args:
            settings: the settings of the job.
            base_weights: W0.
            architecture: the architecture of the model.
        """
        public = _without_identity(settings)
        if cluster.is_single_machine():
            return pipeline.run_response_bases(public, base_weights, architecture)
        if not needs_response_bases(settings):
            return None
        secret = ray.put(serialize_safetensors(base_weights))

        def compute() -> bytes:
            weights = parse_safetensors(ray.get(secret))
            return serialize_safetensors(pipeline.run_response_bases(public, weights, architecture) or {})

        return parse_safetensors(cluster.run_on_one_node(compute, self._resources))

    def embed_watermark(
        self,
        settings: EmbedSettings,
        run: EmbeddingRun,
        base_weights: Tensors,
        openings: Sequence[KeyOpening],
        reference: Reference,
    ) -> Phase2Result:
        """Run phase 2. The workers receive the opened keys; the identity remains on the driver.

        Args:
            settings: the settings of the job.
            run: the folder of the run, which receives the checkpoints.
            base_weights: W0.
            openings: the opened keys.
            reference: the values of W0 that the verifier needs.
        """
        public = _without_identity(settings)
        secret = ray.put((serialize_safetensors(base_weights), list(openings), reference.raw_bytes))

        def phase(worker: RayWorkerContext) -> tuple[Any, ...] | None:
            data, opened_keys, reference_bytes = ray.get(secret)
            result = pipeline.run_phase2(
                public, parse_safetensors(data), opened_keys, Reference.from_bytes(reference_bytes), worker
            )
            if worker.rank != 0:
                return None
            return serialize_safetensors(result.tensors), dataclasses.replace(result, tensors={})

        data, result = self._fit("mark", phase, settings, run)
        assert isinstance(result, Phase2Result)
        return dataclasses.replace(result, tensors=parse_safetensors(data))

    def _fit(
        self, name: str, phase: Callable[[RayWorkerContext], Any], settings: EmbedSettings, run: EmbeddingRun
    ) -> Any:
        """Run one phase on all workers; return the result of rank 0."""
        channel = ray.remote(num_cpus=0)(ProgressChannel).remote()
        threads = max(1, int(self._resources["CPU"]))
        finished = threading.Event()

        def train_loop() -> Any:
            torch.set_num_threads(threads)
            try:
                return phase(RayWorkerContext(channel))
            except MTLSignError as error:
                return error  # all ranks raise it alike, and Ray would restart a loop that raises

        trainer = TorchTrainer(
            train_loop,
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=settings.gpus_per_worker > 0,
                resources_per_worker=self._resources,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=run.folder.child(RAY).ray_path(),
                checkpoint_config=CheckpointConfig(num_to_keep=_CHECKPOINTS_KEPT),
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        forwarder = threading.Thread(
            target=forward_progress, args=(channel, self._on_progress, finished), daemon=True
        )
        forwarder.start()
        resumed = bool(run.folder.list(f"{RAY}/{name}"))
        try:
            result = cluster.run_in_thread(lambda: trainer.fit().return_value)  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise ClusterError(
                f"It failed after {settings.max_failures} restarts ({_cause(error)}). "
                f"Remove the cause, then continue with {settings.resume_flags(run.name)}.",
                field=f"phase {name!r}",
            ) from error
        except Exception as error:
            if not resumed or isinstance(error, MTLSignError):
                raise
            raise ArtifactError(
                f"Ray cannot continue from {run.folder.child(RAY).child(name).uri} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Restore that folder, or "
                "delete it: its phase is then repeated.",
                field="resume",
            ) from error
        finally:
            finished.set()
            forwarder.join(timeout=5)
        if isinstance(result, MTLSignError):
            raise result
        return result


def _without_identity(settings: EmbedSettings) -> EmbedSettings:
    """Return the settings without the paths of the identity, which workers must not read."""
    return settings.model_copy(update={"owner": None, "passphrase_file": None})


class RayWorkerContext:
    """Worker context of one Ray Train worker."""

    def __init__(self, channel: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device: torch.device = get_device()
        self._channel = channel

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Add the tensors of all workers, in place."""
        sum_over_group(tensors)

    def load_checkpoint(self) -> State | None:
        """Return the last state that Ray Train stored for this phase."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return load_state((Path(folder) / _STATE_FILE).read_bytes())

    def report(self, row: Mapping[str, Any], state: Callable[[], State] | None) -> None:
        """Report one row to Ray Train, a barrier over all ranks; rank 0 adds the checkpoint if given."""
        self.show_progress(row)
        if self.rank != 0 or state is None:
            ray.train.report(dict(row))
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _STATE_FILE).write_bytes(state_bytes(state()))
            ray.train.report(dict(row), checkpoint=Checkpoint.from_directory(folder))

    def show_progress(self, row: Mapping[str, Any]) -> None:
        """Send a row to the driver from rank 0, without waiting for its arrival."""
        if self.rank == 0:
            self._channel.put.remote(dict(row))


def _cause(error: TrainingFailedError) -> str:
    """Return the last line of the first worker's failure."""
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return (lines[-1] if lines else type(first).__name__)[:300]
