"""Deletes uploads of which a part came and no more. The process of the controller does this, every hour."""

import logging
from collections.abc import Callable
from threading import Event

from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.storage import Storage

_INTERVAL_SECONDS = 3600.0
_log = logging.getLogger(__name__)


def remove_old_uploads(
    storage: Storage, stop: Event, drop_unused: Callable[[], object], seconds: float = _INTERVAL_SECONDS
) -> None:
    """Delete old parts now, and again every so many ``seconds`` until ``stop`` is set. Troubles wait for the next time.

    Each time it calls ``drop_unused``, which lets machines delete the files of uploads that no job there reads any more.
    """
    while True:
        try:
            drop_unused()
            uploads = UploadStore(storage)
            try:
                uploads.remove_old()
            finally:
                uploads.close()
        except (*NO_ANSWER, OSError) as error:
            _log.warning("old uploads were not deleted (%s); trying again later", error)
        if stop.wait(seconds):
            return
