"""Run a trainer's tests under another release of it than the pinned one, in a virtual environment of its own.

python tests/integrations/versions.py lightning==2.4.0 "transformers==5.0.0 accelerate==1.1.0" accelerate==1.0.0

The first name of an argument says whose tests to run; what else is in it is installed as well. torch goes in first, as
pinned in constraints.txt. Prints a line for each and exits with 1 where tests failed. Environments are kept in --folder
and used again, one a trainer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = {
    "lightning": ["tests/integrations/test_lightning.py", "tests/integrations/test_examples.py"],
    "transformers": ["tests/integrations/test_transformers.py", "tests/integrations/test_examples.py"],
    "accelerate": [
        "tests/integrations/test_accelerate.py", "tests/integrations/test_examples.py",
        "tests/distributed/test_training.py",
    ],
}  # fmt: skip
# examples/05, 06, 07 and 08; of the other files every test
EXAMPLES = {"lightning": "lightning", "transformers": "huggingface or causal_lm", "accelerate": "accelerate"}
TOOLS = ["numpy", "pytest", "pytest-timeout", "scikit-learn", "pyarrow"]


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"{name} is not in constraints.txt"
    return found[0]


def try_release(requirements: list[str], folder: Path) -> bool:
    trainer = re.split(r"[<>=!~]", requirements[0])[0]
    python = folder / trainer / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not python.exists():
        venv.create(folder / trainer, with_pip=True)
        subprocess.run([*install, pinned("torch")], check=True)
        subprocess.run([*install, *map(pinned, TOOLS)], check=True)
    subprocess.run([*install, pinned("torch"), *requirements], check=True)
    # other releases give warnings of their own, so a warning is no error here
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--no-header"]
    of_examples = f"not test_examples or {EXAMPLES[trainer]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*command, "-k", of_examples, *TESTS[trainer]], cwd=ROOT, env=environment)
    listed = subprocess.run([*install[:3], "freeze"], capture_output=True, text=True, check=True).stdout.splitlines()
    versions = [line for line in listed if re.match("(lightning|transformers|accelerate|torch)==", line)]
    print(f"{'passed' if done.returncode == 0 else 'FAILED'}: {', '.join(versions)}", flush=True)
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("releases", nargs="+", help="such as lightning==2.4.0")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "batchtrim-versions")
    options = parser.parse_args(arguments)
    for each in options.releases:
        if re.split(r"[<>=!~ ]", each)[0] not in TESTS:
            parser.error(f"expected a release to be of one of {', '.join(TESTS)}, got {each!r}.")
    return 0 if all([try_release(each.split(), options.folder) for each in options.releases]) else 1


if __name__ == "__main__":
    sys.exit(main())
