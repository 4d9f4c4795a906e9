from pathlib import Path

import pytest

from vibejax.config_file import InputError
from vibejax.locations import resolve


def test_plain_names_are_paths():
    assert resolve("runs/a") == Path("runs/a")


def test_packages_are_found_without_import():
    assert resolve("package:vibejax/quickstart/rl.toml").is_file()


@pytest.mark.parametrize(
    "name, message",
    [
        ("package:no_such_package/x", "no installed Python package 'no_such_package'"),
        ("package:vibejax/../secret", "path inside the package"),
        ("package:vibejax//etc", "path inside the package"),
        ("package:vibejax", "path inside the package"),
    ],
)
def test_what_leads_nowhere_or_out_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        resolve(name)
