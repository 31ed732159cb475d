"""The run configuration: one YAML file, one strict model. Its descriptions are the documentation of each setting."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import ConfigError
from schemas.samples import AnswerType, Kind, Topic
from schemas.settings import read_yaml, wrong_settings

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Section):
    """Which column of a source holds what. A dotted path reaches into nested fields ("meta.answer")."""

    question: str = Field("question", description="Column of the question text.")
    images: str | None = Field(
        None, description="Column of one image or a list of them: a path, bytes, a data URL or an Image feature."
    )
    choices: str | None = Field(None, description="Column of the list of options.")
    answer: str | None = Field(None, description="Column of the reference answer.")
    id: str | None = Field(None, description="Column of the row's own id; two rows may not share one.")
    topic: str | None = Field(None, description="Column of the topic, one of the paper's nine.")
    kind: str | None = Field(None, description="Column that says objective or subjective.")
    answer_type: str | None = Field(None, description="Column of the answer type.")
    licence: str | None = Field(None, description="Column of the row's licence.")
    conversations: str | None = Field(
        None, description="Column of LLaVA or ShareGPT turns; the first question and reply become question and answer."
    )


class SourceConfig(_Section):
    """One set of raw questions."""

    name: str = Field(description="Name of the source, unique in the run, kept on every row.", pattern=r"^[\w.-]+$")
    format: Literal["parquet", "jsonl", "datasets", "conversations"] = Field(description="How it is stored.")
    path: str = Field(description="File, folder, glob, fsspec address, or for `datasets` a saved folder or hub name.")
    split: str = Field("train", description="Split of a `datasets` source.")
    subset: str | None = Field(None, description="Configuration name of a `datasets` source.")
    image_root: str | None = Field(None, description="Folder that image paths are relative to; none may leave it.")
    columns: Columns = Field(default_factory=Columns, description="The mapping of columns.")
    topic: Topic | None = Field(None, description="Topic of every row that names none.")
    kind: Kind | None = Field(None, description="Kind of every row that names none.")
    answer_type: AnswerType | None = Field(None, description="Answer type of every row that names none.")
    answer_pattern: str | None = Field(
        None,
        description="Regular expression whose group 1 is the final answer in the answer column (GSM8K: '#### (.+)').",
    )
    licence: str | None = Field(None, description="Licence of every row that names none.")
    max_rows: Positive | None = Field(None, description="Read only the first so many rows.")


class ImageLimits(_Section):
    """Bounds checked before an image is decoded."""

    max_bytes: Positive = Field(32 * 2**20, description="Largest encoded size in bytes.")
    max_pixels: Positive = Field(40_000_000, description="Largest width times height.")
    min_side: Positive = Field(2, description="Smallest width and height in pixels.")


class EndpointConfig(_Section):
    """One model behind one or more OpenAI-compatible addresses, and how to ask it."""

    model: str = Field("Qwen/Qwen2.5-VL-32B-Instruct", description="Name of the served model.")
    url: str = Field("http://127.0.0.1:8000/v1", description="Address of the API, ending in /v1.")
    more_urls: list[str] = Field(default_factory=list, description="Further addresses that serve the same model.")
    urls_file: str | None = Field(
        None, description="File with further addresses, one a line; looked at again every few seconds during a run."
    )
    revision: str = Field("", description="Revision of the weights; part of the key of every stored reply.")
    api_key_env: str = Field(
        "BIMODE_API_KEY",
        description="Name of the environment variable that holds the key, if one is needed.",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="Sent with every call, e.g. {chat_template_kwargs: {thinking_mode: short}}."
    )
    concurrency: Positive = Field(
        4096, description="Most sequences in flight at one address; how many there are is found from what it says."
    )
    timeout_seconds: float = Field(600.0, gt=0, description="Longest wait for one call.")
    max_retries: int = Field(6, ge=0, description="Retries of a call that failed for a passing reason.")
    unreachable_seconds: float = Field(120.0, ge=0, description="Give up when nothing has answered for so long.")
    images_as: Literal["auto", "data_url", "file_url"] = Field(
        "auto", description="How images travel: `auto` is by name to a server that was started here, else as bytes."
    )
    max_image_pixels: Positive = Field(1_003_520, description="Images are reduced to so many pixels (1280 * 28 * 28).")


class ServeConfig(_Section):
    """How to start vLLM on the worker when no endpoint is given."""

    model_path: str | None = Field(
        None, description="Folder or hub name of the weights; the teacher's model by default."
    )
    python: str | None = Field(
        None, description="Python of the environment that has vLLM; BIMODE_GPU_PYTHON by default."
    )
    port: int = Field(8000, ge=1, le=65535, description="Port on the loopback interface.")
    max_model_len: Positive | None = Field(
        None, description="Longest sequence in tokens; by default what the model allows and the GPU's memory holds."
    )
    tensor_parallel_size: Positive | None = Field(
        None, description="GPUs that share one copy of the model; by default the fewest that leave room for a batch."
    )
    data_parallel_size: Positive | None = Field(
        None, description="Copies of the model side by side; by default as many as the GPUs have room for."
    )
    gpu_memory_utilization: float = Field(
        0.92, gt=0, le=1, description="Share of each GPU's memory for weights and key-value cache."
    )
    max_num_seqs: Positive | None = Field(
        None, description="Sequences in one step of one copy; vLLM's own number for throughput by default."
    )
    extra_args: list[str] = Field(default_factory=list, description="Further arguments of the vLLM server.")
    start_timeout_seconds: float = Field(900.0, gt=0, description="Longest wait until the first token.")
    max_restarts: int = Field(
        10, ge=0, description="Times that a server which died during a run is started again within the window below."
    )
    restart_window_minutes: float = Field(60.0, gt=0, description="Window in which restarts are counted.")
    log_megabytes: Positive = Field(64, description="Size at which the server's log is continued in a new file.")
    num_old_logs: Positive = Field(
        10, description="Older log files kept beside the log; those of servers that died are kept besides."
    )


class DuplicatesConfig(_Section):
    """What counts as a duplicate. The unit is (images, question)."""

    exact: bool = Field(True, description="Drop rows whose normalised images, question and choices are equal.")
    near: bool = Field(True, description="Drop near duplicates found by MinHash and verified by Jaccard.")
    images: Literal["near", "bytes"] = Field(
        "near",
        description="Which images are one: `near` decodes each once and finds equal pixels and near copies "
        "(recompressed, scaled); `bytes` compares stored files only.",
    )
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of word shingles from which on rows are alike."
    )
    num_permutations: int = Field(128, ge=2, description="MinHash permutations.")
    shingle_words: Positive = Field(
        3, description="Words in a shingle; questions with fewer words are matched exactly."
    )
    seed: int = Field(1, description="Seed of the permutations.")


class DecontaminationConfig(_Section):
    """Rows that leak an evaluation benchmark go, wherever benchmarks are named."""

    benchmarks: list[SourceConfig] = Field(
        default_factory=list, description="The benchmarks, each described like a source; their names must differ."
    )
    max_ngram: Positive = Field(13, description="Words in a row that a row may not share with a benchmark question.")
    min_ngram: Positive = Field(
        8, description="Benchmark questions of fewer words leak only as a whole, together with their image."
    )
    max_benchmark_questions: Positive = Field(
        10, description="Words in an n-gram that more benchmark questions hold are boilerplate and no evidence."
    )
    images: bool = Field(True, description="A shared image is a leak by itself, whatever is asked of it.")
    max_pairs: Positive = Field(1000, description="Pairs of row and benchmark question that the report keeps of each.")

    @model_validator(mode="after")
    def _bounds_and_names_fit(self) -> DecontaminationConfig:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram = {self.min_ngram} must not exceed max_ngram = {self.max_ngram}")
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"benchmark names must be unique, got {names}")
        return self


class RoutingConfig(_Section):
    """Objective or subjective, and the topic, by rule; the teacher is asked only where the rules cannot tell."""

    ask_teacher: bool = Field(
        True, description="Ask the teacher where the rules cannot tell; else subjective and general."
    )


class DifficultyConfig(_Section):
    """The difficulty heuristic for subjective rows."""

    threshold: Share = Field(0.5, description="Rows whose probability of needing reasoning is at least this think.")
    panel: list[EndpointConfig] = Field(
        default_factory=list,
        description="Further teachers that vote beside the main one on every open question, each described like it.",
    )
    vote: Literal["majority", "unanimous", "any", "mean"] = Field(
        "majority",
        description="Which probability of the panel is held against the threshold: the median (so the majority of "
        "votes; a tie goes by the mean of the two in the middle), the lowest (all must say yes), the highest (one is "
        "enough) or the mean. Verdicts that are missing do not count.",
    )
    quorum: Positive | None = Field(
        None,
        description="Fewest verdicts that settle a row; by default more than half of all teachers. A call that fails "
        "leaves a verdict out; a teacher that cannot be reached at all stops the run.",
    )

    @model_validator(mode="after")
    def _quorum_can_be_met(self) -> DifficultyConfig:
        num_teachers = 1 + len(self.panel)
        if self.quorum is not None and self.quorum > num_teachers:
            raise ValueError(f"quorum = {self.quorum}, but only {num_teachers} teacher(s) vote")
        return self


class PerformanceConfig(_Section):
    """The performance heuristic for objective rows: reasoning means that all samples are scored and wrong."""

    num_samples: Positive = Field(8, description="Samples per question; the paper's N.")
    waves: Literal["auto"] | list[Positive] = Field(
        "auto",
        description="Samples asked for at once, one wave after the other until an answer is right: `auto` learns the "
        "cheapest sizes per source while running, a list such as [1, 1, 2, 4] fixes them. No label depends on it.",
    )
    prompt_token_cost: float = Field(
        0.25,
        ge=0,
        description="Cost of a prompt token in completion tokens, for `auto` waves. A quarter is a usual ratio of API "
        "prices; on one's own GPU a prompt is computed at once, so that its tokens cost less than generated ones too.",
    )
    cached_token_cost: float = Field(
        0.1,
        ge=0,
        description="Cost of a prompt token that the endpoint finds in its prefix cache, in completion tokens.",
    )
    exhaustive: bool = Field(False, description="Always draw all samples instead of stopping at the first right one.")
    audit_share: Share = Field(0.02, description="Share of rows, chosen by id, that always draw all samples.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    max_tokens: Positive = Field(1024, description="Longest reply in tokens.")

    @model_validator(mode="after")
    def _waves_end_at_num_samples(self) -> PerformanceConfig:
        if self.waves != "auto" and sum(self.waves) < self.num_samples:
            raise ValueError(f"waves {self.waves} add up to less than num_samples = {self.num_samples}")
        return self


class VerificationConfig(_Section):
    """How replies are compared with references."""

    timeout_seconds: float = Field(
        10.0,
        gt=0,
        description="Processor time after which a comparison is ended and its reply unscored; it may take ten times as "
        "much on the clock.",
    )
    num_workers: Positive = Field(2, description="Worker processes for comparisons that need a parser.")
    relative_tolerance: float = Field(1e-4, ge=0, description="Relative tolerance of numbers.")
    chart_tolerance: float = Field(0.05, ge=0, description="Relaxed accuracy of chart values (ChartQA's 5 %).")
    anls_threshold: Share = Field(0.5, description="ANLS from which on a short text is right (ST-VQA's 0.5).")
    iou_threshold: Share = Field(0.5, description="Intersection over union from which on a box is right.")


class ReasoningConfig(_Section):
    """Chains of thought for the rows that need them, and their checks."""

    num_tries: Positive = Field(4, description="Traces asked for before the row is dropped.")
    ask_for_think_tags: bool = Field(
        True, description="Ask for <think> tags in a system prompt; off for models that think by themselves."
    )
    temperature: float = Field(0.7, ge=0, description="Temperature of the first try; later tries use other seeds.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling.")
    max_tokens: Positive = Field(4096, description="Longest trace with its answer, in tokens.")
    min_words: int = Field(5, ge=0, description="Shortest trace in words.")
    max_words: Positive = Field(3000, description="Longest trace in words.")
    max_repeated_share: Share = Field(0.3, description="Largest share of a trace that repeats its own word 8-grams.")
    forbidden: list[str] = Field(
        default_factory=list, description="Further regular expressions (case ignored) that no trace may contain."
    )
    judge_consistency: bool = Field(
        True, description="For open-ended rows, ask the teacher whether trace and answer agree."
    )
    duplicate_threshold: float = Field(0.9, gt=0, le=1, description="Jaccard from which on two traces are duplicates.")


class DirectConfig(_Section):
    """Direct answers for open-ended rows that have no reference."""

    max_tokens: Positive = Field(1024, description="Longest answer in tokens.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature.")


class CorpusConfig(_Section):
    """The product."""

    folder: str | None = Field(
        None,
        description="Where versions go: a folder (`corpus` in the work folder by default), or an address such as "
        "s3://bucket/corpus, to which each is sent from there.",
    )
    shard_rows: Positive = Field(5000, description="Rows per Parquet file.")
    licence: str = Field("other", description="Licence named in the dataset card.")
    keep_versions: Positive | None = Field(
        None, description="After a new version, remove all but so many; pinned ones and those in use stay."
    )


class ModelPrices(_Section):
    """Prices of one model, in any currency; tokens per million."""

    prompt: float = Field(0.0, ge=0, description="Price of prompt tokens.")
    cached_prompt: float | None = Field(
        None, ge=0, description="Price of prompt tokens that the endpoint had cached; that of the others by default."
    )
    completion: float = Field(0.0, ge=0, description="Price of completion tokens.")
    gpu_hour: float = Field(
        0.0, ge=0, description="Price of an hour of one GPU; counted where vLLM is started by the run itself."
    )


class PricesConfig(ModelPrices):
    """Prices for the cost table, in any currency; tokens per million."""

    models: dict[str, ModelPrices] = Field(
        default_factory=dict, description="Prices of single models by name; those above hold for all others."
    )

    def of(self, model: str) -> ModelPrices:
        """Returns the prices of a model."""
        return self.models.get(model, self)

    @property
    def has_any(self) -> bool:
        """Whether anything has a price at all."""
        listed: list[ModelPrices] = [self, *self.models.values()]
        return any(p.prompt or p.cached_prompt or p.completion or p.gpu_hour for p in listed)


class RayConfig(_Section):
    """A Ray cluster that does the work of the shards. Every node sees the work folder and the sources."""

    address: str = Field(
        "auto",
        description="`auto`: the cluster that this machine is part of (`ray start`); HOST:PORT: that of this head "
        "node; `local`: one that is started on this machine and ends with the run.",
        pattern=r"^(auto|local|[^/:\s]+:\d+)$",
    )
    cpus_per_task: Positive | None = Field(
        None, description="Processors that a task reserves on its node; by default as many as `parallel_shards`."
    )
    max_retries: int = Field(3, ge=0, description="Times that a task is done again whose worker or node was lost.")


class RunConfig(_Section):
    """Everything one curation needs."""

    name: str = Field("corpus", description="Name of the corpus.", pattern=r"^[\w.-]+$")
    workdir: str = Field(
        "runs/corpus", description="Folder of all that must survive: stages, journals, images, versions."
    )
    seed: int = Field(0, description="Seed of everything drawn at random.")
    shard_rows: Positive = Field(1000, description="Rows per shard of work.")
    parallel_shards: Positive = Field(2, description="Shards of one stage in work at once in one process.")
    max_quarantine_share: Share = Field(0.1, description="Stop when more than this share of all rows is quarantined.")
    sources: list[SourceConfig] = Field(description="The raw data.", min_length=1)
    images: ImageLimits = Field(default_factory=ImageLimits)
    teacher: EndpointConfig = Field(default_factory=EndpointConfig, description="Who labels.")
    reasoner: EndpointConfig | None = Field(None, description="Who writes chains of thought; the teacher by default.")
    serve: ServeConfig | None = Field(None, description="Start vLLM for the teacher when its address does not answer.")
    decontamination: DecontaminationConfig = Field(default_factory=DecontaminationConfig)
    duplicates: DuplicatesConfig = Field(default_factory=DuplicatesConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    difficulty: DifficultyConfig = Field(default_factory=DifficultyConfig)
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig)
    verification: VerificationConfig = Field(default_factory=VerificationConfig)
    reasoning: ReasoningConfig = Field(default_factory=ReasoningConfig)
    direct: DirectConfig = Field(default_factory=DirectConfig)
    corpus: CorpusConfig = Field(default_factory=CorpusConfig)
    prices: PricesConfig = Field(default_factory=PricesConfig)
    ray: RayConfig | None = Field(
        None, description="Do the work of the shards on a Ray cluster; by default, threads of the flow's process do."
    )

    @model_validator(mode="after")
    def _workers_reach_the_teacher(self) -> RunConfig:
        if self.ray is not None and self.serve is not None:
            raise ValueError(
                "serve starts vLLM beside the flow, where the workers of a Ray cluster would not find it: start the "
                "teachers by themselves, name them in teacher.url and teacher.more_urls, and leave serve out"
            )
        return self

    @model_validator(mode="after")
    def _source_names_are_unique(self) -> RunConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must be unique, got {names}")
        return self

    @model_validator(mode="after")
    def _teachers_of_the_panel_differ(self) -> RunConfig:
        shaped_by = [(teacher.model, teacher.revision, teacher.extra_body) for teacher in self.difficulty_endpoints]
        for place, identity in enumerate(shaped_by):
            if identity in shaped_by[:place]:
                raise ValueError(
                    f"difficulty.panel asks {identity[0]!r} twice with the same revision and extra_body: both would "
                    "share one stored reply, so it would vote twice"
                )
        return self

    @property
    def reasoner_endpoint(self) -> EndpointConfig:
        return self.reasoner or self.teacher

    @property
    def difficulty_endpoints(self) -> list[EndpointConfig]:
        """All that vote on difficulty, the main teacher first."""
        return [self.teacher, *self.difficulty.panel]


def load_config(path: str | Path) -> RunConfig:
    """Returns the configuration in a YAML file. Relative paths in it stay relative to the current folder.

    `${NAME}` in a string is replaced by that environment variable.

    Raises ConfigError: with one line per problem, naming the setting, the value seen and what is expected.
    """
    path = Path(path)
    raw = read_yaml(path, "the configuration ")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(raw).__name__}")
    return parse_config(raw, origin=str(path))


def parse_config(raw: dict[str, Any], *, origin: str = "configuration") -> RunConfig:
    """Returns the configuration of a plain mapping. Raises ConfigError as `load_config` does."""
    try:
        return RunConfig.model_validate(_expand_environment(raw))
    except ValidationError as error:
        raise wrong_settings(origin, error, raw) from None  # pydantic's own message shows every value


def _expand_environment(value: Any) -> Any:
    if isinstance(value, str):
        expanded = os.path.expandvars(value) if "${" in value else value
        if "${" in expanded:
            raise ConfigError(f"environment variable in {value!r} is not set")
        return expanded
    if isinstance(value, dict):
        return {key: _expand_environment(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_environment(item) for item in value]
    return value
