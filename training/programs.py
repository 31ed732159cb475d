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
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from corpus.storage import append_json_line, read_json, storage_errors, write_text
from schemas.errors import BimodeError, ConfigError, Interrupted, StorageError, TrainingError
from schemas.settings import read_yaml, wrong_settings


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
        return config_type.model_validate(read_yaml(path))
    except ValidationError as error:
        raise wrong_settings(path, error) from None  # its own message shows values


FREE_SETTINGS = frozenset({"output", "log_steps", "save_steps"})
"""What may change when a run goes on: it leaves the result as it is."""


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
        found: Result | None = read_json(self.path / "result.json")
        return found

    def begin(self, config: ProgramConfig) -> Result | None:
        """Takes the folder for a run, and returns the result if that very run is finished there.

        Raises ConfigError: a run with other settings lies there. Going on from its checkpoints would follow neither
        its settings nor the new ones. StorageError: the folder cannot be written.
        """
        settings = json.loads(config.model_dump_json())
        path = self.path / "config.json"
        before = read_json(path)
        if before is not None:
            changed = [
                name for name in sorted({*settings, *before} - FREE_SETTINGS) if settings.get(name) != before.get(name)
            ]
            if changed:
                listed = ", ".join(f"{name} {before.get(name)!r} -> {settings.get(name)!r}" for name in changed)
                raise ConfigError(f"{self.path} holds a run with other settings ({listed}): choose another output")
            return self.result()
        with storage_errors(self.path, "write"):
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return None

    def finish(self, result: Result) -> Result:
        """Writes result.json, the last file of a run; of several processes the first one does. Raises StorageError."""
        if int(os.environ.get("RANK", "0")) == 0:
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
        values = {name: _finite(value) for name, value in (logs or {}).items()}
        line = {"step": state.global_step, "num_steps": state.max_steps, "seconds": seconds, **values}
        append_json_line(self.path, line)
        loss = (logs or {}).get("loss")
        print(f"step {state.global_step}/{state.max_steps} loss {loss} {seconds:.0f} s", file=sys.stderr, flush=True)
        if isinstance(loss, float) and not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: lower learning_rate or check the corpus"
            )


class StopOnDivergence(TrainerCallback):
    """Ends the run before a gradient that is not finite reaches the weights, so that no checkpoint ever holds one.

    A loss that is not finite always has such a gradient. Logs show it only every `log_steps`, after checkpoints.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise TrainingError(
                f"the loss is no longer finite at step {state.global_step + 1}; the newest checkpoint is whole. Begin "
                "again in another folder with a lower learning_rate, or go on from here once the corpus is mended"
            )


def _finite(value: Any) -> Any:
    """Returns the value, or None in place of a number that JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which SIGTERM or SIGINT came, with a checkpoint of it."""

    def __init__(self) -> None:
        self.received: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.distributed.is_initialized():  # all stop at the same step, whichever was asked first
            asked = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.received = int(asked) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals while the block runs; raises Interrupted at its end if one came."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.received is not None:
                raise Interrupted("stopped at once by a second signal; what was kept before is whole")
            self.received = number
            print("stopping: what is under way ends, and what was done is kept", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received is not None:
            raise Interrupted("stopped by a signal; what was done is kept: run it again to go on")


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns what safetensors and torch raise when a checkpoint cannot be written into StorageError.

    They wrap the system's error in types of their own, which are no OSError; torch in a bare RuntimeError, whose text
    depends on where in the file the disk was full. Raises StorageError.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        frames = [(Path(frame.filename).parts[-2:], frame.name) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SafetensorError) or (("torch", "serialization.py"), "save") in frames:
            raise StorageError(
                f"cannot write a checkpoint in {folder}: {str(error).splitlines()[0]}. If the disk is full, free some "
                "space and run again: it goes on from the checkpoint before"
            ) from error
        raise


def train_to_end(trainer: Any, folder: RunFolder) -> Any:
    """Trains, resuming from the newest whole checkpoint, saves `model/` and returns the trainer's output.

    Raises TrainingError: a loss that is not finite. StorageError: the disk fails, e.g. is full while a checkpoint is
    written; the one before it stays whole. Interrupted: a signal asked to stop.
    """
    stop = StopOnSignal()
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has it all, and MetricsFile prints a line
    trainer.add_callback(MetricsFile(folder.metrics))
    trainer.add_callback(StopOnDivergence())
    trainer.add_callback(stop)
    with stop.listening(), storage_errors(folder.path, "write a checkpoint in"), full_disk_named(folder.path):
        output = trainer.train(resume_from_checkpoint=folder.newest_checkpoint())
        if stop.received is None:
            trainer.save_model(str(folder.model))
        elif torch.distributed.is_initialized():
            torch.distributed.barrier()  # a launcher ends the others as soon as one is gone
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
    parser.add_argument("--check", action="store_true", help="only check the settings")
    parsed = parser.parse_args(arguments)
    try:
        config = load_program_config(parsed.config, config_type)
        if parsed.check:
            return
        result = program(config)
    except BimodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result, indent=2))
