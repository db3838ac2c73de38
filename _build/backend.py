"""PEP 517 backend: setuptools, built with the torch of the environment that octavo is installed into.

The extension uses torch's stable ABI, so any torch >= 2.13 builds it and any later one runs it. Under pip's build
isolation ``sys.prefix`` is still the target environment: its torch is used when there is one, and only otherwise is
one asked for (OCTAVO_BUILD_TORCH says which). ``--no-build-isolation`` is never needed.
"""

import importlib.util
import os
import site
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: F401

BUILD_TORCH = os.environ.get("OCTAVO_BUILD_TORCH", "torch==2.13.0")


def _torch_is_there() -> bool:
    """Whether torch can be imported, from the build environment or the target environment."""
    if importlib.util.find_spec("torch") is not None:
        return True
    before = list(sys.path)
    site.addsitedir(sysconfig.get_path("purelib"))  # reads .pth files too
    added = [path for path in sys.path if path not in before]
    sys.path[:] = before + added  # what the build asked for comes first
    return importlib.util.find_spec("torch") is not None


def _requirements() -> list[str]:
    return [] if _torch_is_there() else [BUILD_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_is_there()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _torch_is_there()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
