"""The contract that every training program keeps with its caller: files alone, so that it runs without Prefect.

A YAML file goes in. While the program runs, `checkpoint-*` folders and one JSON line per log in `metrics.jsonl` come
out, at the end the trained model in `model/` and, last of all, `result.json`, whose presence means done. Started again,
a program goes on from its newest whole checkpoint; when `result.json` is there it does nothing.

SIGTERM and SIGINT ask it to stop: it ends its step, writes a checkpoint and exits with the status of `Interrupted`. A
second one ends it at once. Errors meant for the user are printed without a traceback and exit with their status.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState

from corpus.storage import storage_errors, write_text
from schemas.errors import BimodeError, ConfigError, Interrupted, TrainingError


class ProgramConfig(BaseModel):
    """What every program's configuration has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field(description="Folder of everything this run writes.")


ConfigT = TypeVar("ConfigT", bound=ProgramConfig)
Result = dict[str, Any]
"""The content of result.json."""


def load_program_config(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Returns the configuration in a YAML file. Raises ConfigError: naming each wrong setting and the value seen."""
    try:
        return config_type.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']} (got {e['input']!r:.80})" for e in error.errors()
        ]
        raise ConfigError(f"{path} has {error.error_count()} problem(s):\n" + "\n".join(lines)) from error


class RunFolder:
    """The files of one run of one program."""

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def result(self) -> Result | None:
        """Returns what a finished run left, or None. Raises StorageError: the file cannot be read."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        with storage_errors(path, "read"):
            found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found

    def finish(self, result: Result) -> Result:
        """Writes result.json, the last file of a run. Raises StorageError."""
        write_text(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        return result

    def newest_checkpoint(self) -> str | None:
        """Returns the newest whole checkpoint, or None. The trainer's state is the last file of each."""
        whole = [path.parent for path in self.path.glob("checkpoint-*/trainer_state.json")]
        return str(max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))) if whole else None


class MetricsFile(TrainerCallback):
    """Appends every log of the trainer to metrics.jsonl and ends the run when the loss is not finite.

    A run that goes on from a checkpoint logs the steps since then again: for each step, the last line counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        seconds = round(time.monotonic() - self.started, 3)
        line = {"step": state.global_step, "num_steps": state.max_steps, "seconds": seconds, **(logs or {})}
        with storage_errors(self.path, "write"), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        loss = line.get("loss")
        print(f"step {state.global_step}/{state.max_steps} loss {loss} {seconds:.0f} s", file=sys.stderr, flush=True)
        if isinstance(loss, float) and not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: lower learning_rate or check the corpus"
            )


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which SIGTERM or SIGINT came, with a checkpoint of it."""

    def __init__(self) -> None:
        self.received: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals while the block runs; raises Interrupted at its end if one came."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.received is not None:
                raise Interrupted("stopped at once by a second signal; the newest checkpoint is kept")
            self.received = number
            print("stopping: this step ends and a checkpoint is written", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            raise Interrupted("stopped by a signal after writing a checkpoint; run it again to go on")


def train_to_end(trainer: Any, folder: RunFolder) -> Any:
    """Trains, resuming from the newest whole checkpoint, saves `model/` and returns the trainer's output.

    Raises TrainingError: a loss that is not finite. StorageError: the disk fails, e.g. is full while a checkpoint is
    written; the one before it stays whole. Interrupted: a signal asked to stop.
    """
    stop = StopOnSignal()
    trainer.add_callback(MetricsFile(folder.metrics))
    trainer.add_callback(stop)
    with stop.listening(), storage_errors(folder.path, "write a checkpoint in"):
        output = trainer.train(resume_from_checkpoint=folder.newest_checkpoint())
        if stop.received is None:
            trainer.save_model(str(folder.model))
    return output


def run_program(
    description: str | None,
    config_type: type[ConfigT],
    program: Callable[[ConfigT], Result],
    arguments: list[str] | None = None,
) -> None:
    """The `main` of a program: `--config FILE`, runs it, prints its result as JSON, exits with its status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = "\n".join(f"  {name}: {field.description}" for name, field in config_type.model_fields.items())
    parser.epilog = f"settings of the YAML file:\n{settings}"
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings below")
    parsed = parser.parse_args(arguments)
    try:
        result = program(load_program_config(parsed.config, config_type))
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result, indent=2))
