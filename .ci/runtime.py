"""Print the installed packages that batchtrim with all its extras needs, and what these need in turn."""

from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(name: str, extras: frozenset[str], found: set[tuple[str, frozenset[str]]]) -> None:
    if (name, extras) in found:
        return
    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # of another platform, or of an extra nobody asked for
        return
    found.add((name, extras))
    for requirement in map(Requirement, lines):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": each}) for each in ("", *extras)):
            needed(canonicalize_name(requirement.name), frozenset(requirement.extras), found)


if __name__ == "__main__":
    packages: set[tuple[str, frozenset[str]]] = set()
    needed("batchtrim", frozenset({"all"}), packages)
    print(*sorted({name for name, _ in packages} - {"batchtrim"}))
