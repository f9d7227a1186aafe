"""`--stream` with `--push-to`: finished weights go up while the run goes on, and stay on the Hub only; the commit is last."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corda_convert import hub
from corda_convert.checkpoint.folder import RECEIPT_FILE
from corda_convert.engine import FileRecord, Watch
from corda_convert.errors import PublishFailed, RunStopped
from corda_convert.operations.push import commit_description, commit_message
from corda_convert.operations.resuming import Before
from corda_convert.output.licence import CARD_FILE
from corda_convert.output.staging import journal_folder
from corda_convert.plan.division import outputs
from corda_convert.plan.model import Plan

_NOTES_FILE = "uploaded.json"


def streamed_up(plan: Plan) -> list[str]:
    """The files that go up while the run goes on: a model's shards. An adapter, also the initial one, stays here, too."""
    return [file.name for file in plan.files if "/" not in file.name and not file.name.startswith("adapter_model")]


def room_for_output(plan: Plan) -> int:
    """The bytes of weights that are on the disk at most: those that stay, and of the others some that wait, and two in work."""
    going = set(streamed_up(plan))
    waiting = sorted((file.nbytes for file in plan.files if file.name in going), reverse=True)[: hub.MOST_FILES + 2]
    return sum(file.nbytes for file in plan.files if file.name not in going) + sum(waiting)


class Uploading:
    """The upload of one run, with what an earlier one has sent.

    Attributes:
        before: files that the Hub keeps and that are not here any more.
    """

    def __init__(self, destination: hub.Destination, plan: Plan, folder: Path, side_files: Sequence[str]) -> None:
        """Makes the repository and the branch where there are none. Raises `PublishFailed`."""
        self._destination = destination
        self._plan = plan
        self._folder = folder
        self._notes = journal_folder(folder) / _NOTES_FILE
        self._sent: dict[str, hub.PublishedFile] = {}
        names = [*(file.name for file in plan.files), *side_files, CARD_FILE, RECEIPT_FILE]
        with hub.connected(f"Publishing to {destination} failed.") as client:
            upload = hub.Upload(client, destination, names)
            self._sent = {file.name: file for file in upload.adopt(self._noted())}
        self._upload = hub.StreamedUpload(upload, self._note)
        self.before: Mapping[str, FileRecord] = {
            file.name: FileRecord(file.name, file.nbytes, file.sha256) for file in self._sent.values()
        }

    @contextlib.contextmanager
    def running(self, before: Before, other: Watch | None) -> Iterator[Watch]:
        """Inside, what is left to do goes up when it is finished. Yields what the engine has to tell, `other` with it."""
        self._sent = {name: file for name, file in self._sent.items() if name in before.uploaded}
        jobs = before.rest()
        with self._upload.running():
            yield _Sending(self._upload, self._plan, jobs, self._folder, other)

    def facts(self) -> dict[str, Any]:
        """For the receipt: where the files are that the folder lacks."""
        return {
            "streamed_to": {
                "repo_id": self._destination.repo_id,
                "revision": self._destination.revision,
                "files": sorted(self._sent),
            }
        }

    def sizes(self) -> dict[str, int]:
        """The files that only the Hub has."""
        return {name: file.nbytes for name, file in self._sent.items()}

    def commit(self, receipt: Mapping[str, Any]) -> hub.Publication:
        """Makes everything visible in one commit."""
        known = {str(entry["name"]): str(entry["sha256"]) for entry in receipt["files"]}
        files = [*hub.published_files(self._folder, known), *self._sent.values()]
        return self._upload.commit(
            files,
            description=commit_description(receipt, self._destination),
            source="the output",
            retry="Nothing of it is lost.",
        )

    def _note(self, file: hub.PublishedFile) -> None:
        """Remembers what the Hub keeps, for a run that goes on with this one."""
        self._sent[file.name] = replace(file, content=None, stamp=None)
        entries = [{"name": each.name, "bytes": each.nbytes, "sha256": each.sha256} for each in self._sent.values()]
        draft = self._notes.with_suffix(".draft")
        draft.write_text(json.dumps({"to": self._where(), "files": entries}), "utf-8")
        draft.replace(self._notes)

    def _noted(self) -> list[hub.PublishedFile]:
        """What an earlier run to the same place has noted; nothing where the notes are not whole."""
        try:
            notes = json.loads(self._notes.read_text("utf-8"))
            if notes["to"] != self._where():
                return []
            sizes = {file.name: file.nbytes for file in self._plan.files}
            return [
                hub.PublishedFile(entry["name"], entry["bytes"], entry["sha256"], None)
                for entry in notes["files"]
                if sizes.get(entry["name"]) == entry["bytes"] and not (self._folder / entry["name"]).exists()
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def _where(self) -> list[str | None]:
        return [self._destination.repo_id, self._destination.revision]


class _Sending:
    """Hands each finished shard over, and lets a further one begin when there is room. Implements `Watch`."""

    def __init__(
        self, upload: hub.StreamedUpload, plan: Plan, jobs: Sequence[int], folder: Path, other: Watch | None
    ) -> None:
        self._upload = upload
        self._folder = folder
        self._other = other
        self._names = frozenset(streamed_up(plan))
        last = {name: number for number in jobs for name, _, _ in outputs(plan.jobs[number]) if name in self._names}
        self._ending: dict[int, list[str]] = {}
        for name, number in last.items():
            self._ending.setdefault(number, []).append(name)

    def beginning(self, number: int) -> None:
        if self._other is not None:
            self._other.beginning(number)
        self._upload.expect(self._ending.get(number, ()))

    def finished(self, record: FileRecord) -> None:
        if record.name in self._names:
            self._upload.take(hub.finished_file(record.name, self._folder / record.name, record.sha256))
        if self._other is not None:
            self._other.finished(record)

    def written(self, number: int) -> None:
        if self._other is not None:
            self._other.written(number)

    def stopped(self) -> None:
        self._upload.stop()
        if self._other is not None:
            self._other.stopped()


@contextlib.contextmanager
def going_on_later() -> Iterator[None]:
    """A failure of the Hub does not take the finished work with it: the same command goes on."""
    try:
        yield
    except PublishFailed as failure:
        raise RunStopped(failure.what, why=failure.why, next_step=failure.next_step) from None


def begin_upload(
    destination: hub.Destination | None, command: str, plan: Plan, folder: Path, side_files: Sequence[str]
) -> Uploading | None:
    """The upload of a run with `--stream`, if it publishes."""
    if destination is None:
        return None
    named = replace(destination, message=commit_message(destination, command))
    return Uploading(named, plan, folder, side_files)
