"""How compiled functions are made that allocate nothing: `kernel`, and `inlined` for small ones within others.

Numba counts references to the arrays that a function hands on, atomically: at each call, and in loops at each use of a
function that is put in place. For small functions the counting took half the time. A function that makes no array
needs none of it; one that does make arrays fails to compile under `_nrt=False`, so nothing can go wrong silently.
"""

from __future__ import annotations

from typing import Any

import numba

_OPTIONS: Any = {"cache": True, "nogil": True, "_nrt": False}

kernel = numba.njit(**_OPTIONS)
inlined = numba.njit(**_OPTIONS, inline="always")
