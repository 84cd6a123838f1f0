"""The folder of an attack run, and the run itself: settings in, `attacks.csv` and a report out.

`runs/<name>/` is SECRET (it tells what breaks a mark). While the run goes on it holds `settings.json`,
`rows/<id>.json` for every finished attack and a growing `attacks.csv`; at the end `attacks.csv`,
`attacks.parquet`, `result.json`, `report.html` and the manifest. Attacked models lie in its
`models/<digest>/`, in the layout of public models: they are nobody's to publish, so they stay out of the
storage's own `models/`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtlsign.config.attack import CHANGEABLE, AttackSettings
from mtlsign.config.base import dump
from mtlsign.errors import ArtifactError, ModelError, SettingsError
from mtlsign.experiments.attack_runs.executor import AttackBackend, plans_with_baseline, run_all
from mtlsign.experiments.attack_runs.results import COLUMNS, MAX_POINTS_LOST, Row, summary_counts
from mtlsign.experiments.attack_runs.target import AttackTarget, load_target
from mtlsign.reports.tables import csv_of
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, write_manifest_folder
from mtlsign.storage.model_folder import MODELS, RUNS, write_model
from mtlsign.storage.safetensors_io import parse_safetensors

SETTINGS, ROWS, CSV = "settings.json", "rows", "attacks.csv"
_LIMIT = 2**20

Say = Callable[[str], None]
Show = Callable[[Row, int, int], None]


def run(
    settings: AttackSettings, backend: AttackBackend, *, show: Show = lambda *_: None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Attack a model and write the run; returns `result.json`.

    Args:
        s: the settings.
        backend: where attacks run.
        show: called with each finished row, its number and their count.
        say: called with lines for a person.

    Raises:
        MTLSignError: bad input; then nothing has been written.
    """
    kept, settings = AttackRun.open(settings)
    orders = plans_with_baseline(settings.attacks)
    target = load_target(settings)
    model = target.model()
    backend.preflight(target)
    del model
    kept.begin(settings)
    say(f"run {kept.name}: {len(orders)} rows; if it is interrupted: --resume {kept.name}")
    have = kept.rows()
    if have:
        say(f"{len(have)} of them are done already")
    rows: list[Row] = list(have)

    def keep(row: Row, data: bytes | None) -> Row:
        row = kept.keep(row, data if settings.keep_models else None, target)
        rows.append(row)
        kept.write_table(rows)
        show(row, len(rows), len(orders))
        return row

    done = run_all(target, orders, settings.seed, backend, have=have, keep=keep)
    return kept.finish(_result(settings, target, done), done)


def _result(settings: AttackSettings, target: AttackTarget, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "model": settings.model, "kit": settings.kit, "task": target.task, "graph": dict(target.graph), "seed": settings.seed,
        "split_seed": target.split_seed, "budget": target.extra, "lr": target.lr, "bits_required": settings.bits,
        "max_points_lost": MAX_POINTS_LOST,
        **summary_counts(rows), "rows": list(rows),
    }  # fmt: skip


