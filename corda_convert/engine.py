"""The one loop: read · transform · write, overlapping, for every command. It knows no format and no method.

Threads pass slots of reused buffers along queues: the reader fills a slot with `pread`, workers run the transforms'
steps (on a CPU one worker for each core, each on one thread), the writer writes in the order of reading, and the hasher
follows it. Runs of untouched bytes are copied by the kernel, beside all that. What the plan promised in memory is what
is allocated: a slot is the only place where tensors wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from corda_convert.checkpoint.byte_file import PAGE_BYTES, ByteFile
from corda_convert.checkpoint.tensors import torch_dtype
from corda_convert.output.archive_writer import ArchiveWriter
from corda_convert.output.digests import SequentialDigest, WrittenDigest
from corda_convert.output.direct import DirectWriting
from corda_convert.output.journal import Journal
from corda_convert.output.shard_writer import ShardWriter
from corda_convert.plan.division import Share, outputs, whole_share
from corda_convert.plan.model import (
    BUFFER_ALIGNMENT,
    COPY_BYTES,
    Chunk,
    ComputeJob,
    CopyJob,
    Facts,
    PackedFile,
    Plan,
    Read,
    Session,
    Write,
)

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

MOST_SEAM_BYTES = 16 << 20
"""So many bytes that no tensor asked for are read for the sake of a source's digest, at one place."""

Progress = Callable[[str, int], None]
"""Called with a tensor's name and the bytes just written."""


class Watch(Protocol):
    """What is told how a run goes on, on the run's own threads."""

    def beginning(self, number: int) -> None:
        """A job of the plan is about to be read; returns once there is room for its outputs."""
        ...

    def finished(self, record: FileRecord) -> None:
        """A file is whole and closed: it may go from the folder now."""
        ...

    def written(self, number: int) -> None:
        """All outputs of a job of the plan are written, hashed and noted; nothing more is read for it."""
        ...

    def stopped(self) -> None:
        """The run has failed, or was interrupted: nothing may go on waiting."""
        ...


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written: path inside the output folder, size, SHA-256 in hex."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run did: files finished, facts by job, whole-file digests of the inputs that were read front to back."""

    files: tuple[FileRecord, ...]
    facts: Mapping[str, Facts]
    input_digests: Mapping[Path, str]
    seconds: float
    read_seconds: float
    compute_seconds: float
    write_seconds: float
    hash_seconds: float


def run(
    plan: Plan,
    folder: Path,
    device: torch.device,
    progress: Progress | None = None,
    digests: Mapping[Path, SequentialDigest] | None = None,
    *,
    share: Share | None = None,
    begun: Mapping[str, WrittenDigest] | None = None,
    journal: Journal | None = None,
    watch: Watch | None = None,
) -> RunRecord:
    """Runs the plan's jobs in order and writes its files into `folder`, which exists.

    `digests` of inputs that were begun before are gone on with. With a `share` only its jobs are run; `begun` has the
    files that are there already, with the digests of what was written of them. The `journal` notes what is finished, the
    `watch` is told.
    Raises whatever a source or a transform refuses with, after all threads have stopped and all files are closed.
    """
    allow_open_files(plan)
    share = share or whole_share(plan)
    progress = progress or (lambda _name, _nbytes: None)
    return _Run(plan, folder, device, progress, digests or {}, share, begun or {}, journal, watch).run()


def create_files(plan: Plan, folder: Path, names: Container[str]) -> None:
    """Writes some of the plan's files with nothing but their headers, for processes that fill them together."""
    for file in plan.files:
        if file.name in names:
            with _open(folder, file, DirectWriting(), None):
                pass


def header_digest(file: PackedFile) -> WrittenDigest:
    """The digest of a file that has nothing but its header."""
    digest = WrittenDigest(file.nbytes)
    digest.update(0, file.header)
    return digest


def finish_file(plan: Plan, folder: Path, name: str) -> FileRecord:
    """Takes size and digest of a file that several processes have filled, or a run before. Raises `OutputRefused`."""
    (file,) = (file for file in plan.files if file.name == name)
    with _open(folder, file, DirectWriting(), WrittenDigest(file.nbytes, is_broken=True)) as writer:
        return FileRecord(name, *writer.finish())


def _open(folder: Path, file: PackedFile, direct: DirectWriting, begun: WrittenDigest | None) -> ShardWriter:
    if file.archive is not None:
        return ArchiveWriter(folder / file.name, file.archive, direct, begun)
    return ShardWriter(folder / file.name, file.header, file.nbytes, direct, begun)


