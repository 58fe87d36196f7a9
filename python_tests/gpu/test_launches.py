"""How the ops are launched: on the current stream and device, without a synchronisation, into CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from void_ext.testing import assert_bits_equal

pytestmark = pytest.mark.gpu


def same(actual, expected, name: str) -> None:
    assert len(actual) == len(expected)
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(left, right, f"{name}, result {i}")


@pytest.mark.parametrize("shape", [(1, 4096), (33, 577)], ids=str)
def test_no_synchronisation(op, shape, cuda, make_call):
    call = make_call(op, cuda, *shape)
    call.fill(0)
    expected = call.results()
    call.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(results, expected, op)


def test_the_detector_detects(cuda):
    """What the test above relies on."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=cuda).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay(op, cuda, make_call):
    """A captured call reads the inputs of the moment it is replayed in."""
    call = make_call(op, cuda)
    side = torch.cuda.Stream()
    call.fill(0)
    with torch.cuda.stream(side):  # once before the capture: modules load lazily
        call.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    for seed in (1, 2):
        call.fill(seed)
        expected = call.results()
        call.reset()
        for tensor in captured:
            if not any(tensor is written for written in call.written):
                tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        same(captured, expected, f"{op}, replay {seed}")


def test_two_streams(op, cuda, make_call):
    """The same op on two streams at once, each behind work of its own: an op on the wrong stream reads old inputs."""
    calls = [make_call(op, cuda, rows=257, width=1024) for _ in range(2)]
    expected = []
    for i, call in enumerate(calls):
        call.fill(10 + i)
        expected.append(call.results())
    fresh = [[tensor.clone() for tensor in call.inputs] for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for call in calls:
        for tensor in call.inputs:
            tensor.zero_()
        call.reset()
    torch.cuda.synchronize()
    results = [None, None]
    for i, (call, stream) in enumerate(zip(calls, streams, strict=True)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # some 25 ms, so that everything below is enqueued while this runs
            for tensor, values in zip(call.inputs, fresh[i], strict=True):
                tensor.copy_(values)
            results[i] = call.run()
    torch.cuda.synchronize()
    for i in range(2):
        same(results[i], expected[i], f"{op}, stream {i}")


def test_another_device_than_the_current_one(op, make_call):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    call = make_call(op, torch.device("cuda", 0))
    other = make_call(op, torch.device("cuda", 1))
    call.fill(3)
    other.fill(3)
    with torch.cuda.device(0):
        expected, results = call.results(), other.results()
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    same([tensor.cpu() for tensor in results], [tensor.cpu() for tensor in expected], op)
