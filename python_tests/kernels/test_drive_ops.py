"""The driver that compute-sanitizer is run over works, here on the CPU, and notices a wrong result."""

from __future__ import annotations

import pytest
import torch

from tools.gpu import drive_ops


def test_every_op_is_driven(monkeypatch):
    called = set()

    def watched(name):
        real = getattr(drive_ops.ops, name)
        return lambda *a, **k: (called.add(name), real(*a, **k))[1]

    for name in drive_ops.ops.__all__:
        monkeypatch.setattr(drive_ops.ops, name, watched(name))
    assert drive_ops.drive(torch.device("cpu")) > 100
    assert called == set(drive_ops.ops.__all__)


def test_a_wrong_result_is_noticed(monkeypatch):
    real = drive_ops.ops.add_l2norm
    monkeypatch.setattr(drive_ops.ops, "add_l2norm", lambda *a, **k: real(*a, **k) + 1)
    with pytest.raises(AssertionError, match="add_l2norm"):
        drive_ops.drive(torch.device("cpu"))
