"""Where a named file or folder lies: on disk, in a bucket or inside an installed package."""

import importlib.util
from pathlib import Path

from vibejax import buckets
from vibejax.config_file import InputError


def resolve(name: str) -> Path:
    """The path that `name` stands for; whether anything is there is the reader's question.

    Args:
        name: a path; "gs://BUCKET/PATH", which is fetched; or "package:NAME/PATH" for one inside
            an installed Python package, which is found without being imported.

    Raises:
        InputError: the package is not installed, or PATH leads out of it; or what is in a bucket
            cannot be fetched.
    """
    if buckets.named(name):
        return buckets.fetch(name)
    if not name.startswith("package:"):
        return Path(name)
    package, _, inner = name.removeprefix("package:").partition("/")
    # A dotted name would import the parent package.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name}: no installed Python package {package!r}")
    if not inner or Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise InputError(f"{name}: must be package:NAME/PATH with a path inside the package")
    roots = spec.submodule_search_locations
    if package == __package__:  # which a folder of that name, such as a clone's, can hide
        roots = [Path(__file__).parent]
    paths = [Path(root) / inner for root in roots]
    return next((path for path in paths if path.exists()), paths[0])
