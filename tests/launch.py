"""Start real processes over gloo and wait for all of them. As ``launch.py SCRIPT`` or ``-m MODULE``: one."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run_ranks(script: Path, ranks: int, folder: Path, *arguments: str, limit: float = 240.0) -> list[str]:
    """Run ``script RANK RANKS STORE *arguments`` once a rank; fail with its output where one fails or does not end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    store = folder / f"store{ranks}{''.join(arguments)[-20:].replace('/', '_')}"
    logs = [folder / f"rank{rank}of{ranks}.log" for rank in range(ranks)]
    processes = []
    with socket.socket() as probe:  # for trainers, which meet by address and port and not by a file
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
    for rank, log in enumerate(logs):
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, str(script), str(rank), str(ranks), str(store), *arguments]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    end = time.monotonic() + limit
    try:
        codes = [process.wait(timeout=max(0.1, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [log.read_text() for log in logs]
    outputs = zip(codes, texts, strict=True)
    if any(code != 0 for code in codes):
        pytest.fail("\n".join(f"--- rank {rank}: {code}\n{text[-3000:]}" for rank, (code, text) in enumerate(outputs)))
    return texts


def run_and_leave(*words: str) -> None:
    """Run ``SCRIPT`` or ``-m MODULE`` with arguments as ``python`` does, then leave without the interpreter's own end.

    A thread of gloo that asks for the GIL while the interpreter ends is unwound by it, and C++ aborts the process
    ("terminate called without an active exception"). A program that raises, or exits with an error, ends as it always
    does.
    """
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_and_leave(*sys.argv[1:])
