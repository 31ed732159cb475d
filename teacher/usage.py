"""What each row cost, from the stored replies alone: no report and no finished run is needed.

    import polars as pl
    from teacher.usage import row_costs

    costs = row_costs("runs/corpus/journals")
    # The ten rows that cost most tokens, with all their calls:
    tokens = pl.col("prompt_tokens") + pl.col("completion_tokens")
    rows = costs.group_by("sample_id").agg(tokens=tokens.sum(), calls=pl.col("num_calls").sum())
    rows.top_k(10, by="tokens").collect(engine="streaming")

`sample_id` is the column `id` of a corpus and of its `fates.parquet`. What is counted is what is stored: replies to
questions of an older recipe, which no row asks any more, stand here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from schemas.usage import Usage
from teacher.replies import scan_replies

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Usage", "row_costs"]


def row_costs(folder: str | Path, *, check: bool = True) -> pl.LazyFrame:
    """Returns what the stored replies about each row cost, by purpose and model, whoever paid for them.

    folder, check: as for `scan_replies`, which raises StorageError. Columns: sample_id, purpose, model (as the server
    calls itself), and num_calls, num_replies, num_retries, prompt_tokens, cached_tokens, completion_tokens and seconds
    as in `Usage`.
    """
    import polars as pl  # noqa: PLC0415 - not in the environment of training programs, which import the client, too

    # Files of an earlier version lack both columns: every reply was a call of its own then.
    is_call = pl.col("choice").fill_null(0) == 0
    of_calls = [pl.col(name).filter(is_call).sum() for name in ("prompt_tokens", "cached_tokens")]
    return (
        scan_replies(folder, check=check)
        .group_by("sample_id", "purpose", "model")
        .agg(
            is_call.sum().cast(pl.Int64).alias("num_calls"),
            pl.len().cast(pl.Int64).alias("num_replies"),
            (pl.col("num_attempts").fill_null(1) - 1).filter(is_call).sum().alias("num_retries"),
            *of_calls,
            pl.col("completion_tokens").sum(),
            pl.col("seconds").filter(is_call).sum(),
        )
    )
