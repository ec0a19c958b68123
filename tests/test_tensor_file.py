"""Files of arrays: the same to safetensors as to us; bfloat16 as torch rounds it."""

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from whence._tensor_file import code_of, from_bfloat16, map_tensors, pack, to_bfloat16


@given(arrays(np.float32, 9, elements=st.floats(width=32, allow_nan=True)))
def test_rounds_as_torch_does(values):
    want = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), want)


@pytest.mark.parametrize("bits", [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x3F808000, 0x3F818000])
def test_rounds_corner_cases_as_torch_does(bits):
    values = np.array([bits], np.uint32).view(np.float32)
    want = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), want)


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"])
def test_every_dtype_is_that_of_safetensors(tmp_path, name):
    dtype = {"F": "f", "I": "i", "U": "u"}.get(name[0], "?")
    want = np.arange(5).astype(dtype if name == "BOOL" else f">{dtype}{int(name[1:]) // 8}")
    (tmp_path / "x").write_bytes(b"".join(pack({"a": (name, want), "b": ("U8", np.zeros(3, np.uint8))})))
    found = safetensors.numpy.load_file(tmp_path / "x")["a"]
    np.testing.assert_array_equal(found, want)
    assert code_of(want.dtype) == name
    np.testing.assert_array_equal(map_tensors(tmp_path / "x")["a"][1], want)


def test_all_arrays_are_aligned(tmp_path):
    tensors = {"a": ("U8", np.zeros(3, np.uint8)), "b": ("F16", np.zeros((0, 4), np.float16))}
    tensors |= {"c": ("F64", np.arange(3.0)), "d": ("BF16", np.arange(6, dtype=np.uint16).reshape(2, 3))}
    (tmp_path / "x").write_bytes(b"".join(pack(tensors)))
    for name, (code, want) in tensors.items():
        found_code, found = map_tensors(tmp_path / "x")[name]
        assert found_code == code and found.flags.aligned and found.shape == want.shape
        np.testing.assert_array_equal(found, want)


def test_what_safetensors_does_not_know():
    assert [code_of(np.dtype(name)) for name in ("U3", "O", "M8[s]", "f8,f8")] == [None] * 4
