"""Print the installed packages that batchtrim with all its extras needs, and what these need in turn.

Left out are packages whose metadata names no licence and whose licence file is known, where it still reads the same.
"""

from importlib.metadata import PackageNotFoundError, distribution, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MIT = "Permission is hereby granted, free of charge, to any person obtaining a"
READ = {"resvg-py": MIT}  # package -> how its licence begins


def known(name: str) -> bool:
    """Return True for a package of `READ` whose licence file holds what is written there."""
    if name not in READ:
        return False
    files = [file for file in distribution(name).files or () if file.name.startswith("LICENSE")]
    return any(READ[name] in str(file.read_text()) for file in files)


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
    print(*sorted(name for name in {name for name, _ in packages} - {"batchtrim"} if not known(name)))