class AttackRun:
    """One run's folder, new or resumed.

    Raises (from `open` and `begin`): SettingsError when the name is taken or unknown, or `--resume` changes
    what is attacked; StorageError when the place cannot be written.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.folder = storage.child(RUNS).child(name)

    @classmethod
    def open(cls, settings: AttackSettings) -> tuple[AttackRun, AttackSettings]:
        """Find the run that the settings ask for; nothing is kept there before `begin`."""
        storage = open_storage(settings.storage, endpoint=settings.endpoint)
        if settings.resume is not None:
            found = cls(storage, settings.resume)
            return found, found._resumed(settings)
        storage.check_writable()  # leaves nothing behind
        unique = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        made = cls(storage, settings.run or unique)
        if made.folder.exists(SETTINGS):
            raise made._taken()
        return made, settings

    def begin(self, settings: AttackSettings) -> None:
        """Take the name by keeping the settings there, unless resumed. Raises `SettingsError` if taken."""
        if settings.resume is None and not self.folder.write(SETTINGS, dump(settings), if_absent=True):
            raise self._taken()

    def _taken(self) -> SettingsError:
        return SettingsError(
            f"{self.name!r} exists; choose another name, or go on with --resume {self.name}", field="run"
        )

    def _resumed(self, settings: AttackSettings) -> AttackSettings:
        if not self.folder.exists(SETTINGS):
            raise SettingsError(
                f"no run {self.name!r} in {self.storage.uri}; check --storage and the name", field="resume"
            )
        if self.folder.exists(MANIFEST):
            raise SettingsError(
                f"run {self.name!r} is finished; its result lies in {self.folder.uri}", field="resume"
            )
        try:
            kept = AttackSettings.of(json.loads(self.folder.read(SETTINGS, _LIMIT)))
        except (ValueError, TypeError, SettingsError):
            raise ArtifactError(
                f"{SETTINGS} of run {self.name!r} is no attack run's; give the name of one", field="resume"
            ) from None
        for field in sorted(settings.model_fields_set - CHANGEABLE):
            if getattr(settings, field) != getattr(kept, field):
                raise SettingsError(
                    f"is {getattr(kept, field)} in run {self.name!r}; leave it out, or start a new run",
                    field=field.replace("_", "-"),
                )
        return kept.model_copy(
            update={f: getattr(settings, f) for f in settings.model_fields_set & CHANGEABLE}
        )

    def rows(self) -> list[Row]:
        """The rows of attacks that are finished; failed ones are tried again."""
        found = []
        for name in self.folder.list(ROWS):
            try:
                row = json.loads(self.folder.read(name, _LIMIT))
                if row["status"] != "failed":
                    found.append({column: row.get(column) for column in COLUMNS})
            except (ValueError, TypeError, KeyError):
                raise ArtifactError(
                    f"{name} of run {self.name!r} is damaged; delete it and its attack runs again",
                    field="resume",
                ) from None
        return found

    def keep(self, row: Row, data: bytes | None, target: AttackTarget) -> Row:
        """Keep one finished row, with its attacked model's bytes if given."""
        if data is not None:
            try:
                row = row | {"model": self._keep_model(row, data, target)}
            except ModelError as error:  # only a dtype that safetensors lacks
                row = row | {"reason": str(error)}
        identity = hashlib.sha256(json.dumps([row["attack"], row["setting"], row["seed"]]).encode())
        self.folder.write(f"{ROWS}/{identity.hexdigest()[:16]}.json", json.dumps(row).encode())
        return row

    def _keep_model(self, row: Row, data: bytes, target: AttackTarget) -> str:
        what = f"{row['attack']} {row['setting']}".strip()
        config = {
            "format": "mtlsign/model/v0", "graph": dict(target.graph), "task": target.task,
            "name": "attacked", "attack": what, "inputs": row["inputs"] or "",
        }  # fmt: skip
        card = f"# An attacked model\n\n`{what}`, seed {row['seed']}: a test of a mark, not a model to use.\n"
        try:
            digest = write_model(self.folder, parse_safetensors(data), config, card)
        except ArtifactError:  # two attacks gave the very same weights: the first one's folder stands
            digest = row["model_digest"]
        return self.folder.child(MODELS).child(digest).uri

    def write_table(self, rows: Sequence[Row]) -> None:
        """`attacks.csv` of the rows so far."""
        self.folder.write(CSV, csv_of(rows, COLUMNS))

    def finish(self, result: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
        """Write what remains, the manifest last; returns `result` with its places."""
        # Loaded here: matplotlib takes a second, and on a new machine says that it builds its font cache.
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        from mtlsign.reports.attacks import render_attack_report

        names = {"csv": CSV, "parquet": "attacks.parquet", "report": "report.html", "result": "result.json"}
        places = {key: self.folder.child(name).uri for key, name in names.items()}
        whole = {"run": self.name, **result, **places}
        files = {
            CSV: csv_of(rows, COLUMNS),
            names["parquet"]: parquet_bytes(rows),
            names["report"]: render_attack_report(whole).encode(),
            names["result"]: json.dumps(whole, indent=1, allow_nan=False).encode(),
        }
        write_manifest_folder(self.folder, files)
        self.folder.delete(ROWS)
        return whole


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """The same rows as one Parquet file whose types do not depend on the rows: `removed` may be empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        **dict.fromkeys(COLUMNS, pa.string()),
        **dict.fromkeys(("seed", "matches", "n", "steps", "images"), pa.int64()),
        **dict.fromkeys(
            ("wm_accuracy", "evidence_bits", "primary_before", "primary_after", "points_lost", "seconds"),
            pa.float64(),
        ),
        **dict.fromkeys(("accepted", "removed"), pa.bool_()),
    }
    schema = pa.schema([(column, kinds[column]) for column in COLUMNS])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()