def _last_reads(jobs: Sequence[ComputeJob | CopyJob]) -> dict[int, list[ByteFile]]:
    """The sources whose bytes lie in place, by the identity of the last job that reads them."""
    last = {file.path: (id(job), file) for job in jobs for file, _, _ in _job_pieces(job)}
    ends: dict[int, list[ByteFile]] = {}
    for job, file in last.values():
        ends.setdefault(job, []).append(file)
    return ends


def inputs_read_through(plan: Plan) -> set[Path]:
    """The inputs of which a run of the whole plan knows the digest: those that it reads front to back."""
    positions: dict[Path, int | None] = {}
    files: dict[Path, ByteFile] = {}
    for file, offset, nbytes in (piece for job in plan.jobs for piece in _job_pieces(job)):
        position = positions.get(file.path, 0)
        files[file.path] = file
        is_next = position is not None and 0 <= offset - position <= MOST_SEAM_BYTES
        positions[file.path] = offset + nbytes if is_next else None
    return {
        path
        for path, position in positions.items()
        if position is not None and files[path].file_bytes - position <= MOST_SEAM_BYTES
    }


def _job_pieces(job: ComputeJob | CopyJob) -> Iterator[tuple[ByteFile, int, int]]:
    """What a job reads of files whose bytes lie in place: file, offset and length, in order."""
    if isinstance(job, CopyJob):
        if isinstance(job.source, ByteFile):
            yield job.source, job.source_offset, job.nbytes
        return
    for read in (read for chunk in job.chunks for read in chunk.all_reads):
        if isinstance(read.file, ByteFile) and (extent := read.file.extent(read.tensor)) is not None:
            yield read.file, extent.begin + read.begin, read.nbytes


@dataclass(slots=True)
class _Slot:
    """Buffers of one chunk on its way: operands side by side in one, outputs in the other."""

    operands: torch.Tensor
    outputs: torch.Tensor


class _Running:
    """A compute job while it runs: its session, ready once `prepare` has returned, and the chunks still to come."""

    def __init__(self, job: ComputeJob) -> None:
        self.job = job
        self.session: Session | None = None
        self.ready = threading.Event()
        self.left = len(job.chunks)
        self.lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Work:
    """One piece of work with its place in the order of writing: a chunk in its slot, or a copy, which has none.

    `copied` is set once the copy has been made.
    """

    place: int
    number: int
    copy: CopyJob | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    running: _Running | None = None
    chunk: Chunk | None = None
    slot: _Slot | None = None


class _Stopped(Exception):
    """Another thread has failed; this one ends quietly."""


