"""Package list and folder mapping; everything else is in pyproject.toml.

Three top-level folders make one importable package: ``attnc/`` is ``attnc``, ``patterns/`` is
``attnc.patterns`` and ``models/`` is ``attnc.models``. setuptools' own discovery cannot see that mapping, and
a list written by hand goes stale with the first new subpackage, so the list is found here.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {"attnc": "attnc", "attnc.patterns": "patterns", "attnc.models": "models"}

mapping = {package: folder for package, folder in FOLDERS.items() if (ROOT / folder).is_dir()}
packages = [
    name
    for package, folder in mapping.items()
    for name in (package, *(f"{package}.{sub}" for sub in find_packages(str(ROOT / folder))))
]

setup(packages=packages, package_dir=mapping)
