"""Exports a corpus, has each tool load it and train two steps, and writes benchmarks/results/loaders.json.

python -m benchmarks.loaders --corpus runs/demo/corpus/latest
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.loaders.checking import ROOT, TOOLS, differences, export_for, exported_rows, load_export, why_missing
from corpus.exports import open_version

RESULTS = ROOT / "benchmarks" / "results" / "loaders.json"
_NUM_STEPS = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=__doc__.partition("\n")[0])
    parser.add_argument("--corpus", default=str(ROOT / "runs/demo/corpus/latest"), help="a corpus folder or version")
    arguments = parser.parse_args()
    version = open_version(arguments.corpus)
    results = {}
    for tool in TOOLS:
        if reason := why_missing(tool):
            print(f"{tool}: skipped, {reason}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="bimode-loaders-") as folder:
            exported = export_for(tool, version, Path(folder) / "export")
            rows = exported_rows(version, exported)
            loaded = load_export(tool, exported, Path(folder) / "run", num_steps=_NUM_STEPS)
        problems = differences(rows, loaded.rows)
        for problem in problems[:10]:
            print(f"{tool}: {problem}", file=sys.stderr)
        results[tool] = {
            "version": loaded.version,
            "rows": len(loaded.rows),
            "rows_that_differ": len(problems),
            "empty_think_blocks": sum(row.learned.startswith("<think>\n\n</think>") for row in loaded.rows),
            "losses": loaded.losses,
        }
        print(f"{tool} {loaded.version}: {len(loaded.rows)} rows, {len(problems)} differ, losses {loaded.losses}")
    if results:
        record = {"corpus": version.manifest.name, "digest": version.manifest.digest, **results}
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(result["rows_that_differ"] for result in results.values()) or not results)


if __name__ == "__main__":
    sys.exit(main())
