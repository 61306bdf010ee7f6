"""Metadata lives in pyproject.toml; this file says which packages are built."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["kvspn", "kvspn.*"]))
