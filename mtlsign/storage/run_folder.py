"""Run folders: one folder `runs/<name>/` for each run of a job, new or resumed. SECRET.

A run reserves its name by writing `settings.json`, stores its state while it works, and ends with the
manifest that commits the folder. An interrupted run can be resumed. Its settings are then the stored ones,
except for those that do not affect the results.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Generic, Self, TypeVar

from mtlsign.config.base import dump
from mtlsign.config.mixins import RunStorage
from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import read_json_object
from mtlsign.storage.locations import open_storage
from mtlsign.storage.manifest import MANIFEST, write_manifest_folder
from mtlsign.storage.model_folder import RUNS

SETTINGS_FILE = "settings.json"
_SETTINGS_LIMIT = 2**20

S = TypeVar("S", bound=RunStorage)


class RunFolder(ABC, Generic[S]):
    """Folder of one run of a job. A subclass adds the state that its job stores.

    Attributes:
        storage: the storage that holds the run and its artifacts.
        name: the name of the run.
        folder: the folder of the run.
    """

    settings_class: ClassVar[type[RunStorage]]
    """Class of the settings in `settings.json`."""

    kind: ClassVar[str]
    """Noun phrase for error messages: "an attack run"."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.folder = storage.child(RUNS, private=True).child(name)

    @classmethod
    def open(cls, settings: S) -> tuple[Self, S]:
        """Return the run that the settings name, and its settings. Nothing is written before `reserve_name`.

        A resumed run has the stored settings. If the run to resume is finished, the leftovers of a crash
        between its manifest and their deletion are deleted.

        Raises:
            SettingsError: the name is taken, the run to resume is unknown or finished, or a changed setting
                affects the results.
            ArtifactError: the stored settings are damaged or belong to another kind of run.
            StorageError: the storage cannot be written.
        """
        storage = open_storage(settings.storage, endpoint=settings.endpoint)
        if settings.resume is not None:
            run = cls(storage, settings.resume)
            return run, run._merge_resumed_settings(settings)
        storage.check_writable()  # leaves no file
        run = cls(storage, settings.run or _unique_name())
        if run.folder.exists(SETTINGS_FILE):
            raise run._name_taken_error()
        return run, cls.complete(settings)

    @classmethod
    def complete(cls, settings: S) -> S:
        """Return the settings of a new run as they are stored, with all defaults filled in."""
        return settings

    def reserve_name(self, settings: S) -> None:
        """Write the settings file (no-op for a resumed run). Raises `SettingsError` if the name is taken."""
        if settings.resume is None and not self.folder.write(SETTINGS_FILE, dump(settings), if_absent=True):
            raise self._name_taken_error()

    def location(self, name: str) -> str:
        """Return the location of the file `name` of this run."""
        return self.folder.child(name).uri

    def commit(self, files: Mapping[str, bytes], settings: S) -> None:
        """Write the results and the manifest, then delete the leftovers unless the settings keep them."""
        write_manifest_folder(self.folder, files)
        if not self.keeps_leftovers(settings):
            self.delete_leftovers()

    def keeps_leftovers(self, settings: S) -> bool:
        """Return True if the settings ask to keep the state of a finished run."""
        return False

    @abstractmethod
    def delete_leftovers(self) -> None:
        """Delete the state that only an unfinished run needs."""

    def _name_taken_error(self) -> SettingsError:
        return SettingsError(
            f"Run {self.name!r} exists. Choose another name, or continue it with --resume {self.name}.",
            field="run",
        )

    def _merge_resumed_settings(self, settings: S) -> S:
        if not self.folder.exists(SETTINGS_FILE):
            raise SettingsError(
                f"There is no run {self.name!r} in {self.storage.uri}. Check --storage and the name.",
                field="resume",
            )
        if self.folder.exists(MANIFEST):
            self._delete_leftovers_of_finished_run()
            raise SettingsError(
                f"Run {self.name!r} is finished. Its result is in {self.folder.uri}.", field="resume"
            )
        resumed = self._stored_settings().resumed_with(settings, self.name)
        self.check_resumable()
        return resumed

    def check_resumable(self) -> None:
        """Raise `ArtifactError` if files are missing without which the run would give another result."""

    def _delete_leftovers_of_finished_run(self) -> None:
        try:
            stored = self._stored_settings()
        except ArtifactError:
            return  # damaged, or of another kind of run: its files are not known here
        if not self.keeps_leftovers(stored):
            self.delete_leftovers()

    def _stored_settings(self) -> S:
        try:
            stored = read_json_object(self.folder.read(SETTINGS_FILE, _SETTINGS_LIMIT), SETTINGS_FILE)
            return self.settings_class.of(stored)  # type: ignore[return-value]  # settings_class is S's class
        except (SettingsError, ArtifactError):
            raise ArtifactError(
                f"{SETTINGS_FILE} of run {self.name!r} is damaged or not that of {self.kind}. "
                f"Pass the name of {self.kind}, or start a new run.",
                field="resume",
            ) from None


def _unique_name() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
