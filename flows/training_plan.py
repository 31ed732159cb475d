"""What one training run consists of: which programs, on which corpus version, into which folders, by which commands.

A run's folder is named by a digest of all that shapes its result: the corpus digest, the checkpoint it starts from, its
section, the number of processes, and the local files that the section names. A program starts from the folder of the
one before, so digests are chained: a changed `evaluate` section evaluates again and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from corpus.keeping import Pin, pin_version
from corpus.places import is_address
from corpus.remote import local_version
from corpus.storage import read_json, storage_errors, write_text
from corpus.versions import Manifest, load_manifest
from flows.stack import project_folder
from flows.supervisor import MARK
from flows.training_process import Program
from schemas.errors import ConfigError
from schemas.training_config import ProgramName, Settings, TrainingConfig, load_training_config
from teacher.serving import PYTHON_VARIABLE, cpu_python_path

CONFIG_FILE = "program.yaml"
RESULT_FILE = "result.json"
TRAINED_FILE = "trained.json"
"""In the output folder: the version that all programs were last run on."""

# Read from a file, as importing torch takes seconds.
_IS_CPU_TORCH = """
import runpy
from importlib.util import find_spec
from pathlib import Path
spec = find_spec("torch")
version = runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec and spec.origin else {"cuda": ""}
print("cpu" if version.get("cuda") is None and version.get("hip") is None else "gpu")
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One program of a plan. settings: its whole configuration."""

    program: ProgramName
    folder: Path
    settings: Settings

    def result(self) -> dict[str, Any] | None:
        """Returns what the finished program left, or None. Raises StorageError."""
        found: dict[str, Any] | None = read_json(self.folder / RESULT_FILE)
        return found

    @property
    def state(self) -> str:
        if self.result() is not None:
            return "finished"
        return "begun before" if (self.folder / CONFIG_FILE).exists() else "new"


@dataclass(frozen=True, slots=True)
class Trained:
    """The version that was last trained on, by all programs."""

    name: str
    version: str
    digest: str
    recipe: str
    num_rows: int
    finished: str


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a run does. steps: all programs that have a section, in order. selected: those that this run is to run."""

    config: TrainingConfig
    corpus: Path
    manifest: Manifest
    steps: tuple[Step, ...]
    selected: tuple[Step, ...]
    trained: Trained | None
    home: Path = field(default_factory=project_folder)

    @property
    def num_new_rows(self) -> int:
        """Rows since the version last trained on. Of another corpus or another recipe every row is new."""
        before, now = self.trained, self.manifest
        if before is None or (before.name, before.recipe) != (now.name, now.recipe):
            return now.num_rows
        return 0 if before.digest == now.digest else max(0, now.num_rows - before.num_rows)

    def to_record(self) -> dict[str, Any]:
        return {
            "corpus": str(self.corpus),
            "version": self.manifest.version,
            "rows": self.manifest.num_rows,
            "new_rows": self.num_new_rows,
            "model": self.config.model,
            "programs": [
                {"program": step.program, "folder": str(step.folder), "state": step.state} for step in self.selected
            ],
        }

    def record_trained(self) -> None:
        """Notes that every program has run on this version. Raises StorageError."""
        manifest = self.manifest
        record = {
            "name": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "recipe": manifest.recipe,
            "num_rows": manifest.num_rows,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(Path(self.config.output) / TRAINED_FILE, json.dumps(record, indent=2) + "\n")


def keep_version(plan: TrainingPlan) -> None:
    """Pins the version for each program that has not finished, until its result is there.

    So the removal of old versions leaves it alone, also while the run is stopped. Raises StorageError, ConfigError: it
    cannot be pinned, as the corpus is read-only here or the version lies by itself.
    """
    since = datetime.now(UTC).isoformat(timespec="seconds")
    for step in plan.selected:
        if step.result() is None:
            with storage_errors(step.folder.parent, "make"):
                step.folder.parent.mkdir(parents=True, exist_ok=True)
            why = f"{step.program} of {plan.config.name} trains on it"
            until = str((step.folder / RESULT_FILE).resolve())
            pin = Pin(plan.corpus.name, f"train-{step.folder.name}", why, since, until)
            pin_version(plan.corpus.parent, pin)


def load_training(config: str) -> TrainingConfig:
    """Returns the training configuration of a file, its own addresses made absolute from the project folder.

    Paths inside the sections stay relative: the programs run in the project folder. Raises ConfigError.
    """
    home = project_folder()
    path = Path(config)
    loaded = load_training_config(path if path.is_absolute() or path.exists() else home / path)
    model = str(home / loaded.model) if (home / loaded.model).exists() else loaded.model
    corpus = loaded.corpus if is_address(loaded.corpus) else str(home / loaded.corpus)
    return loaded.model_copy(update={"model": model, "corpus": corpus, "output": str(home / loaded.output)})


def plan_training(
    config: TrainingConfig, *, only: ProgramName | None = None, corpus: str | None = None
) -> TrainingPlan:
    """Returns what a run with this configuration does. Touches nothing, but for a version at an address: it is fetched.

    only: run this program alone; those before it must have finished. corpus: instead of the configured one.

    Raises ConfigError: there is no finished corpus version, or `only` cannot run. CorpusError: its manifest is damaged.
    """
    chosen = corpus or config.corpus
    is_here = is_address(chosen) or Path(chosen).exists()
    version = local_version(chosen if is_here else project_folder() / chosen)
    manifest = load_manifest(version)
    steps = tuple(_steps(config, version, manifest))
    selected = steps if only is None else tuple(step for step in steps if step.program == only)
    if not selected:
        raise ConfigError(f"the configuration has no section `{only}`")
    for step in steps[: steps.index(selected[0])]:
        if selected[0].settings.get("model") == str(step.folder / "model") and step.result() is None:
            raise ConfigError(
                f"{step.program} has not finished on corpus {manifest.version} ({step.folder}): run it first"
            )
    return TrainingPlan(config, version, manifest, steps, selected, _last_trained(Path(config.output)))


def _steps(config: TrainingConfig, version: Path, manifest: Manifest) -> Iterator[Step]:
    model = config.model
    made_from: list[Any] = [model, _stamps(model)]
    for program in config.programs:
        section = dict(config.section(program) or {})
        settings: Settings = {"model": model}
        if program == "evaluate" and "url" in section:
            settings = {}  # an endpoint serves what it serves; the section names it
        elif program != "evaluate":
            settings["corpus"] = [str(version / "data" / "*" / "*.parquet")]
            made_from += [manifest.digest, config.launch.num_processes]
        # YAML and JSON agree on the order of keys, so that a section written in another order is the same.
        made_from = [program, *made_from, section, list(_named_files(section))]
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:12]
        folder = Path(config.output) / f"{program}-{digest}"
        yield Step(program, folder, {**settings, **section, "output": str(folder)})
        model = str(folder / "model")
        made_from = [digest]


