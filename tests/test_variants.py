"""Variant and Semantics: their named values, and the errors that list them."""

import dataclasses
import math

import pytest
import truth

from bssn_kernels.variants import Semantics, Variant, resolve_semantics, resolve_variant, semantics_names, variants


def test_named_variants():
    assert variants() == ["sn", "ssn", "bsn", "bssn", "capped"]
    assert resolve_variant("sn") == Variant() == Variant(out=1.0, into=0.0, floor=0.0, gain=1.0)
    assert resolve_variant("ssn", 1.6) == Variant(1.0, 0.0, 0.0, 1.6)
    assert resolve_variant("bsn") == Variant(0.5, 0.5, 0.0, 1.0)
    assert resolve_variant("bssn", 1.2) == Variant(0.5, 0.5, 0.0, 1.2)
    assert resolve_variant("capped", 6) == Variant(1.0, 0.0, 6.0, 6.0)


def test_scale_multiplies_the_gain_of_an_instance():
    """Its floor is the user's own number; only the name "capped" ties it to the scale."""
    assert resolve_variant(Variant(0.2, 0.3, 0.4, 0.5), 2.0) == Variant(0.2, 0.3, 0.4, 1.0)


def test_named_semantics():
    rows = {
        "torch": Semantics("uv", "max", "stored", "constant", "forward", "warm"),
        "torch_hook": Semantics("vu", "max", "stored", "constant", "forward", "unit"),
        "miyato": Semantics("vu", "add", "stored", "constant", "forward", "normal"),
        "biggan": Semantics("vu", "max", "refresh", "constant", "forward", "normal"),
        "paper": Semantics("vu", "add", "refresh", "through", "update", "truncated", into_order="vu"),
    }
    assert semantics_names() == list(rows)
    for name, row in rows.items():
        assert resolve_semantics(name) == row and resolve_semantics(row) is row


@pytest.mark.parametrize("name", semantics_names())
def test_orders_of_the_directions(name):
    found = resolve_semantics(name)
    assert (found.order_of(0), found.order_of(1)) == truth.RULES[name][:2]


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Variant().out = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve_semantics("torch").order = "vu"
    assert len({Variant(), Variant(1), Variant(out=1.0)}) == 1, "integers become floats, so that equal ones hash alike"


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"out": math.nan}, r"Variant\.out: expected a finite number, got nan"),
        ({"into": "1"}, r"Variant\.into: expected a finite number, got '1'"),
        ({"floor": True}, r"Variant\.floor: expected a finite number, got True"),
        ({"gain": math.inf}, r"Variant\.gain: expected a finite number, got inf"),
        ({"out": -1.0}, r"expected out, into >= 0 and not both 0, got out=-1\.0"),
        ({"out": 0.0}, r"expected out, into >= 0 and not both 0, got out=0\.0, into=0\.0"),
        ({"floor": -0.1}, r"Variant\.floor: expected a number >= 0, got -0\.1"),
        ({"gain": 0.0}, r"Variant\.gain: expected a number > 0, got 0\.0"),
    ],
)
def test_bad_numbers(numbers, message):
    with pytest.raises(ValueError, match=message):
        Variant(**numbers)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, True, "2", None])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="scale: expected a positive and finite number, got"):
        resolve_variant("bssn", scale)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"one of \['sn', 'ssn', 'bsn', 'bssn', 'capped'\] or a Variant, got 'BSSN'"):
        resolve_variant("BSSN")
    with pytest.raises(ValueError, match=r"\['torch', 'torch_hook', 'miyato', 'biggan', 'paper'\].*got 'authors'"):
        resolve_semantics("authors")
    with pytest.raises(TypeError, match="expected a name or a Variant, got float"):
        resolve_variant(1.0)
    with pytest.raises(TypeError, match="expected a name or a Semantics, got NoneType"):
        resolve_semantics(None)


@pytest.mark.parametrize("field", ["order", "norm", "eval", "gradient", "moves", "start", "into_order"])
def test_unknown_choices_list_the_known(field):
    right = dataclasses.asdict(resolve_semantics("torch"))
    with pytest.raises(ValueError, match=rf"Semantics\.{field}: expected one of \[.*\], got 'other'"):
        Semantics(**{**right, field: "other"})
