"""Trains a bundled model from nothing: draws its rows, builds a small Qwen2.5-VL and anneals it recipe by recipe.

`teacher` answers the demo's questions and judges them. `base` has only learned to see and to add: what annealing and
BPO start from in the demo and in the experiments. Both begin with the same run of reading.

The work lies in a folder of its own and goes on where it was when it is started again. The finished checkpoint replaces
the bundled one only at the end. `python -m sampleworld.evaluate` then measures it.

    python -m sampleworld.make_models teacher --work .local/models
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from sampleworld.rows import MODELS, recipe_settings
from teacher.serving import cpu_python_path

HERE = Path(__file__).parent


def run_program(*arguments: str) -> None:
    """Runs one of the project's programs with this Python. Raises SystemExit: with its status, if it fails."""
    path = cpu_python_path(os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    print(f"[models] {' '.join(arguments)}", file=sys.stderr, flush=True)
    status = subprocess.run([sys.executable, "-m", *arguments], env={**os.environ, "PYTHONPATH": path}, check=False)
    if status.returncode:
        raise SystemExit(status.returncode)


def write_settings(work: Path, recipe: str, model: Path) -> Path:
    """Writes the configuration of one annealing run: the recipe's settings with the folders of this work."""
    settings = recipe_settings(recipe) | {
        "model": str(model),
        "corpus": [str(work / "rows" / f"{recipe}.parquet")],
        "output": str(work / recipe),
    }
    path = work / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def make_model(name: str, work: Path, out: Path) -> None:
    """Makes a model of `MODELS` in `work` and puts its checkpoint at `out`."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "scratch"
    run_program("sampleworld.rows", "--out", str(work / "rows"), "--recipes", *MODELS[name])
    if not (model / "processor_config.json").exists():
        run_program("training.scratch", "--texts", str(work / "rows" / "texts.txt"), "--out", str(model))
    for recipe in MODELS[name]:
        started = time.monotonic()
        run_program("training.annealing", "--config", str(write_settings(work, recipe, model)))
        model = work / recipe / "model"
        print(f"[models] {recipe}: {time.monotonic() - started:,.0f} s", file=sys.stderr, flush=True)
    install(model, out)


def install(model: Path, out: Path) -> None:
    """Puts what serving needs of a checkpoint at `out`, in place of what was there."""
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        if path.suffix in {".json", ".jinja", ".safetensors"}:
            (fresh / path.name).write_bytes(path.read_bytes())
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS), help="which model to make")
    parser.add_argument("--work", type=Path, default=Path(".local/models"), help="folder of the work")
    parser.add_argument("--out", type=Path, help="folder of the finished checkpoint (default: the bundled one)")
    arguments = parser.parse_args()
    make_model(arguments.model, arguments.work, arguments.out or HERE / arguments.model)


if __name__ == "__main__":
    main()
