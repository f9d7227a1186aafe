"""Damaged files, guided by which lines of the package they reach: `make fuzz`. Needs atheris (`pip install atheris`).

The input of a case is a few integers, as those of tests/test_fuzz.py: which file, which command, which damage. Libraries
are not looked into, only the package's own modules that read files.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import atheris
except ImportError:
    print("atheris is not installed: no coverage-guided fuzzing (pip install atheris).")
    sys.exit(0)

with atheris.instrument_imports(include=["corda_convert"]):
    import corda_convert.adapters
    import corda_convert.adapters.cache
    import corda_convert.adapters.lora
    import corda_convert.adapters.lora_options
    import corda_convert.adapters.rwkv
    import corda_convert.checkpoint.covariances
    import corda_convert.checkpoint.folder
    import corda_convert.checkpoint.pickle_file
    import corda_convert.checkpoint.safetensors_file
    import corda_convert.operations.inspect
    import corda_convert.output.journal
    import corda_convert.output.receipt  # noqa: F401

from fuzzing.workspace import TARGETS, Workspace, bounded_memory

MOST_BYTES = 3 << 30


def main(seconds: int, folder: Path) -> None:
    workspace = Workspace(folder / "inputs")
    names = list(TARGETS)
    begun, ran = time.monotonic(), 0

    def one(content: bytes) -> None:
        nonlocal ran
        if time.monotonic() - begun > seconds:
            found = workspace.found
            print(
                f"{ran} cases in {seconds} s: {found.accepted} accepted, {found.refused} refused with "
                f"{len(found.told)} messages, none wrong",
                flush=True,
            )
            shutil.rmtree(folder)
            os._exit(0)  # libFuzzer would report an end from inside as a crash
        provider = atheris.FuzzedDataProvider(content)
        name = names[provider.ConsumeIntInRange(0, len(names) - 1)]
        command = TARGETS[name].commands[provider.ConsumeIntInRange(0, len(TARGETS[name].commands) - 1)]
        draws = [
            (provider.ConsumeInt(4) % 2**32, provider.ConsumeInt(4) % 2**32, provider.ConsumeInt(4) % 2**32)
            for _ in range(provider.ConsumeIntInRange(1, 3))
        ]
        ran += 1
        try:
            workspace.case(name, command, draws)
        except BaseException:
            print(f"Failed: {name!r}, {command!r}, {draws!r}", file=sys.stderr, flush=True)
            raise

    with bounded_memory(MOST_BYTES):
        atheris.Setup([sys.argv[0], "-rss_limit_mb=0", "-timeout=0", "-max_len=64", f"-artifact_prefix={folder}/"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args().seconds, Path(temporary))
