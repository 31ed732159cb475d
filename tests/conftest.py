"""Settings of all tests. In the GPU-side environment also what torchvision needs beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import warnings
from pathlib import Path

from hypothesis import settings

settings.register_profile("bimode", deadline=None)  # machines are shared, and first calls compile
settings.load_profile("bimode")

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("trl") is not None:
    is_helped = "cpu_site" in str(getattr(sys.modules.get("sitecustomize"), "__file__", ""))
    if not is_helped and "torchvision" not in sys.modules:  # what runs here is kept alive
        _SITE = runpy.run_path(str(ROOT / "teacher" / "cpu_site" / "sitecustomize.py"), run_name="sitecustomize")
    with warnings.catch_warnings():  # what libraries say of one another when they are first imported is not our doing
        warnings.simplefilter("ignore")
        import trl.trainer.grpo_trainer  # noqa: F401
