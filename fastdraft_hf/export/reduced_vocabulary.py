"""Reduce the head of an exported OpenVINO model: a smaller product, scattered to the full size.

The head's matrix [V, H], stored as floats or as 8 bits with scales, is replaced by its rows [K, H].
After the product a scatter writes the K columns into a constant tensor of `LOWEST`, so that
OpenVINO GenAI and ``OVModelForCausalLM`` still see logits [batch, sequence, V]. Tied embeddings
keep every row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdraft_hf._errors import FastDraftError

# The lowest finite float16: far below any logit, and safe to compute with.
LOWEST = -65504.0

# Operations between the product and the logits that work on each column alone.
_ELEMENTWISE = ("Add", "Multiply", "Divide", "Tanh", "Convert", "Subtract")
# Operations between a stored matrix and the product.
_DECOMPRESSION = ("Convert", "Subtract", "Multiply", "Reshape")


def reduce_openvino(folder: Path, token_ids: Sequence[int]) -> None:
    """Reduce the head of the OpenVINO model in ``folder``, in place.

    Args:
        folder: with ``openvino_model.xml`` and ``.bin``.
        token_ids: [K] ascending ids.

    Raises:
        FastDraftError: rows cannot be selected in the way the head is stored.
    """
    import openvino

    source = folder / "openvino_model.xml"
    model = openvino.Core().read_model(source)
    _reduce(model, list(token_ids))
    written = folder / "reduced_model.xml"
    openvino.save_model(model, written, compress_to_fp16=False)
    # The model's constants are mapped from the file that is replaced below.
    del model
    for suffix in (".bin", ".xml"):
        os.replace(written.with_suffix(suffix), source.with_suffix(suffix))


def _reduce(model: Any, token_ids: list[int]) -> None:
    import numpy
    from openvino import opset13 as ops

    result = next(r for r in model.get_results() if "logits" in r.input_value(0).get_names())
    logits = result.input_value(0)
    names = set(logits.get_names())
    vocabulary = logits.get_partial_shape()[2].get_length()
    if token_ids[-1] >= vocabulary:
        raise FastDraftError(
            f"reduced vocabulary: token {token_ids[-1]} is not among the model's {vocabulary:,}"
        )
    rows = numpy.array(token_ids, dtype=numpy.int64)
    product = _product(logits.get_node(), rows, vocabulary)
    weights = product.input_value(1)
    if not product.get_attributes()["transpose_b"]:
        raise FastDraftError("reduced vocabulary: the head's matrix is stored transposed")
    reduced = _rows_of(weights, rows, vocabulary)
    product.input(1).replace_source_output(reduced.output(0))
    model.validate_nodes_and_infer_types()
    shape = ops.shape_of(result.input_value(0), "i64")
    ends = ops.gather(shape, ops.constant(numpy.array([0, 1])), ops.constant(numpy.int64(0)))
    full = ops.concat([ends, ops.constant(numpy.array([vocabulary]))], 0)
    scattered = ops.scatter_update(
        ops.broadcast(ops.constant(numpy.float32(LOWEST)), full),
        ops.constant(rows),
        _as_float(result.input_value(0), ops),
        ops.constant(numpy.int64(2)),
    )
    result.input_value(0).set_names({"reduced_logits"})
    scattered.output(0).set_names(names)
    scattered.set_friendly_name("logits_of_reduced_vocabulary")
    result.input(0).replace_source_output(scattered.output(0))
    model.validate_nodes_and_infer_types()


def _as_float(value: Any, ops: Any) -> Any:
    return value if value.get_element_type().get_type_name() == "f32" else ops.convert(value, "f32")


def _product(node: Any, rows: Any, vocabulary: int) -> Any:
    """Return the head's product, searching up from the logits; reduce the constants in between."""
    from openvino import opset13 as ops

    while node.get_type_name() != "MatMul":
        if node.get_type_name() not in _ELEMENTWISE:
            raise FastDraftError(
                f"reduced vocabulary: operation {node.get_type_name()} after the head is not "
                "supported"
            )
        for place in range(1, node.get_input_size()):
            constant = node.input_value(place).get_node()
            if constant.get_type_name() == "Constant" and vocabulary in constant.shape:
                axis = list(constant.shape).index(vocabulary)
                part = ops.constant(constant.get_data().take(rows, axis=axis))
                node.input(place).replace_source_output(part.output(0))
        node = node.input_value(0).get_node()
    return node


def _rows_of(value: Any, rows: Any, vocabulary: int) -> Any:
    """Return a copy of the stored matrix and its decompression with only these rows."""
    import numpy
    from openvino import opset13 as ops

    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        if node.shape and node.shape[0] == vocabulary:
            if node.get_element_type().bitwidth < 8:
                raise FastDraftError(
                    "reduced vocabulary: the head is stored in fewer than 8 bits; export with int8"
                )
            return ops.constant(node.get_data().take(rows, axis=0))
        data = node.get_data()
        # The shape to which a matrix stored in groups is reshaped.
        if data.ndim == 1 and data.size and data[0] == vocabulary:
            data = numpy.array([len(rows), *data[1:]], dtype=data.dtype)
        return ops.constant(data)
    if kind not in _DECOMPRESSION:
        raise FastDraftError(
            f"reduced vocabulary: operation {kind} before the head's product is not supported"
        )
    inputs = [_rows_of(one, rows, vocabulary) for one in node.input_values()]
    if kind == "Convert":
        made = ops.convert(inputs[0], node.get_element_type().get_type_name())
    elif kind == "Reshape":
        made = ops.reshape(*inputs, node.get_attributes()["special_zero"])
    else:
        made = {"Subtract": ops.subtract, "Multiply": ops.multiply}[kind](*inputs)
    # The CPU plug-in keeps the matrix compressed in memory only with this information.
    for key, fact in node.get_rt_info().items():
        made.get_rt_info()[key] = fact
    return made
