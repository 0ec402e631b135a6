"""Promises of the folder in which a coordinator works. Those that need a job, or a store such as S3, ``test_far_jobs`` has."""

from pathlib import Path

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.records.secret import SECRET_BYTES, secret_path


def test_a_torn_secret_takes_no_whole_ones_place_and_is_put_anew(tmp_path: Path) -> None:
    objects, folder, secret = ObjectStore.at(f"local://{tmp_path}/objects"), tmp_path / "job", b"x" * SECRET_BYTES
    objects.put("jobs/job/privacy.key", secret[:5])  # its process was killed
    folder.mkdir()
    secret_path(folder).write_bytes(secret)
    copy = WorkingCopy(objects, "job", folder)
    copy.begin()
    assert secret_path(folder).read_bytes() == secret
    copy.commit()
    assert objects.get("jobs/job/privacy.key") == secret


def test_a_torn_secret_is_none_for_who_has_none(tmp_path: Path) -> None:
    objects, folder = ObjectStore.at(f"local://{tmp_path}/objects"), tmp_path / "job"
    objects.put("jobs/job/privacy.key", b"torn")
    WorkingCopy(objects, "job", folder).begin()
    assert not secret_path(folder).exists()
