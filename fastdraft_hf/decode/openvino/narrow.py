"""Logits of the last positions only, from OpenVINO models that score every position.

An exported model scores every position of a prompt, although only the last is needed. The head is
most of a draft's work and a good part of a small target's. GenAI cuts the graph for itself. Here a
slice before the head has its start in a state of the infer request, so that the same compiled model
still scores every position by default.
"""

from __future__ import annotations

import math
from typing import Any

# The state's name, and its value for every position.
STATE = "fastdraft_last_positions"
EVERY_POSITION = -(2**31) + 1
# A head with a smaller share of the weights is not worth compiling the model again.
LEAST_SHARE = 0.1

_MARK = "_fastdraft_narrow_request"
# Operations between the head's product and the logits: casts, biases, scales, soft caps.
_BEHIND = {"Convert", "Add", "Multiply", "Divide", "Tanh", "Reshape"}


def narrow(model: Any) -> Any:
    """Prepare an ``OVModelForCausalLM`` and return the state that limits the scored positions.

    The first call compiles a changed copy of the model's graph in place of the compiled one.
    ``save_pretrained`` writes the original.

    Returns:
        the infer request's state: -n scores the last n positions, and ``reset_state`` restores all.
        ``None`` for a model that is left alone: its head is a small part of it or not found, or it
        does not run on a CPU.
    """
    import openvino

    model.compile()
    if getattr(model, _MARK, None) is not model.request:
        graph = model.model
        if not isinstance(graph, openvino.Model) or not _on_cpu(model.request):
            return None
        changed = graph.clone()
        if not _put_slice(changed):
            return None
        model.model, model.request = changed, None
        try:
            model.compile()
        finally:
            model.model = graph
        setattr(model, _MARK, model.request)
    request: Any = model.request
    return next(state for state in request.query_state() if state.name == STATE)


def _on_cpu(request: Any) -> bool:
    return list(request.get_compiled_model().get_property("EXECUTION_DEVICES")) == ["CPU"]


def _put_slice(graph: Any) -> bool:
    import numpy
    import openvino
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    head = wide_head(graph)
    if head is None:
        return False
    info = VariableInfo()
    info.variable_id = STATE
    # The CPU plug-in keeps no states of 64 bits.
    info.data_type, info.data_shape = openvino.Type.i32, openvino.PartialShape([1])
    variable = Variable(info)

    def constant(value: int) -> Any:
        return ops.constant(numpy.array([value], dtype=numpy.int32))

    start = ops.read_value(constant(EVERY_POSITION), variable)
    last = ops.slice(head.input_value(0), start, constant(2**31 - 1), constant(1), constant(1))
    head.input(0).replace_source_output(last.output(0))
    graph.add_variables([variable])
    graph.add_sinks([ops.assign(start, variable)])
    graph.validate_nodes_and_infer_types()
    return True


def wide_head(graph: Any) -> Any:
    """Return the product that gives the logits where narrowing it pays, else ``None``."""
    head = _head(graph)
    return head if head is not None and _head_share(graph, head) >= LEAST_SHARE else None


def _head(graph: Any) -> Any:
    """Return the product that gives the logits [B, n, V], or ``None``."""
    results = [r for r in graph.get_results() if "logits" in r.input_value(0).get_names()]
    if len(results) != 1 or len(results[0].input_value(0).get_partial_shape()) != 3:
        return None
    node = results[0].input_value(0).get_node()
    if node.get_type_name() == "ScatterUpdate":  # see export/reduced_vocabulary.py
        node = node.input_value(2).get_node()
    while node.get_type_name() in _BEHIND:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "MatMul" else None


def _head_share(graph: Any, head: Any) -> float:
    """Return the head's share of all stored weights, by number of elements."""

    def size(node: Any) -> int:
        if node.get_type_name() == "Constant":
            return math.prod(node.shape)
        if node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape"):
            return max(size(value.get_node()) for value in node.input_values())
        return 0

    constants = [n for n in graph.get_ops() if n.get_type_name() == "Constant"]
    everything = sum(math.prod(node.shape) for node in constants)
    return float(size(head.input_value(1).get_node()) / max(1, everything))
