"""The flows and the command line: the only package that imports Prefect. It knows shards and stages, never a row."""
