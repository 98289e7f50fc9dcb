"""Trace a model to its aten graph, with the user's names of parameters, buffers and modules."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, Interpreter, Node
from torch.utils import _pytree as pytree

from manifold_nets._torch import nothing_left_behind
from manifold_nets.errors import AnalysisError
from manifold_nets.float64 import following, holds_objects, map_tensors, tensors_in
from manifold_nets.models import one_module_per_name
from manifold_nets.running import Inputs, output_tensors
from manifold_nets.symmetry.graph import (
    DataFlow,
    bound_arguments,
    op_name,
    operation_key,
)

__all__ = ["TracedGraph", "trace"]

# What torch.export says of `torch.vmap` that moves axes, which it can trace through Dynamo only.
_BY_DYNAMO = "fake tensor in the exported program constant's list"
# What they say of a model that cannot be traced is in the exception as well.
_TALKATIVE = ("torch.export", "torch.fx", "torch._dynamo", "torch._subclasses.fake_tensor")

# What runs a graph of its own, under autocast or in another gradient mode.
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
# Operations that make tensors of zeros, or of one number, and those that make zeros of zeros.
_ZEROS = ("zeros", "zeros_like", "new_zeros")
_FILLED = ("full", "full_like", "new_full", "scalar_tensor")
_KEEPS_ZEROS = frozenset(
    "lift_fresh_copy clone detach alias contiguous _to_copy to.dtype to.device to.other to.dtype_layout type_as view "
    "reshape expand expand_as squeeze squeeze.dim squeeze.dims unsqueeze permute transpose.int slice.Tensor select.int "
    "neg relu abs".split()
)


@dataclass(frozen=True)
class TracedGraph:
    """The aten graph of a model in training mode.

    Args:
        program: what `torch.export` returned.
        parameters: the name of the parameter behind each placeholder; tied names are the first one of the model.
        buffers: the name of the buffer behind each placeholder.
        flow: what depends on what.
        zeros: nodes whose entries are all zero when they are made, whatever the inputs: constants, and what operations
            fill with zeros.
        stored: the placeholders of buffers that no output in training mode depends on, but those in evaluation mode do,
            and into which training mode writes something that depends on a parameter: hand-written running statistics.
    """

    program: torch.export.ExportedProgram
    parameters: dict[Node, str]
    buffers: dict[Node, str]
    flow: DataFlow
    zeros: frozenset[Node] = frozenset()
    stored: frozenset[Node] = frozenset()

    @property
    def order(self) -> dict[Node, int]:
        """The position of each node."""
        return self.flow.order

    def module_of(self, node: Node) -> str:
        """Qualified name of the innermost module that runs the operation; empty for the model itself."""
        stack = node.meta.get("nn_module_stack") or {}
        names = [path for path, _ in stack.values()]
        return names[-1].split("@")[0] if names else ""

    def parameter_of(self, value: object) -> str | None:
        """Name of the parameter that an argument is; None where it is none."""
        return self.parameters.get(value) if isinstance(value, Node) else None

    def buffer_of(self, value: object) -> str | None:
        """Name of the buffer that an argument is; None where it is none."""
        return self.buffers.get(value) if isinstance(value, Node) else None

    def placeholders_of(self, parameter: str) -> list[Node]:
        """The placeholders that hold a parameter."""
        return [node for node, name in self.parameters.items() if name == parameter]

    def is_used(self, parameter: str) -> bool:
        """Whether some output depends on a parameter."""
        return not self.live.isdisjoint(self.placeholders_of(parameter))

    @functools.cached_property
    def live(self) -> frozenset[Node]:
        """The nodes that the outputs in training mode depend on, in this step or, through buffers, in a later one."""
        return self.flow.live()

    @functools.cached_property
    def live_or_stored(self) -> frozenset[Node]:
        """The same with all that is written into the buffers in ``stored``."""
        return self.flow.live(self.stored)

    def is_zero(self, node: Node, at: Node) -> bool:
        """Whether all entries of a tensor are zero when an operation reads it."""
        kept = self.flow.root(node).op == "placeholder"  # what is written into a buffer is there in the next step
        if any(kept or self.order[writer] < self.order[at] for writer in self.flow.writers(node)):
            return False
        if node in self.zeros:
            return True
        if operation_key(node) not in _KEEPS_ZEROS and self.flow.source(node) is None:
            return False
        source = self.flow.source(node) or node.all_input_nodes[0]
        return self.is_zero(source, node)

    def whole_numbers(self, node: object) -> Tensor | None:
        """The values of a buffer or constant of whole numbers that nothing writes into, such as a permutation."""
        if not isinstance(node, Node) or node.op != "placeholder" or self.flow.writers(node):
            return None
        signature = self.program.graph_signature
        name = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}.get(node.name, "")
        value = {**self.program.constants, **self.program.state_dict}.get(name)
        return value if _has_values(value) and value.dtype in (torch.int32, torch.int64) else None

    def uses_of_buffer(self, buffer: str | None) -> int:
        """How many operations read a buffer; 1 where there is none."""
        return sum(len(node.users) for node, name in self.buffers.items() if name == buffer) or 1

    def interpret(self, model: nn.Module, inputs: Inputs, visit: Any) -> Any:
        """Run the graph node by node on real tensors, calling ``visit(node, fetch)`` before each operation.

        ``fetch`` turns an argument of the node into its value. What ``visit`` returns takes the place of the result;
        with None the operation is carried out.
        """

        class Visitor(Interpreter):
            def run_node(self, n: Node) -> Any:
                given = None
                if n.op == "call_function":
                    given = visit(n, lambda argument: self.env[argument] if isinstance(argument, Node) else argument)
                return super().run_node(n) if given is None else given

        signature = self.program.graph_signature
        name_of = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
            **signature.inputs_to_lifted_custom_objs,
        }
        state: dict[str, Any] = {**self.program.constants, **self.program.state_dict}
        state.update(model.named_parameters(remove_duplicate=False))
        state.update(model.named_buffers(remove_duplicate=False))
        leaves = iter(tensors_in(inputs) if holds_objects(inputs) else pytree.tree_leaves(inputs))
        names = [node.name for node in self.program.graph.nodes if node.op == "placeholder"]
        values = [state[name_of[name]] if name in name_of else next(leaves) for name in names]
        with following(model):
            return Visitor(self.program.graph_module).run(*values)


def trace(model: nn.Module, inputs: Inputs) -> TracedGraph:
    """Export a model to its aten graph without running it on real data.

    Raises:
        AnalysisError: `torch.export` refuses the model.
    """
    program = _export(model, inputs)
    first_name = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    own_names = signature.inputs_to_parameters.items()
    parameters = {placeholders[place]: first_name[id(by_name[name])] for place, name in own_names}
    buffers = {placeholders[place]: name for place, name in signature.inputs_to_buffers.items()}
    graph = TracedGraph(program, parameters, buffers, DataFlow(program.graph), zero_nodes(program))
    graph = replace(graph, stored=_stored_buffers(graph, model, inputs))
    return replace(graph, flow=_without_dead_ends(graph))


def _without_dead_ends(graph: TracedGraph) -> DataFlow:
    """Erase the operations that no output depends on, as statistics for a plot, and return what depends on what then.

    What depends on parameters that are used nowhere else stays: a normalization may absorb their scale all the same.
    """
    nodes = graph.program.graph
    unused = [node for node in graph.parameters if node not in graph.live]
    # Functions of Python may act without a result, as those do that enter and leave `torch.vmap`.
    acting = [node for node in nodes.nodes if node.op == "call_function" and not _is_pure(node)]
    kept = graph.live_or_stored | graph.flow.needed([*acting, *graph.flow.behind(unused)])
    for node in reversed(nodes.nodes):
        if node.op == "call_function" and node not in kept:
            nodes.erase_node(node)
    return DataFlow(nodes)


def _is_pure(node: Node) -> bool:
    """Whether an operation does nothing but to return a result, and to write into arguments that are known."""
    return isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem


def _stored_buffers(graph: TracedGraph, model: nn.Module, inputs: Inputs) -> frozenset[Node]:
    """The buffers that only evaluation reads; see `TracedGraph`. The graph in evaluation mode is made where needed."""
    parameters = graph.parameters.keys()
    written = {
        node: name
        for node, name in graph.buffers.items()
        if node not in graph.live and not parameters.isdisjoint(graph.flow.needed(graph.flow.writers(node)))
    }
    if not written:
        return frozenset()
    training = [module for module in model.modules() if module.training]
    try:
        program = _export(model.eval(), inputs)
    except AnalysisError:
        return frozenset(written)
    finally:
        for module in training:
            module.training = True
    live = {node.name for node in DataFlow(program.graph).live()}
    read = {name for node, name in program.graph_signature.inputs_to_buffers.items() if node in live}
    return frozenset(node for node, name in written.items() if name in read)


def _export(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """Export a model in the mode that it is in."""
    args, kwargs = (tuple(tensors_in(inputs)), {}) if holds_objects(inputs) else inputs
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # torch.export prints the graph that it has so far where it meets control flow that depends on the data.
        quiet = contextlib.redirect_stderr(io.StringIO())
        with (
            warnings.catch_warnings(),
            quiet,
            nothing_left_behind(model),
            one_module_per_name(model),
            _tensors_only(model, inputs),
        ):
            warnings.simplefilter("ignore")
            try:
                program = torch.export.export(model, args, kwargs, strict=False)
            except RuntimeError as error:
                if _BY_DYNAMO not in str(error):
                    raise
                program = torch.export.export(model, args, kwargs, strict=True)
                _use_own_names(program)
    except Exception as error:
        raise AnalysisError(type(model).__name__, error) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    _inline_regions(program.graph)
    return program


def _inline_regions(graph: Graph) -> None:
    """Put what runs under autocast or in another gradient mode in the place of the operation that runs it.

    What comes out of a region without gradients is detached. Autocast has no effect on float64.
    """
    owner: Any = graph.owning_module
    while regions := [node for node in graph.nodes if op_name(node) in _REGIONS]:
        for region in regions:
            place = next(k for k, a in enumerate(region.args) if isinstance(a, Node) and a.op == "get_attr")
            held: Any = region.args[place]
            inner: Graph = owner.get_submodule(held.target).graph
            copies: dict[Node, Any] = dict(
                zip(inner.find_nodes(op="placeholder"), region.args[place + 1 :], strict=True)
            )
            with graph.inserting_before(region):
                results: Any = graph.graph_copy(inner, copies)
                if region.args[0] is False:
                    results = pytree.tree_map_only(Node, _detached, results)
            for attribute in inner.find_nodes(op="get_attr"):
                copies[attribute].target = f"{held.target}.{attribute.target}"
            if isinstance(results, Node):
                region.replace_all_uses_with(results)
            for picked in list(region.users):
                picked.replace_all_uses_with(results[picked.args[1]])
                graph.erase_node(picked)
            graph.erase_node(region)
            if not held.users:
                graph.erase_node(held)


def _detached(node: Node) -> Node:
    detached = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _use_own_names(program: torch.export.ExportedProgram) -> None:
    """Name modules from the model on: Dynamo names them from the function around its forward method."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack") or {}
            own = {key: (path.rpartition("__self__")[2].removeprefix("."), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = own


def zero_nodes(program: torch.export.ExportedProgram) -> frozenset[Node]:
    """The nodes of a graph whose entries are all zero when they are made, whatever the inputs.

    Constants and buffers that no checkpoint holds, such as the bias of keys in attention, and results that are filled
    with zeros.
    """
    signature = program.graph_signature
    held = {
        node: name for node, name in signature.inputs_to_buffers.items() if name in signature.non_persistent_buffers
    }
    held.update(signature.inputs_to_lifted_tensor_constants)
    found = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = program.constants.get(held.get(node.name, ""))
            zero = _has_values(value) and not bool(value.any())
        else:
            zero = node.op == "call_function" and (op_name(node) in _ZEROS or _is_filled_with_zeros(node))
        if zero:
            found.add(node)
    return frozenset(found)


def _has_values(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta


def _is_filled_with_zeros(node: Node) -> bool:
    if op_name(node) not in _FILLED:
        return False
    arguments = bound_arguments(node)
    value = arguments.get("fill_value", arguments.get("s"))
    return isinstance(value, (int, float)) and value == 0


@contextlib.contextmanager
def _tensors_only(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Let a model return the list of its output tensors, and take one where its inputs are inside objects.

    `torch.export` refuses classes that it does not know.
    """
    forward, places = model.forward, [id(tensor) for tensor in tensors_in(inputs)]

    @functools.wraps(forward)
    def flattened(*args: Any, **kwargs: Any) -> list[Tensor]:
        with following(model):
            return output_tensors(forward(*args, **kwargs))

    def unpacked(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(places, tensors, strict=True))
        args, kwargs = map_tensors(lambda tensor: given[id(tensor)], inputs)
        return flattened(*args, **kwargs)

    own = model.__dict__.get("forward")
    model.__dict__["forward"] = unpacked if holds_objects(inputs) else flattened
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