def _named_files(value: object) -> Iterator[list[Any]]:
    """Yields size and time of every local file that a section names, wherever in it."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _named_files(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named_files(item)
    elif isinstance(value, str) and (stamps := _stamps(value)):
        yield stamps


def _stamps(name: str) -> list[Any]:
    """Returns name, size and time of each file of a local path; none for what is no path, e.g. a name on the hub."""
    path = project_folder() / name
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        return [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    except (OSError, ValueError):
        return []


def _last_trained(output: Path) -> Trained | None:
    path = output / TRAINED_FILE
    if not path.exists():
        return None
    with storage_errors(path, "read"):
        text = path.read_text(encoding="utf-8")
    try:
        return Trained(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it, and every row counts as new") from error


def program_of(step: Step, plan: TrainingPlan) -> Program:
    """Writes a step's configuration and returns the program that runs it. Raises ConfigError, StorageError."""
    path = step.folder / CONFIG_FILE
    write_text(path, yaml.safe_dump(step.settings, sort_keys=False, allow_unicode=True))
    config = plan.config
    python = gpu_python(config, plan.home)
    return Program(
        name=step.program,
        command=tuple(launch_command(step.program, config, python=python, path=path)),
        folder=step.folder,
        cwd=plan.home,
        environment=program_environment(config, python),
        stop_seconds=config.stop_seconds,
    )


