"""A training program for the tests of the flow `train`: the contract of `training.programs` without a model.

It takes `num_steps` steps of `step_seconds`, logs each to metrics.jsonl, writes a checkpoint when it is told to stop
and goes on from it. Faults are settings: `checkpoint_seconds`, `ignore_signals`, `crash_at` (once), `child_seconds`.
Written to be copied as `training/annealing.py`, `training/bpo.py` and `training/evaluate.py` of a project folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

PATHS = {"model", "corpus", "url", "benchmarks", "output"}
FAULTS = {"checkpoint_seconds", "ignore_signals", "crash_at", "child_seconds"}
SETTINGS = PATHS | FAULTS | {"num_steps", "step_seconds"}


def save(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"step": step}), encoding="utf-8")


def newest(output: Path) -> int:
    steps = [int(path.parent.name.split("-")[1]) for path in output.glob("checkpoint-*/trainer_state.json")]
    return max(steps, default=0)


def main() -> None:
    config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8"))
    wrong = sorted(set(config) - SETTINGS)
    if wrong:
        print(f"error: {wrong[0]}: Extra inputs are not permitted", file=sys.stderr)
        sys.exit(2)
    if "--check" in sys.argv:
        return
    output, num_steps = Path(config["output"]), config.get("num_steps", 3)
    if (output / "result.json").exists():
        return
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True
        print("stopping", file=sys.stderr, flush=True)

    if config.get("ignore_signals"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, stop)
    if config.get("child_seconds"):
        # As torchrun's workers: in a session of its own, and not told to end by anybody.
        child = subprocess.Popen(["sleep", str(config["child_seconds"])], start_new_session=True)
        (output / "child.pid").write_text(str(child.pid), encoding="utf-8")
    began = newest(output)
    print(f"beginning after step {began}", flush=True)
    for step in range(began + 1, num_steps + 1):
        time.sleep(config.get("step_seconds", 0.05))
        with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            line = {"step": step, "num_steps": num_steps, "seconds": 0.1 * step, "loss": 1 / step, "reward": 0.5}
            file.write(json.dumps(line) + "\n")
        if config.get("crash_at") == step and not (output / "crashed").exists():
            save(output, step)
            (output / "crashed").touch()
            raise RuntimeError("the accelerator fell off the bus")
        if stopping:
            time.sleep(config.get("checkpoint_seconds", 0))
            save(output, step)
            print("error: stopped by a signal after writing a checkpoint", file=sys.stderr)
            sys.exit(75)
    (output / "model").mkdir(exist_ok=True)
    program = Path(__file__).stem
    if program == "evaluate":
        (output / "table.md").write_text("| mode | accuracy |\n|---|---|\n| auto | 0.75 |\n", encoding="utf-8")
    result = {"program": program, "steps": num_steps, "began": began, "loss": 1 / num_steps, "model": "model"}
    seen = {"config": config, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    (output / "result.json").write_text(json.dumps({**result, **seen}), encoding="utf-8")


if __name__ == "__main__":
    main()
