"""Stop before pip downloads CUDA, several gigabytes, onto a Linux machine without an NVIDIA driver. CUDA=1 goes on."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec

if platform.system() != "Linux" or shutil.which("nvidia-smi") or os.environ.get("CUDA") or find_spec("torch"):
    sys.exit()
print("looking which build of torch pip would install ...", flush=True)
command = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--quiet",
    "--dry-run",
    "--report",
    "-",
    "-c",
    "constraints.txt",
    "torch",
]
done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
if done.returncode:
    sys.exit()  # the installation itself will say why
names = [each["metadata"]["name"] for each in json.loads(done.stdout)["install"]]
if any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names):
    sys.exit(
        "pip would install torch with CUDA, several gigabytes, and this machine has no NVIDIA driver. Stopped before "
        "the download. Either install torch for CPU into .venv first, with the command on PyTorch's install page and "
        f"{sys.executable} -m pip for pip, and repeat this; or set CUDA=1 to go on: make demo CUDA=1."
    )
