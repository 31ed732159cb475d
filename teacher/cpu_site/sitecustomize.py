"""Makes PyPI's torchvision importable beside a CPU build of torch, in the vLLM server process only.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU torch its compiled operators do not load, and importing it
raises "operator torchvision::nms does not exist": it registers a fake kernel for an operator that nobody has defined.
vLLM's and transformers' Qwen2.5-VL code imports torchvision, for resizing alone. Defining the two missing schemas just
before torchvision is imported is enough; calling the operators themselves would still fail, and nothing here does.

Python imports a module of this name at start-up from the first PYTHONPATH entry that has one; `teacher.serving` puts
this folder there for the CPU build of vLLM. It therefore runs in every child of the server and must not import torch
by itself, which would cost seconds in processes that never need it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []
"""Keeps the definitions alive: a Library that is collected takes its schemas with it."""


class _DefineBeforeTorchvision(MetaPathFinder):
    """Finds nothing; being asked for torchvision is the moment to define the schemas."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _define_missing_operators()
        return None


def _define_missing_operators() -> None:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  (see the module's docstring)

    import torch  # noqa: PLC0415

    # A torchvision that matches torch (CUDA beside CUDA, or "+cpu" from PyTorch's own index) brings its operators;
    # defining them a second time would raise there.
    try:
        is_cpu_build = version("torchvision").endswith("+cpu")
    except PackageNotFoundError:
        return
    if is_cpu_build or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


sys.meta_path.insert(0, _DefineBeforeTorchvision())
