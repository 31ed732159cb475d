"""bespokelabs-curator on the rows of `benchmarks.teacher_client`, run by the Python of an environment that has it.

Telemetry, viewer and progress display are off by the environment it gets, its log here, and its rate limits are far
beyond reach. Timed is a whole call of `curator.LLM` on a dataset, as its users make it. Replies go into a JSON Lines
file as they come (opened anew for each, not synced) and into an Arrow file at the end.
"""

# mypy: disable-error-code="import-not-found,misc,no-untyped-def"
from __future__ import annotations

import logging
from importlib.metadata import version

from bespokelabs import curator
from datasets import Dataset
from litellm.litellm_core_utils import default_encoding  # noqa: F401 (leads tiktoken to the files that litellm brings)
from stopwatch import Stopwatch, client_parser, read_rows

SAMPLING = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}


class Asker(curator.LLM):
    def prompt(self, row):
        return row["question"], curator.types.Image(url=row["image"])

    def parse(self, row, response):
        return {"response": response}


def main() -> None:
    options = client_parser().parse_args()
    logging.getLogger("curator").setLevel(logging.ERROR)
    asker = Asker(
        model_name="teacher",
        backend="openai",
        generation_params=SAMPLING,
        backend_params={
            "base_url": options.url,
            "api_key": "none",
            "max_requests_per_minute": 10**9,
            "max_tokens_per_minute": 10**12,
            "max_concurrent_requests": options.concurrency,
        },
    )
    rows = read_rows(options.rows)

    def ask(number: int, first: int, stop: int | None) -> int:
        # Curator keeps replies under a hash of the dataset: the number makes it another one.
        asked = [
            {"question": f"({number}) {row['question']}", "image": row[options.column]} for row in rows[first:stop]
        ]
        answered = asker(Dataset.from_list(asked)).dataset
        assert len(answered) == len(asked), f"{len(answered)} of {len(asked)} rows were answered"
        return len(answered)

    ask(0, 0, options.warm_up)
    stopwatch = Stopwatch(f"bespokelabs-curator {version('bespokelabs-curator')}")
    for number in range(1, options.runs + 1):
        with stopwatch.run(len(rows) - options.warm_up):
            ask(number, options.warm_up, None)
    stopwatch.save(options.result)


if __name__ == "__main__":
    main()
