"""Where what is made once and kept between runs has its folder: compiled libraries, converted models."""

import os
from collections.abc import Mapping
from pathlib import Path

from chainfed_ray.errors import InvalidSetting


def cache_folder(variable: str, inside: str = "", environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that the environment ``variable`` names; by default ``chainfed/<inside>`` in the user's cache.

    Raises:
        InvalidSetting: the variable is not an absolute path.
    """
    if named := environment.get(variable):
        if not Path(named).is_absolute():
            raise InvalidSetting(variable, named, "an absolute path")
        return Path(named)
    cache = environment.get("XDG_CACHE_HOME") or f"{environment.get('HOME') or '/tmp'}/.cache"
    return Path(cache, "chainfed", inside)