def check_settings(step: Step, plan: TrainingPlan) -> None:
    """Asks a program whether it understands its settings, without running it. Raises ConfigError: in its own words."""
    program = program_of(step, plan)
    command = [program.command[0], "-m", f"training.{step.program}", "--config", str(step.folder / CONFIG_FILE)]
    checked = subprocess.run(
        [*command, "--check"],
        cwd=program.cwd,
        env=dict(program.environment),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if checked.returncode == ConfigError.exit_code:
        said = checked.stderr[checked.stderr.rfind("error: ") :].removeprefix("error: ").strip()
        raise ConfigError(f"{step.program}: {said}")


def launch_command(program: ProgramName, config: TrainingConfig, *, python: str, path: Path) -> list[str]:
    """Returns the argument list that starts a program. Evaluation is always one plain process."""
    module = ["-m", f"training.{program}", "--config", str(path)]
    launch = config.launch
    if launch.kind == "python" or program == "evaluate":
        return [python, *module]
    if launch.kind == "torchrun":
        processes = ["--standalone", "--nproc-per-node", str(launch.num_processes)]
        return [python, "-m", "torch.distributed.run", *processes, *launch.arguments, *module]
    return [
        *(python, "-m", "accelerate.commands.launch", "--num_processes", str(launch.num_processes)),
        *(*launch.arguments, *module),
    ]


def gpu_python(config: TrainingConfig, home: Path) -> str:
    """Returns the Python of the GPU-side environment. Raises ConfigError: there is none."""
    beside = home / ".venv-gpu" / "bin" / "python"
    python = config.launch.python or os.environ.get(PYTHON_VARIABLE) or (str(beside) if beside.exists() else None)
    if python is None:
        raise ConfigError(
            f"no GPU-side environment: run `make env-gpu`, or name its Python in {PYTHON_VARIABLE} or launch.python"
        )
    return python


def program_environment(config: TrainingConfig, python: str) -> dict[str, str]:
    """Returns the environment of a program: ours without Prefect's settings, which hold keys and name this flow run.

    Raises ConfigError: the Python cannot be run.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != MARK}
    environment = {
        # Progress bars of downloads and loading do not belong in a log.
        "TQDM_MININTERVAL": "30",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # On a CPU that other work shares, threads that wait by spinning take the time that the working one needs.
        "OMP_WAIT_POLICY": "PASSIVE",
        # torchrun gives its workers 30 seconds by default.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(config.stop_seconds)),
        **inherited,
        "PYTHONUNBUFFERED": "1",
    }
    if Path(config.model).is_dir():
        # Everything is in the folder; looking for it elsewhere only waits for timeouts without a network.
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if _has_cpu_torch(python):
        environment["PYTHONPATH"] = cpu_python_path(environment.get("PYTHONPATH"))
    return environment


def _has_cpu_torch(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", _IS_CPU_TORCH], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"the Python {python!r} cannot be run ({error}); set {PYTHON_VARIABLE}") from error
    return done.stdout.strip() == "cpu"


def render_plan(plan: TrainingPlan) -> str:
    """Returns the plan as text for a person."""
    manifest = plan.manifest
    lines = [
        f"corpus    {plan.corpus} ({manifest.num_rows:,} rows, {manifest.num_think:,} of them thinking)",
        f"new rows  {plan.num_new_rows:,}; a new version starts training from {plan.config.trigger.min_new_rows:,} on",
        f"model     {plan.config.model}",
    ]
    lines += [f"{step.program:9} {step.state}: {step.folder}" for step in plan.selected]
    return "\n".join(lines)
