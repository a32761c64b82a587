"""How a trimmer is copied and pickled."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from batchtrim.distributed import NOT_PICKLED
from batchtrim.selection.base import changeable_keep

if TYPE_CHECKING:
    from torch import Tensor
    from torch import distributed as dist

__all__ = ["Copied"]


class Copied:
    """Copies that share the process group, and can be stepped in any mode; no pickle with a process group."""

    process_group: dist.ProcessGroup | None
    _keep_tensor: Tensor

    if TYPE_CHECKING:

        @property
        def keep(self) -> float: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.process_group)] = self.process_group  # belongs to the process: a copy chooses in the same one
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(vars(self))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(NOT_PICKLED)
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._keep_tensor.is_inference():  # copied in inference mode, outside of which step() could not change it
            self._keep_tensor = changeable_keep(self.keep)
