"""Files in torch's own format: what is written loads as what torch.save would have written."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from building import LINEARS, files_below, llama_tensors, random, write_checkpoint, write_lora
from safetensors.torch import load_file, save_file
from test_pickled import odd_tensors, same_bits

from corda_convert import CordaConvertError, MergeOptions, engine, merge
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.checkpoint.torch_archive import ALIGNMENT, lay_out_archive
from corda_convert.operations.production import as_one_archive, checkpoint_files
from corda_convert.operations.transforms import CastTransform
from corda_convert.operations.verbatim import VerbatimTransform
from corda_convert.output.archive_writer import ArchiveWriter
from corda_convert.plan.model import Copied, OutputFileSpec, Produced
from corda_convert.plan.packing import pack


def written(file: OutputFileSpec, folder: Path) -> Path:
    """What the engine makes of the file. Its record must be true."""
    folder.mkdir(parents=True, exist_ok=True)
    record = engine.run(pack([file]), folder, torch.device("cpu"))
    path = folder / file.name
    assert [(entry.nbytes, entry.sha256) for entry in record.files] == [
        (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    ]
    return path


def archive(tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """The tensors written by the engine, from a file of torch's own."""
    folder.mkdir()
    torch.save(dict(tensors), folder / "source.pth")
    source = PickleFile(folder / "source.pth")
    outputs = tuple(
        Produced(spec, VerbatimTransform(TensorRef(source, spec)))
        if source.extent(name) is None
        else Copied(spec, source, name)
        for name, spec in source.specs.items()
    )
    return written(OutputFileSpec("written.pth", outputs, {}), folder)


def assert_loads(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    for map_file in (False, True):
        found = torch.load(path, weights_only=True, mmap=map_file)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert same_bits(found[name], tensor)
            assert found[name].stride() == torch.empty(tensor.shape).stride()
            assert found[name].untyped_storage().nbytes() == tensor.nbytes


def test_tensors_of_every_kind_load_as_they_were(tmp_path: Path) -> None:
    tensors = odd_tensors()
    assert_loads(archive(tensors, tmp_path / "made"), tensors)


def test_dtypes_without_a_storage_class_of_their_own_load_as_they_were(tmp_path: Path) -> None:
    names = ("uint16", "uint32", "uint64", "float8_e5m2", "float8_e4m3fn", "complex64")
    tensors = {name: torch.arange(5).to(getattr(torch, name)) for name in names}
    assert_loads(archive(tensors, tmp_path / "made"), tensors)


@pytest.mark.parametrize("tensors", [{}, {"x": torch.empty(0)}, {"x": torch.empty(0, 3), "ü.weight": random(3)}])
def test_files_with_little_or_nothing_in_them_load(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert_loads(archive(tensors, tmp_path / "made"), tensors)


def test_many_tensors_and_large_shapes_load(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": random(3, seed=number) for number in range(300)} | {"x": random(70_000)}
    assert_loads(archive(tensors, tmp_path / "made"), tensors)


def test_the_archive_is_sound_and_its_storages_are_aligned_as_torchs_own(tmp_path: Path) -> None:
    path = archive(odd_tensors(), tmp_path / "made")
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        ours = [name.partition("/")[2] for name in opened.namelist()]
        content = path.read_bytes()
        assert all(content[entry.header_offset + 6] == entry.flag_bits & 0xFF for entry in opened.infolist())
    with zipfile.ZipFile(tmp_path / "made" / "source.pth") as opened:
        theirs = {name.partition("/")[2] for name in opened.namelist()}
    assert {"data.pkl", "byteorder", "version"} <= set(ours) & theirs
    assert len(set(ours)) == len(ours) == 3 + len(odd_tensors())
    file = PickleFile(path)
    extents = [file.extent(name) for name in file.specs]
    assert all(extent is not None and extent.begin % ALIGNMENT == 0 for extent in extents)
    unzip = shutil.which("unzip")
    if unzip is not None:
        tested = subprocess.run([unzip, "-tq", str(path)], capture_output=True, text=True, check=False)
        assert tested.returncode == 0, tested.stdout


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (archive(odd_tensors(), tmp_path / name).read_bytes() for name in ("one", "two"))
    assert first == second


def test_rows_that_come_in_many_chunks_are_joined(tmp_path: Path) -> None:
    tensors = {"large": random(3000, 1000), "small": random(7), "other": random(1500, 1000, seed=1)}
    save_file(tensors, tmp_path / "source.safetensors")
    source = SafetensorsFile(tmp_path / "source.safetensors")
    outputs = tuple(
        Produced(spec.with_dtype("BF16"), CastTransform(TensorRef(source, spec), "BF16"))
        for spec in source.specs.values()
    )
    plan = pack([OutputFileSpec("written.pth", outputs, {})], workers=2)
    assert max(len(job.chunks) for job in plan.jobs) > 2
    path = written(OutputFileSpec("written.pth", outputs, {}), tmp_path / "made")
    assert_loads(path, {name: tensors[name].bfloat16() for name in source.specs})


def test_neighbours_in_a_safetensors_file_are_taken_apart(tmp_path: Path) -> None:
    tensors = {f"x{number}": random(3, seed=number) for number in range(4)}
    save_file(tensors, tmp_path / "source.safetensors")
    source = SafetensorsFile(tmp_path / "source.safetensors")
    outputs = tuple(Copied(spec, source, name) for name, spec in source.specs.items())
    assert_loads(written(OutputFileSpec("written.pth", outputs, {}), tmp_path / "made"), tensors)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]])
