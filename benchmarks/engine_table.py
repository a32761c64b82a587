"""Print results of bench_engine as a Markdown table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.engine_table", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="FILE.json", help="written by bench_engine")
    paths = parser.parse_args().paths
    print("| network | q | plain ms | author | two_pass | shared | limit | floor | auto |", end="")
    print(" gradient error | cosine: shared, two_pass | peak MiB: exact, shared |\n|" + 12 * "---|")
    for path in paths:
        for model in json.loads(Path(path).read_text(encoding="utf-8"))["engines"]:
            for row in model["rows"]:
                memory = row["memory"]
                cells = [model["model"], row["keep"], f"{row['plain_ms']:.0f}"]
                cells += [f"{row[name]:.2f}" for name in ("author", "two_pass")]
                cells += [f"**{row['shared']:.2f}**", f"{row['limit']:.2f}"]
                cells += [f"{row['floor']:.2f}" if "floor" in row else "", f"{row['auto']:.2f}"]
                cells += [f"{row['shared_error']:.0e}", f"{row['shared_cosine']:.3f}, {row['two_pass_cosine']:.3f}"]
                cells += [f"{memory['exact']:.0f}, {memory['shared']:.0f}"]
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
