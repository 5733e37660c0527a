"""Cores that may be used."""

import pytest

from data_prep.cores import granted_cores


@pytest.mark.parametrize(
    ("quotas", "granted"),
    [
        ({"job/step": "150000 100000", "job": "max 100000"}, 1.5),
        ({"job/step": "max 100000", "job": "100000 100000", "": "800000 100000"}, 1.0),
        ({"other": "100000 100000"}, 64.0),
        ({}, 64.0),
    ],
)
def test_cores_are_those_that_control_groups_grant(tmp_path, monkeypatch, quotas, granted):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    root, membership = tmp_path / "root", tmp_path / "membership"
    for name, quota in quotas.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "cpu.max").write_text(quota + "\n")
    membership.write_text("4:memory:/elsewhere\n0::/job/step\n")
    assert granted_cores(membership, root) == granted
    assert granted_cores(tmp_path / "missing", root) == 64.0
