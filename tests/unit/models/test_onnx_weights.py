from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mtlsign.errors import ModelError
from mtlsign.models import onnx_weights
from mtlsign.models.onnx_weights import read_onnx

W, A, B = (
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.ones((1, 3), np.float32),
    np.ones((2, 1), np.float32),
)


def write(path: Path, nodes: list[Any], **constants: Any) -> Path:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    onnx.save(helper.make_model(graph), str(path))
    return path


def test_read_onnx_computes_constant_nodes_and_leaves_out_their_inputs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["B", "A"], ["BA"]),
        helper.make_node("Add", ["W", "BA"], ["merged"]),
        helper.make_node("Transpose", ["merged"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "t"], ["y"]),
        helper.make_node("Conv", ["y", "K"], ["z"]),
    ]
    tensors = read_onnx(write(tmp_path / "m.onnx", nodes, W=W, A=A, B=B, K=np.ones((1, 1, 3, 3), np.float32)))
    assert set(tensors) == {"t", "K"} and torch.equal(tensors["t"], torch.from_numpy((W + B @ A).T.copy()))


def test_read_onnx_computes_dequantised_and_reshaped_kernels(tmp_path: Path) -> None:
    codes, scale, zero = (
        np.array([[1, 2], [3, 4]], np.int8),
        np.array([2, 3], np.float32),
        np.array([0, 1], np.int8),
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([4, -1]))),
        helper.make_node("Reshape", ["w", "shape"], ["flat"]),
        helper.make_node("MatMul", ["x", "flat"], ["y"]),
    ]
    tensors = read_onnx(write(tmp_path / "m.onnx", nodes, q=codes, s=scale, z=zero))
    assert set(tensors) == {"flat"} and tensors["flat"].flatten().tolist() == [2, 4, 6, 9]


def test_read_onnx_computes_no_other_nodes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Loop", ["W"], ["a"]),
        helper.make_node("Add", ["W", "W"], ["b"], domain="evil"),
        helper.make_node("Add", ["W", "x"], ["c"]),
    ]
    assert set(read_onnx(write(tmp_path / "m.onnx", nodes, W=W))) == {"W"}


def test_read_onnx_of_large_results_computes_none_of_them(tmp_path: Path) -> None:
    long = np.ones((1, 9000), np.float32)
    nodes = [helper.make_node("MatMul", ["u", "v"], ["w"]), helper.make_node("Add", ["u", "v"], ["x"])]
    assert set(read_onnx(write(tmp_path / "m.onnx", nodes, u=long.T, v=long))) == {"u", "v"}


def test_read_onnx_limits_the_sum_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_weights, "MAX_COMPUTED", 10)
    nodes = [helper.make_node("Identity", ["W"], [f"w{index}"]) for index in range(3)]
    with pytest.raises(ModelError, match="over 10 numbers"):
        read_onnx(write(tmp_path / "m.onnx", nodes, W=W))


def test_read_onnx_with_weights_in_further_files_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    onnx_model = helper.make_model(helper.make_graph([], "g", [], [], initializer=[tensor]))
    (tmp_path / "m.onnx").write_bytes(onnx_model.SerializeToString())
    with pytest.raises(ModelError, match="further files"):
        read_onnx(tmp_path / "m.onnx")