class _Run:
    def __init__(
        self,
        plan: Plan,
        folder: Path,
        device: torch.device,
        progress: Progress,
        digests: Mapping[Path, SequentialDigest],
        share: Share,
        begun: Mapping[str, WrittenDigest],
        journal: Journal | None,
        watch: Watch | None,
    ) -> None:
        self.plan = plan
        self.watch = watch
        self.share = share
        self.jobs = [plan.jobs[number] for number in share.jobs]
        self.begun = begun
        self.journal = journal
        self.noted: dict[str, WrittenDigest] = {}  # written since the journal's last note
        self.folder = folder
        self.device = device
        self.progress = progress
        self.stop = threading.Event()
        self.failure: BaseException | None = None
        self.ended = threading.Semaphore(0)  # waited on instead of `join`, which, interrupted, takes a thread for dead
        self.free: queue.Queue[_Slot | None] = queue.Queue()
        self.read: queue.Queue[_Work | None] = queue.Queue(maxsize=plan.slots + 1)
        self.copies: queue.Queue[_Work | None] = queue.Queue()
        self.computed: queue.Queue[_Work | None] = queue.Queue(maxsize=plan.slots + 1)
        self.written: queue.Queue[_Work | None] = queue.Queue(maxsize=plan.slots + 1)
        self.writers: dict[str, ShardWriter] = {}
        self.direct = DirectWriting()
        self.digests = dict(digests)
        for digest in self.digests.values():
            digest.skip_head()
        self.facts: dict[str, Facts] = {}
        self.records: list[FileRecord] = []
        self.unfinished = Counter(name for job in self.jobs for name in {name for name, _, _ in outputs(job)})
        self.seconds = {"read": 0.0, "compute": 0.0, "write": 0.0, "hash": 0.0}
        self.seconds_lock = threading.Lock()
        self.progress_lock = threading.Lock()
        for _ in range(plan.slots):
            self.free.put(None)  # a slot is allocated when it is first needed

    def run(self) -> RunRecord:
        from corda_convert.linalg.threads import one_thread

        begun = time.perf_counter()
        workers = [self._compute_all] * self.plan.workers
        loops = [self._read_all, *workers, self._copy_all, self._write_all, self._hash_all]
        threads = [
            threading.Thread(target=self._guard, args=(loop,), name=loop.__name__, daemon=True) for loop in loops
        ]
        with contextlib.ExitStack() as stack:
            if self.plan.workers > 1:  # torch's own threads would wait for each other, and for the hashing
                stack.enter_context(one_thread())
            written = {name for job in self.jobs for name, _, _ in outputs(job)} | self.share.finishes
            for file in self.plan.files:
                if file.name in written:
                    writer = _open(self.folder, file, self.direct, self.begun.get(file.name))
                    self.writers[file.name] = stack.enter_context(writer)
            try:
                for thread in threads:
                    thread.start()
                for _ in threads:
                    self.ended.acquire()
            except BaseException as failure:  # the interrupt key reaches this thread only
                self._fail(failure)
            for thread in threads:
                _join(thread)
        if self.failure is not None:
            raise self.failure
        return RunRecord(
            files=tuple(self.records),
            facts=self.facts,
            input_digests=_whole(self.digests),
            seconds=time.perf_counter() - begun,
            read_seconds=self.seconds["read"],
            compute_seconds=self.seconds["compute"],
            write_seconds=self.seconds["write"],
            hash_seconds=self.seconds["hash"],
        )

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except _Stopped:
            pass
        except BaseException as failure:
            self._fail(failure)
        finally:
            self.ended.release()

    def _fail(self, failure: BaseException) -> None:
        if self.failure is None:
            self.failure = failure
        self.stop.set()
        if self.watch is not None:
            self.watch.stopped()

    def _take(self, source: queue.Queue[_T]) -> _T:
        while not self.stop.is_set():
            with contextlib.suppress(queue.Empty):
                return source.get(timeout=0.1)
        raise _Stopped

    def _give(self, target: queue.Queue[_T], item: _T) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                return target.put(item, timeout=0.1)
        raise _Stopped

    @contextlib.contextmanager
    def _busy(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        with self.seconds_lock:
            self.seconds[stage] += time.perf_counter() - begun

    def _read_all(self) -> None:
        place = itertools.count()
        ends = _last_reads(self.jobs)
        for number, job in zip(self.share.jobs, self.jobs, strict=True):
            if self.watch is not None:
                self.watch.beginning(number)
            if isinstance(job, CopyJob):
                work = _Work(next(place), number, copy=job)
                self.copies.put(work)
                with self._busy("read"):
                    self._digest_source(job)
                    self._finish_digests(ends.get(id(job), ()))
                self._give(self.read, work)
                continue
            running = _Running(job)
            for chunk in job.chunks:
                slot = self._take(self.free) or self._allocate()
                with self._busy("read"):
                    self._fill(slot, chunk)
                    if chunk is job.chunks[-1]:
                        self._finish_digests(ends.get(id(job), ()))
                self._give(self.read, _Work(next(place), number, running=running, chunk=chunk, slot=slot))
        self.copies.put(None)
        for _ in range(self.plan.workers):
            self._give(self.read, None)

    def _finish_digests(self, files: Iterable[ByteFile]) -> None:
        """Hashes what stands behind the last tensors of sources that no later job reads."""
        for file in files:
            self._catch_up(file, self._digest(file), file.file_bytes)

    def _allocate(self) -> _Slot:
        import torch

        pinned = self.device.type == "cuda"
        sizes = (self.plan.read_buffer_bytes, self.plan.write_buffer_bytes)
        return _Slot(*(torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes))

    def _fill(self, slot: _Slot, chunk: Chunk) -> None:
        for read, view in zip(chunk.all_reads, _parts(slot.operands, chunk.all_reads), strict=True):
            bytes_view = _memory(view)
            read.file.read_into(read.tensor, read.begin, bytes_view)
            if isinstance(read.file, ByteFile) and (extent := read.file.extent(read.tensor)) is not None:
                digest = self._digest(read.file)
                self._catch_up(read.file, digest, extent.begin + read.begin)
                digest.update(extent.begin + read.begin, bytes_view)

    def _digest(self, file: ByteFile) -> SequentialDigest:
        return self.digests.setdefault(file.path, SequentialDigest(file.file_bytes))

    def _catch_up(self, file: ByteFile, digest: SequentialDigest, offset: int) -> None:
        """Hashes what stands before `offset` and belongs to no tensor: a header, the seams of an archive."""
        if digest.is_broken or offset - digest.position > MOST_SEAM_BYTES:
            return
        while digest.position < offset:
            seam = memoryview(bytearray(min(COPY_BYTES, offset - digest.position)))
            file.read_bytes_into(digest.position, seam)
            digest.update(digest.position, seam)

    def _digest_source(self, job: CopyJob) -> None:
        """Hashes what will be copied. It also brings it into the page cache, ahead of the copy."""
        if not isinstance(job.source, ByteFile):
            return
        digest = self._digest(job.source)
        self._catch_up(job.source, digest, job.source_offset)
        if digest.is_broken or job.source_offset + job.nbytes <= digest.head:
            return
        buffer = memoryview(bytearray(min(COPY_BYTES, job.nbytes)))
        for begin, nbytes in self._pieces(job):
            job.source.read_bytes_into(job.source_offset + begin, buffer[:nbytes])
            digest.update(job.source_offset + begin, buffer[:nbytes])

    def _compute_all(self) -> None:
        while (work := self._take(self.read)) is not None:
            if work.running is not None and work.chunk is not None and work.slot is not None:
                self._compute(work.running, work.chunk, work.slot)
            self._give(self.computed, work)
        self._give(self.computed, None)

    def _compute(self, running: _Running, chunk: Chunk, slot: _Slot) -> None:
        tensors = _named_tensors(slot.operands, chunk.all_reads)
        outputs = _named_tensors(slot.outputs, chunk.writes)
        whole = {read.operand: tensors.pop(read.operand) for read in chunk.whole}
        if chunk is running.job.chunks[0]:
            with self._busy("compute"):
                session = running.job.transform.begin(self.device)
                session.prepare(whole)
            running.session = session
            running.ready.set()
        while not running.ready.wait(timeout=0.1):
            if self.stop.is_set():
                raise _Stopped
        assert running.session is not None  # noqa: S101 - set before `ready`
        with self._busy("compute"):
            running.session.step(chunk.first_row, tensors, outputs)
        with running.lock:
            running.left -= 1
            if running.left == 0:
                self.facts[running.job.name] = {"action": running.job.transform.action, **running.session.facts()}

    def _copy_all(self) -> None:
        """Makes the copies beside everything else: they need no slot, and only the hasher waits for them."""
        while (work := self._take(self.copies)) is not None:
            if (job := work.copy) is None:
                continue
            writer = self.writers[job.file_name]
            with self._busy("write"):
                for begin, nbytes in self._pieces(job):
                    writer.copy(job.offset + begin, job.source.descriptor, job.source_offset + begin, nbytes)
                    self._advance(job.names[0], nbytes)
            work.copied.set()

    def _write_all(self) -> None:
        for work in self._in_order():
            with self._busy("write"):
                self._write(work)
            self._give(self.written, work)
        self._give(self.written, None)

    def _hash_all(self) -> None:
        """Hashes what was written, behind the writer, and gives the slots back."""
        while (work := self._take(self.written)) is not None:
            while work.copy is not None and not work.copied.wait(timeout=0.1):
                if self.stop.is_set():
                    raise _Stopped
            with self._busy("hash"):
                self._hash(work)
                self._note(work)
                self._tell(work)
            if work.slot is not None:
                self.free.put(work.slot)
        self._commit()
        finished = {record.name for record in self.records}
        self.records += [
            FileRecord(name, *writer.finish())
            for name, writer in self.writers.items()
            if name in self.share.finishes - finished
        ]

    def _note(self, work: _Work) -> None:
        """Tells the journal what has been written, hashed and finished."""
        if self.journal is None:
            return
        if work.copy is not None:
            self.noted[work.copy.file_name] = self.writers[work.copy.file_name].written
            self.journal.add(work.copy.nbytes, {})
        if work.running is not None and work.chunk is not None:
            self.noted |= {write.file_name: self.writers[write.file_name].written for write in work.chunk.writes}
            job = work.running.job
            is_last = work.chunk is job.chunks[-1]
            self.journal.add(
                sum(write.nbytes for write in work.chunk.writes), {job.name: self.facts[job.name]} if is_last else {}
            )
        if self.journal.is_due or any(written.is_whole for written in self.noted.values()):
            self._commit()

    def _tell(self, work: _Work) -> None:
        """Tells the watch of a job whose last piece this is."""
        is_last = work.running is None or work.chunk is work.running.job.chunks[-1]
        if self.watch is None or not is_last:
            return
        self.watch.written(work.number)
        for name in {name for name, _, _ in outputs(self.plan.jobs[work.number])}:
            self.unfinished[name] -= 1
            if not self.unfinished[name] and name in self.share.finishes:
                self.records.append(FileRecord(name, *self.writers[name].finish()))
                self.watch.finished(self.records[-1])

    def _commit(self) -> None:
        if self.journal is not None:
            self.journal.commit(self.noted, _whole(self.digests))
            self.noted = {}

    def _in_order(self) -> Iterator[_Work]:
        """What the workers are done with, in the order of reading, so that every file grows front to back."""
        waiting: dict[int, _Work] = {}
        place, ended = 0, 0
        while ended < self.plan.workers:
            work = self._take(self.computed)
            if work is None:
                ended += 1
                continue
            waiting[work.place] = work
            while place in waiting:
                yield waiting.pop(place)
                place += 1

    def _write(self, work: _Work) -> None:
        for write, view in _written(work):
            self.writers[write.file_name].write(write.offset, _memory(view))
            self._advance(write.tensor, write.nbytes)

    def _advance(self, name: str, nbytes: int) -> None:
        with self.progress_lock:
            self.progress(name, nbytes)

    def _hash(self, work: _Work) -> None:
        if work.copy is not None:
            for begin, nbytes in self._pieces(work.copy):
                self.writers[work.copy.file_name].digest_copied(work.copy.offset + begin, nbytes)
        for write, view in _written(work):
            self.writers[write.file_name].digest(write.offset, _memory(view))

    def _pieces(self, job: CopyJob) -> Iterator[tuple[int, int]]:
        """The job's bytes, cut; stops between pieces where another thread has failed."""
        for begin in range(0, job.nbytes, COPY_BYTES):
            if self.stop.is_set():
                raise _Stopped
            yield begin, min(COPY_BYTES, job.nbytes - begin)


def _whole(digests: Mapping[Path, SequentialDigest]) -> dict[Path, str]:
    """The digests of the files that have passed from front to back."""
    return {path: text for path, digest in list(digests.items()) if (text := digest.hexdigest())}


def _join(thread: threading.Thread) -> None:
    """Waits for the end of a thread, even of one whose start was interrupted; not for one that was never started."""
    for _ in range(1000):
        with contextlib.suppress(RuntimeError):
            return thread.join()
        if thread not in threading.enumerate():
            return None
        time.sleep(0.001)
    return None


def allow_open_files(plan: Plan) -> None:
    """All shards are open at once, and a process may often open 256 or 1024 files: raises that as far as allowed."""
    sources = {id(job.source) for job in plan.jobs if isinstance(job, CopyJob)}
    sources |= {
        id(read.file)
        for job in plan.jobs
        if isinstance(job, ComputeJob)
        for chunk in job.chunks
        for read in chunk.all_reads
    }
    needed = _open_files() + 2 * len(plan.files) + len(sources) + 32  # outputs once more past the page cache
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(OSError, ValueError):
            allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _open_files() -> int:
    """How many files this process has open; a guess where the system does not tell."""
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return 128


def _parts(slot: torch.Tensor, parts: Sequence[Read | Write]) -> Iterator[torch.Tensor]:
    """The slot's bytes for each part, one after the other at aligned places: for outputs as aligned as in their file."""
    position = 0
    for part in parts:
        if isinstance(part, Write):
            position += (part.offset - slot.data_ptr() - position) % PAGE_BYTES if part.offset % 8 == 0 else 0
        yield slot[position : position + part.nbytes]
        position += -(-part.nbytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def _written(work: _Work) -> Iterator[tuple[Write, torch.Tensor]]:
    """The outputs of a chunk and their bytes in its slot; nothing for a copy."""
    if work.chunk is not None and work.slot is not None:
        yield from zip(work.chunk.writes, _parts(work.slot.outputs, work.chunk.writes), strict=True)


def _named_tensors(buffer: torch.Tensor, parts: Sequence[Read | Write]) -> dict[str, torch.Tensor]:
    return {
        part.operand if isinstance(part, Read) else part.tensor: view.view(torch_dtype(part.dtype)).view(part.shape)
        for part, view in zip(parts, _parts(buffer, parts), strict=True)
    }


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the host. Valid as long as the tensor is."""
    if tensor.numel() == 0:
        return memoryview(bytearray())  # the cast below refuses an empty one
    array = (ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
