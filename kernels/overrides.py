"""``__torch_function__`` for the public functions, as PyTorch's own functions have it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Let arguments that define ``__torch_function__``, and active modes, take over a call of ``function``.

    So a ``torch.fx`` trace records one call of the operation instead of failing in its argument checks, and tensor subclasses
    and modes see it as they see ``F.conv2d``.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(wrapper, given, *args, **kwargs)
        return function(*args, **kwargs)

    return wrapper
