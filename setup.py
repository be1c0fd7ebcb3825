"""For tools that still run setup.py: everything is in pyproject.toml, which scikit-build-core reads."""

from setuptools import setup

setup()
