"""Logits of the last places only, from OpenVINO models that compute them for every place fed.

An exported model scores every place of a prompt, and only the last is looked at. Of a draft the
head is most of the work, of a small target a good part. GenAI cuts the graph for itself; here a
slice is put before the head whose start is a state of the infer request, so that the same compiled
model still gives every place to whoever does not ask for less.
"""

from __future__ import annotations

import math
from typing import Any

# The state's name, and its value for "every place".
STATE = "fastdraft_last_places"
EVERY_PLACE = -(2**31) + 1
# A head that is a smaller part of the model's weights is not worth compiling the model again.
LEAST_SHARE = 0.1

_MARK = "_fastdraft_narrow_request"
# What may stand between the head's product and the logits: casts, biases, scales, soft caps.
_BEHIND = {"Convert", "Add", "Multiply", "Divide", "Tanh", "Reshape"}


def narrow(model: Any) -> Any:
    """Prepare an ``OVModelForCausalLM`` and return the state that says how many places to score.

    The first call compiles a changed copy of the model's graph in place of the compiled one; what
    ``save_pretrained`` writes stays as it was.

    Returns:
        the infer request's state: set it to -n for the last n places. ``reset_state`` brings it
        back to every place. ``None`` for a model that is left as it is: its head is a small part
        of it, or not found, or it does not run on a CPU.
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

    start = ops.read_value(constant(EVERY_PLACE), variable)
    last = ops.slice(head.input_value(0), start, constant(2**31 - 1), constant(1), constant(1))
    head.input(0).replace_source_output(last.output(0))
    graph.add_variables([variable])
    graph.add_sinks([ops.assign(start, variable)])
    graph.validate_nodes_and_infer_types()
    return True


def wide_head(graph: Any) -> Any:
    """Return the product that gives the logits where it is worth narrowing, else ``None``."""
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
    """Return the head's part of all stored weights, counted in numbers."""

    def size(node: Any) -> int:
        if node.get_type_name() == "Constant":
            return math.prod(node.shape)
        if node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape"):
            return max(size(value.get_node()) for value in node.input_values())
        return 0

    constants = [n for n in graph.get_ops() if n.get_type_name() == "Constant"]
    everything = sum(math.prod(node.shape) for node in constants)
    return float(size(head.input_value(1).get_node()) / max(1, everything))
