"""distilabel on the rows of `benchmarks.teacher_client`, run by the Python of an environment that has it.

Two ways: `--way llm` times its `OpenAILLM` alone, called batch after batch in this process; `--way pipeline` times a
pipeline of one step, `TextGenerationWithImage`, as its users run it. A pipeline starts processes each time, so one of a
tenth of the rows is run first, and what is counted is the difference. The pipeline's cache is off: nothing is kept on
disk until its end, and the LLM alone keeps nothing at all.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

from importlib.metadata import version
from typing import Any

from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGenerationWithImage
from stopwatch import Stopwatch, client_parser, read_rows

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 512}


def main() -> None:
    parser = client_parser()
    parser.add_argument("--way", choices=["llm", "pipeline"], required=True)
    options = parser.parse_args()
    rows = [{"instruction": row["question"], "image": row[options.column]} for row in read_rows(options.rows)]
    stopwatch = Stopwatch(f"distilabel {version('distilabel')}")
    if options.way == "llm":
        time_llm(rows, options, stopwatch)
    else:
        time_pipeline(rows, options, stopwatch)
    stopwatch.save(options.result)


def time_llm(rows: list[dict[str, Any]], options: Any, stopwatch: Stopwatch) -> None:
    llm = new_llm(options.url)
    llm.load()

    def ask(asked: list[dict[str, Any]]) -> None:
        for start in range(0, len(asked), options.concurrency):
            batch = [chat(row) for row in asked[start : start + options.concurrency]]
            outputs = llm.generate_outputs(batch, **SAMPLING)
            assert len(outputs) == len(batch) and all(output["generations"][0] for output in outputs)

    ask(rows[: options.warm_up])
    for _ in range(options.runs):
        with stopwatch.run(len(rows) - options.warm_up):
            ask(rows[options.warm_up :])


def time_pipeline(rows: list[dict[str, Any]], options: Any, stopwatch: Stopwatch) -> None:
    def ask(asked: list[dict[str, Any]]) -> None:
        with Pipeline(name="teacher-client") as pipeline:
            load = LoadDataFromDicts(data=asked, batch_size=options.concurrency)
            task = TextGenerationWithImage(llm=new_llm(options.url), input_batch_size=options.concurrency)
            load >> task
        answered = pipeline.run(use_cache=False)["default"]["train"]
        assert len(answered) == len(asked) and all(answered["generation"])

    rows = rows[options.warm_up :]
    for _ in range(options.runs):
        few = Stopwatch("")
        with few.run(len(rows) // 10):
            ask(rows[: len(rows) // 10])
        with stopwatch.run(len(rows)):
            ask(rows)
        for name, value in few.runs[0].items():
            stopwatch.runs[-1][name] -= value


def new_llm(url: str) -> Any:
    return OpenAILLM(model="teacher", base_url=url, api_key="none", generation_kwargs=SAMPLING)


def chat(row: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": row["instruction"]},
        {"type": "image_url", "image_url": {"url": row["image"]}},
    ]
    return [{"role": "user", "content": parts}]


if __name__ == "__main__":
    main()
