"""Raw data -> Sample: plan the shards of the configured sources, then read each into samples and fates.

`plan_units` lists the shards of a run, `read_unit` reads one. The rest of the package serves these two: `images` keeps
the pictures; `json_rows`, `parquet` and `hub` know the containers; `rows` turns a raw row into a sample.
"""

from sources.images import ImageStore
from sources.reading import plan_units, read_unit
from sources.units import Unit

__all__ = ["ImageStore", "Unit", "plan_units", "read_unit"]
