"""Everything about the package stands in pyproject.toml; this file is here for the compiled sources."""

from setuptools import setup

setup()
