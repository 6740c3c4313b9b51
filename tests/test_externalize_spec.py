"""`ExternalizeSpec`: Apple's class where the converter is installed, and otherwise one like it."""

from __future__ import annotations

import dataclasses

import pytest

import coreai_torch
from coreai_torch._externalize_spec import ExternalizeSpec as OurSpec
from coreai_torch.composite_ops import RMSNormImpl

SPECS = list(dict.fromkeys([OurSpec, coreai_torch.ExternalizeSpec]))


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_valid(spec):
    bare = spec(RMSNormImpl)
    assert (bare.composite_op_name, bare.composite_attrs) == (None, None)
    assert spec(RMSNormImpl, "rms_norm").composite_attrs is None
    assert spec(RMSNormImpl, "rms_norm", []) == spec(
        target_class=RMSNormImpl, composite_op_name="rms_norm", composite_attrs=[]
    )


@pytest.mark.parametrize("attrs", [["axes", "eps"], []])
@pytest.mark.parametrize("spec", SPECS)
def test_attributes_need_the_name_of_an_op(spec, attrs):
    with pytest.raises(ValueError, match="composite_op_name"):
        spec(RMSNormImpl, composite_attrs=attrs)


def test_the_wording_of_ours():
    with pytest.raises(ValueError, match="expected composite_op_name with composite_attrs"):
        OurSpec(RMSNormImpl, composite_attrs=["eps"])


def test_fields_are_apples():
    apple = pytest.importorskip(
        "coreai_torch.externalize", reason="Apple's converter is not installed: make converter"
    )
    assert coreai_torch.ExternalizeSpec is apple.ExternalizeSpec
    fields = [
        [(f.name, f.default) for f in dataclasses.fields(spec)]
        for spec in (OurSpec, apple.ExternalizeSpec)
    ]
    assert fields[0] == fields[1]


def test_names_of_apples_that_are_explained():
    """The list is that of the tested converter, so that none is missing from it."""
    pytest.importorskip(
        "coreai_torch.converter", reason="Apple's converter is not installed: make converter"
    )
    from coreai_torch._coexistence import APPLE_NAMES

    ours = {"ExternalizeSpec", "__version__", "RMSNorm", "RMSNormImpl"}
    ours |= {"backends", "composite_ops", "ops", "reference"}
    ours |= {"get_compile_mode", "set_compile_mode", "replace_rms_norm", "restore_rms_norm"}
    for package in (coreai_torch, coreai_torch.composite_ops):
        names = {name for name in package.__all__ if not name.startswith("_")} - ours
        assert names == set(APPLE_NAMES[package.__name__])
