"""How many bytes of tensors `corda-convert collect` holds at most, for blocks as in Llama-2-7B: [LAYERS …]. See README.md.

A count on a CPU, one sample of 2048 tokens at a time, hidden states on disk: what an allocator adds on a GPU is not in it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from collect_inputs import FIXTURES
from make_checkpoint import LlamaShape, write_model
from measuring import markdown_table, note
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SAMPLES, TOKENS = 2, 2048
NAMES = ("tokenizer.json", "tokenizer_config.json")


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations take and give, from their first use until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        self._count(tree_iter((args, given)))
        return given

    def _count(self, values: Iterable[Any]) -> None:
        for value in values:
            if not isinstance(value, torch.Tensor) or value.is_meta:
                continue
            storage = value.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def counted(layers: int, work: Path) -> int:
    """The peak of live bytes of a run of that many layers."""
    from corda_convert.corpus import CorpusOptions
    from corda_convert.operations.collect import collect
    from corda_convert.operations.collect_options import CollectOptions
    from corda_convert.operations.options import RunOptions

    model = work / "model"
    model.mkdir()
    shape = {"hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "head_dim": 128}
    write_model(model, LlamaShape(**shape, vocabulary=2048, layers=layers))
    for name in NAMES:
        (model / name).write_bytes((FIXTURES / "model" / name).read_bytes())
    text = CorpusOptions(
        (FIXTURES / "data" / "task.train.jsonl",), field=("question", "answer"), samples=SAMPLES, seq_len=TOKENS
    )
    options = CollectOptions(text, batch_tokens=TOKENS, offload=work)
    with LiveBytes() as live:
        collect(model, output=work / "covs.safetensors", options=options, run=RunOptions(device="cpu"))
    return live.peak


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(1)  # one batch at a time, as on a GPU; the count sees one thread
        with tempfile.TemporaryDirectory(dir=sys.argv[3]) as folder:
            print(counted(int(sys.argv[2]), Path(folder)))
        return
    rows = []
    for layers in map(int, sys.argv[1:] or ("2", "4")):
        note(f"{layers} layers")
        command = [sys.executable, __file__, "--one", str(layers), tempfile.gettempdir()]
        peak = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
        rows.append((str(layers), f"{peak / 1e9:.2f}"))
    print(markdown_table(("layers", "GB of tensors at most"), rows))


if __name__ == "__main__":
    main()
