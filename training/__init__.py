"""Training programs, each with a file contract: a configuration in; checkpoints, metrics.jsonl and result.json out.

The only package that imports torch. It runs in the GPU-side environment, never inside the flow's own process.
"""