def test_bytes_that_come_out_of_order_make_the_same_file(tmp_path: Path, order: Sequence[int]) -> None:
    tensors = [random(5, seed=number) for number in range(3)]
    layout, places = lay_out_archive([TensorSpec(str(number), "F32", (5,)) for number in range(3)])
    with ArchiveWriter(tmp_path / "x.pth", layout) as writer:
        for number in order:
            content = tensors[number].numpy().tobytes()
            for begin, end in ((0, 12), (12, 20)):
                view = memoryview(content[begin:end])
                writer.write(places[str(number)] + begin, view)
                writer.digest(places[str(number)] + begin, view)
        nbytes, digest = writer.finish()
    content = (tmp_path / "x.pth").read_bytes()
    assert (nbytes, digest) == (len(content), hashlib.sha256(content).hexdigest())
    with zipfile.ZipFile(tmp_path / "x.pth") as opened:
        assert opened.testzip() is None
    assert_loads(tmp_path / "x.pth", {str(number): tensor for number, tensor in enumerate(tensors)})


def test_files_above_four_gigabytes_are_found_by_torch_where_they_are(tmp_path: Path) -> None:
    """Sparse files: only what stands between the tensors is written, and torch itself tells where it finds them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = {"a": (5 << 29,), "b": (3,), "c": (3 << 29,), "d": (2, 2)}
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    layout, places = lay_out_archive(specs)
    assert layout.storages[0].nbytes > 1 << 32
    with (tmp_path / "x.pth").open("wb") as stream:
        stream.write(layout.header)
        for index, storage in enumerate(layout.storages):
            stream.seek(storage.end)
            stream.write(layout.behind(index, [0] * len(specs)))
        assert stream.tell() == layout.nbytes
    with FakeTensorMode():
        found = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in found.items()} == places
    ours = PickleFile(tmp_path / "x.pth")
    for name in shapes:
        extent = ours.extent(name)
        assert extent is not None
        assert extent.begin == places[name]


def test_torchs_own_files_above_four_gigabytes_are_read_at_the_right_place(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = {"a": torch.empty(5 << 29, dtype=torch.bfloat16), "b": torch.empty(3), "c": torch.empty(4)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fake, tmp_path / "x.pth")
    with FakeTensorMode():
        found = torch.load(tmp_path / "x.pth", weights_only=True)
    file = PickleFile(tmp_path / "x.pth")
    for name, tensor in found.items():
        extent = file.extent(name)
        assert extent is not None
        assert extent.begin == tensor.untyped_storage()._checkpoint_offset
    assert found["c"].untyped_storage()._checkpoint_offset > 1 << 32


def test_a_dtype_that_torch_cannot_save_is_refused_by_name() -> None:
    with pytest.raises(CordaConvertError) as refused:
        lay_out_archive([TensorSpec("x", "F4", (4,)), TensorSpec("y", "F32", (4,))])
    assert str(refused.value) == "torch.save knows no such tensors: x F4.\nWrite safetensors instead."


def test_a_model_becomes_one_file_of_torchs_own(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "model", shards=3))
    (file,) = as_one_archive(checkpoint_files(checkpoint, {}, None), "model.pth")
    assert_loads(written(file, tmp_path / "made"), {name: llama_tensors()[name] for name in checkpoint.tensors})


def test_what_was_written_merges_like_its_source(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", {name: shape for name, shape in LINEARS.items() if shape[0] != shape[1]})
    path = archive(llama_tensors(), tmp_path / "made")
    options = MergeOptions(as_is=True, format="safetensors")
    merge(path, adapter=adapter, output=tmp_path / "ours", options=options)
    merge(path.with_name("source.pth"), adapter=adapter, output=tmp_path / "theirs", options=options)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert files_below(tmp_path / "ours").keys() == files_below(tmp_path / "theirs").keys()
