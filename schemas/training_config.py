"""The training configuration: one YAML file for annealing, BPO and evaluation of one corpus.

The sections `annealing`, `bpo` and `evaluate` are handed to `training.annealing`, `training.bpo` and
`training.evaluate` as they are; those programs describe and check their own settings (`python -m training.bpo --help`).
Their environment alone has torch, so nothing here looks inside a section.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from schemas.settings import read_yaml, wrong_settings

ProgramName = Literal["annealing", "bpo", "evaluate"]
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)
"""The training programs in the order in which they run."""

Positive = Annotated[int, Field(ge=1)]
Settings = dict[str, Any]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LaunchConfig(_Section):
    """How annealing and BPO are started. Evaluation is always one plain process."""

    kind: Literal["python", "torchrun", "accelerate"] = Field("python", description="What starts the processes.")
    num_processes: Positive = Field(1, description="Processes on this machine, one for each GPU.")
    python: str | None = Field(None, description="Python of the GPU-side environment; BIMODE_GPU_PYTHON by default.")
    arguments: list[str] = Field(
        default_factory=list,
        description="Further arguments of torchrun or accelerate, e.g. [--config_file, fsdp.yaml].",
    )

    @model_validator(mode="after")
    def _python_is_one_process(self) -> LaunchConfig:
        if self.kind == "python" and (self.num_processes > 1 or self.arguments):
            raise ValueError("kind: python starts one process without arguments; choose torchrun or accelerate")
        return self


class TriggerConfig(_Section):
    """When a new corpus version starts training by itself. Runs that a person starts wait for nothing."""

    min_new_rows: int = Field(1000, ge=0, description="Rows more than the version last trained on.")
    approval: bool = Field(False, description="Ask a person in Prefect's UI before any GPU is taken.")
    approval_timeout_seconds: Positive = Field(7 * 24 * 3600, description="A question unanswered for so long fails.")


class TrainingConfig(_Section):
    """Everything the flow `train` needs. A program runs if its section is there, even an empty one."""

    name: str = Field("model", description="Name of what is trained.", pattern=r"^[\w.-]+$")
    model: str = Field(description="Folder or hub name of the base model.")
    corpus: str = Field(description="Folder of a corpus, whose newest version counts, or of one of its versions.")
    output: str = Field("runs/training", description="Folder of all runs; each is named by what it was made from.")
    annealing: Settings | None = Field(None, description="Settings of `python -m training.annealing`.")
    bpo: Settings | None = Field(None, description="Settings of `python -m training.bpo`.")
    evaluate: Settings | None = Field(None, description="Settings of `python -m training.evaluate`.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    trigger: TriggerConfig = Field(default_factory=TriggerConfig)
    release_teacher: bool = Field(
        True, description="Stop the teacher that `bimode up` started, where training needs its GPUs and no run asks it."
    )
    restart_teacher: bool = Field(True, description="Start that teacher again when nobody else waits for its GPUs.")
    stop_seconds: float = Field(300.0, gt=0, description="Time for a checkpoint when a run is cancelled.")
    retries: int = Field(1, ge=0, description="How often a crashed program is started again, from its checkpoint.")
    retry_delay_seconds: float = Field(10.0, ge=0, description="Wait before that.")

    @field_validator(*PROGRAMS, mode="before")
    @classmethod
    def _an_empty_section_is_a_section(cls, section: Any) -> Any:
        return {} if section is None else section  # `annealing:` with nothing behind it; defaults do not come here

    @field_validator(*PROGRAMS)
    @classmethod
    def _output_is_ours(cls, section: Settings) -> Settings:
        if "output" in section:
            raise ValueError("output of a program follows from what it is made from; set the output above the sections")
        return section

    @model_validator(mode="after")
    def _something_is_to_do(self) -> TrainingConfig:
        if not self.programs:
            raise ValueError(f"none of the sections {', '.join(PROGRAMS)} is there")
        return self

    @property
    def programs(self) -> tuple[ProgramName, ...]:
        """The programs that have a section, in order."""
        return tuple(name for name in PROGRAMS if self.section(name) is not None)

    def section(self, program: ProgramName) -> Settings | None:
        sections = {"annealing": self.annealing, "bpo": self.bpo, "evaluate": self.evaluate}
        return sections[program]


def load_training_config(path: str | Path) -> TrainingConfig:
    """Returns the configuration in a YAML file; relative paths in it stay relative.

    Raises ConfigError: with one line per problem, naming the setting and the value seen.
    """
    path = Path(path)
    try:
        return TrainingConfig.model_validate(read_yaml(path, "the training configuration "))
    except ValidationError as error:
        raise wrong_settings(path, error) from None  # its own message shows values
