"""Attributes that are checked when they are set, or that stay as they were made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

__all__ = ["Checked", "fixed", "fixed_method"]

T = TypeVar("T")


class Checked(Generic[T]):
    """An attribute that is checked whenever it is set. Reading it costs no more than any attribute.

    Args:
        check: called with the attribute's name, the value and ``arguments``; raises an error.
    """

    def __init__(self, check: Callable[..., Any], *arguments: Any) -> None:
        self._check, self._arguments = check, arguments

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: T) -> None:
        self._check(self._name, value, *self._arguments)
        vars(instance)[self._name] = value

    if TYPE_CHECKING:  # without it, Python reads the instance's own entry

        def __get__(self, instance: object, owner: type) -> T: ...


if TYPE_CHECKING:
    fixed = property

    def fixed_method(cure: str) -> Callable[[T], T]: ...

else:

    def fixed(read: Callable[[Any], Any]) -> property:
        """Return a property that cannot be set; the error says what to do, which is the class's ``_to_change``."""

        def refuse(instance: Any, value: object) -> None:
            raise _is_fixed(instance, read.__name__, instance._to_change)

        return property(read, refuse, doc=read.__doc__)

    def fixed_method(cure: str) -> Callable[[Callable[..., Any]], Any]:
        """Make a method that cannot be set: it has the name of an argument of the constructor."""
        return lambda function: _FixedMethod(function, cure)


class _FixedMethod:
    def __init__(self, function: Callable[..., Any], cure: str) -> None:
        functools.update_wrapper(self, function)  # pyright: ignore[reportArgumentType]
        self._function, self._cure = function, cure

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return self._function if instance is None else MethodType(self._function, instance)

    def __set__(self, instance: object, value: object) -> None:
        raise _is_fixed(instance, self._function.__name__, self._cure)


def _is_fixed(instance: object, name: str, cure: str) -> AttributeError:
    return AttributeError(f"expected `{name}` of {type(instance).__name__} to be read only, got an assignment. {cure}")
