"""The operators of one stage laid out on the mesh: forward tasks, with every redistribution an explicit task."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from planner.graph import Operator, Tensor, split_unit
from planner.layout import AXES, Layout, Partial, Replicate, Shard, Signature, redistribution, signatures
from planner.model import ModelSpec, attention_pairs
from planner.placement import Count, Sizes
from planner.plan import Training
from planner.program.tasks import Buffer, Task, Work

Layouts = dict[str, Layout]
"""A tensor's layout on each mesh axis that has more than one rank."""

EXTERNAL = ("ids", "targets", "weights")
"""Tensors of the micro-batch that the data gives; every rank holds its own rows and positions of them."""

STATISTICS_DIMS = {("seq", "batch"), ("seq", "batch", "two"), ("seq", "batch", "qk_heads"), ()}


def direction(task: Task, name: str) -> Task:
    """The same task under another direction in its key (a recomputed forward task)."""
    return replace(task, key=f"{task.key.rsplit('.', 1)[0]}.{name}", attributes=dict(task.attributes))


def generic(name: str) -> str:
    """A tensor's name without its layer number, for keys: "layers.3.ffn" becomes "layer.ffn"."""
    head, _, rest = name.partition(".")
    return f"layer.{rest.partition('.')[2]}" if head == "layers" else name


class Choices(Protocol):
    """What of a plan decides which tasks a stage has; sizes come from elsewhere."""

    @property
    def model(self) -> ModelSpec:
        """The model."""

    @property
    def layouts(self) -> dict[str, dict[str, str]]:
        """Signature of each operator on each axis."""

    @property
    def attention(self) -> str:
        """Implementation of the attention core."""

    @property
    def recompute(self) -> str:
        """What the backward pass computes again."""

    @property
    def training(self) -> Training:
        """For the dropout rate."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A consumer's view of a tensor: the buffer it reads, and the layouts in which it leaves the gradient."""

    buffer: str
    grad_layouts: Layouts


class StageForward:
    """Lays out the forward pass of the blocks of one stage, in order, and remembers what the backward pass needs.

    Raises:
        PlanError: the chosen signatures need a redistribution that does not exist.
    """

    def __init__(
        self, plan: Choices, stage: int, sizes: Sizes, axis_sizes: dict[str, int], item_bytes: int, reduced_bytes: int
    ) -> None:
        self.plan, self.stage, self.sizes = plan, stage, sizes
        self.reduced_bytes = reduced_bytes  # of an element while it is summed over ranks
        self.axes = tuple(axis for axis in AXES if axis_sizes[axis] > 1)
        self.axis_sizes, self.item_bytes = axis_sizes, item_bytes
        self.buffers: dict[str, Buffer] = {}
        self._shapes: dict[tuple[object, ...], tuple[Count, ...]] = {}  # layers repeat, so do shapes
        self.dims: dict[str, tuple[str, ...]] = {}
        self.layouts: dict[str, Layouts] = {}  # of each produced tensor
        self.grad_layouts: dict[str, Layouts] = {}  # that its producer needs for the gradient
        self.edges: dict[tuple[str, int], Edge] = {}
        self.tasks: dict[str, list[Task]] = {}  # by block
        self.where: dict[str, dict[str, tuple[str, ...]]] = {}  # by operator: the axes that shard seq, heads, vocab
        for name in EXTERNAL:
            self.declare(name, ("seq", "batch"), self._external_layouts(), category="buffers", dtype="index")

    def _external_layouts(self) -> Layouts:
        kinds: Layouts = {"dp": Shard("batch"), "cp": Shard("seq")}
        return {axis: kinds.get(axis, Replicate()) for axis in self.axes}

    def signature(self, operator: Operator, axis: str) -> Signature:
        """The signature that the plan chose for an operator on an axis."""
        return signatures(operator.kind, *operator.split)[self.plan.layouts[operator.role][axis]]

    def declare(
        self, name: str, dims: tuple[str, ...], layouts: Layouts, *, root: str | None = None,
        selector: str | None = None, category: str = "activations", dtype: str | None = None,
    ) -> Buffer:  # fmt: skip
        """Register a buffer of the micro-batch with its local shape under `layouts`."""
        place = (dims, *(layouts.get(axis) for axis in self.axes))
        shape = self._shapes.get(place)
        if shape is None:
            shape = tuple(self.sizes.size(dim, self.sharding(split_unit(dim), layouts)) for dim in dims)
            self._shapes[place] = shape
        kind = dtype or ("statistics" if dims in STATISTICS_DIMS else "compute")
        root = self.buffers[root].root if root in self.buffers else (root or name)
        self.buffers[name] = Buffer(shape, root, selector, category, kind)
        self.dims[name], self.layouts[name] = dims, layouts
        return self.buffers[name]

    @staticmethod
    def sharding(unit: str, layouts: Layouts) -> tuple[str, ...]:
        """The axes over which a dimension is sharded."""
        return tuple(axis for axis, layout in layouts.items() if isinstance(layout, Shard) and layout.dim == unit)

    def bytes_of(self, *names: str) -> Count:
        """Bytes of buffers, in the plan's precision."""
        total: Count = 0
        for name in names:
            buffer = self.buffers[name]
            item = (
                self.item_bytes if buffer.dtype == "compute" else max(4, self.item_bytes if self.item_bytes == 8 else 4)
            )
            total = total + math.prod(buffer.shape) * item
        return total

    def elements(self, name: str) -> Count:
        """Number of elements of a buffer."""
        return math.prod(self.buffers[name].shape)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def enter(self, tensor: str, dims: tuple[str, ...], layouts: Layouts) -> None:
        """Declare the stage's input, received from the stage before in the layout in which that one left it."""
        self.declare(tensor, dims, layouts)
        self.grad_layouts[tensor] = dict(layouts)

    def run(self, block: str, block_operators: list[Operator]) -> None:
        """Lay out one block."""
        out = self.tasks.setdefault(block, [])
        for operator in block_operators:
            reads = tuple(self.fetch(operator, i, out) for i in range(len(operator.inputs)))
            per_axis = {axis: self.signature(operator, axis) for axis in self.axes}
            for i, tensor in enumerate(operator.outputs):
                self._produce(operator, i, tensor, per_axis)
            for tensor in operator.saved:
                first = self.layouts[operator.outputs[0].name]
                self.declare(tensor.name, tensor.dims, dict(first), root=self._aliased(operator, tensor))
            self.where[operator.name] = self._where(operator, reads)
            if operator.kind == "attention":
                self._attention(operator, reads, out)
            else:
                out.append(self.forward_task(operator, reads))

    def _where(self, operator: Operator, reads: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Over which axes an operator's rows, heads and vocabulary columns are sharded: what kernels index by."""
        layouts = self.layouts[operator.outputs[0].name] if operator.outputs[0].dims else self.layouts[reads[0]]
        found = {unit: self.sharding(unit, layouts) for unit in ("seq", "heads", "ffn", "vocab")}
        if operator.kind == "attention":
            found["key_seq"] = self.sharding("seq", self.layouts[reads[1]])
        if operator.kind == "embedding":
            parameters = {axis: self.signature(operator, axis).parameters for axis in self.axes}
            found["vocab"] = self.sharding("vocab", parameters)
        return found

    def _produce(self, operator: Operator, i: int, tensor: Tensor, per_axis: dict[str, Signature]) -> None:
        layouts = {axis: signature.outputs[i] for axis, signature in per_axis.items()}
        selector = tensor.name.rsplit(".", 1)[-1] if operator.kind == "split_heads" else None
        self.declare(tensor.name, tensor.dims, layouts, root=self._aliased(operator, tensor), selector=selector)
        self.grad_layouts[tensor.name] = {axis: s.grad_outputs[i] for axis, s in per_axis.items()}

    def _aliased(self, operator: Operator, tensor: Tensor) -> str | None:
        """The buffer that a tensor is written into: the input's as this operator reads it, redistributed or not."""
        if tensor.alias_of is None:
            return None
        return self.edges[operator.name, operator.inputs.index(tensor.alias_of)].buffer

    def fetch(self, operator: Operator, i: int, out: list[Task]) -> str:
        """The buffer from which input `i` is read, after the redistributions that the layouts ask for."""
        tensor = operator.inputs[i]
        need = {axis: self.signature(operator, axis).inputs[i] for axis in self.axes}
        grads = {axis: self.signature(operator, axis).grad_inputs[i] for axis in self.axes}
        if tensor in EXTERNAL:
            self.edges[operator.name, i] = Edge(tensor, grads)
            return tensor
        name = tensor
        for axis in reversed(self.axes):  # inner axes first: gathering tp restores a whole part of cp
            name = self.redistribute(name, tensor, axis, need[axis], out, "forward")
        self.edges[operator.name, i] = Edge(name, grads)
        return name

    def redistribute(
        self, name: str, tensor: str, axis: str, target: Layout, out: list[Task], way: str, phase: str = "F"
    ) -> str:
        """Append the collective that brings buffer `name` of `tensor` into `target` on `axis`; the resulting buffer."""
        source = self.layouts[name][axis]
        collective = redistribution(source, target)
        if collective is None:
            return name
        result = f"{name}@{axis}.{target}"
        if result in self.buffers and way == "forward":
            return result  # another consumer asked for the same before
        layouts = self.layouts[name] | {axis: target}
        in_place = collective in ("all_reduce", "slice")
        category = self.buffers[name].category
        self.declare(result, self.dims[name], layouts, root=name if in_place else None, category=category)
        out.append(self._collective(collective, name, result, tensor, axis, source, target, way, phase))
        return result

    def _collective(
        self, kind: str, name: str, result: str, tensor: str, axis: str, source: Layout, target: Layout,
        way: str, phase: str,
    ) -> Task:  # fmt: skip
        attributes: dict[str, Any] = {}
        if isinstance(source, Partial):
            attributes["op"] = source.op
        for label, layout, holder in (("source", source, name), ("target", target, result)):
            if isinstance(layout, Shard):
                attributes[label] = self._extent(holder, layout.dim, axis)
        full = self.bytes_of(result if kind == "all_gather" else name)
        payload = self.bytes_of(name)
        if isinstance(source, Partial) and self.buffers[name].dtype == "compute":
            full = payload = self.elements(name) * self.reduced_bytes
        key = f"{axis}.{kind}.{generic(tensor)}.{way}"
        work = Work(bytes=payload, full_bytes=full, elements=self.elements(name))
        return Task(
            key, kind, tensor, phase, reads=(name,), writes=(result,), axis=axis, attributes=attributes, work=work
        )

    def _extent(self, name: str, unit: str, axis: str) -> tuple[int, tuple[int, ...]]:
        """Position of the dimension split in `unit` and every peer's extent of it along `axis`."""
        dims = self.dims[name]
        position = next(i for i, dim in enumerate(dims) if split_unit(dim) == unit)
        extents = self.sizes.extents(dims[position], self.sharding(unit, self.layouts[name]), axis)
        return position, extents

    def forward_task(self, operator: Operator, reads: tuple[str, ...]) -> Task:
        """The forward task of an operator that is one kernel."""
        writes = tuple(t.name for t in (*operator.outputs, *operator.saved))
        reads = reads + (("targets", "weights") if operator.kind == "loss" else ())
        reads = reads + (("targets",) if operator.kind == "exp_sum" else ())
        return Task(
            key=f"{self.stage}.{operator.role}.forward",
            kind=f"{operator.kind}.forward",
            name=operator.name,
            reads=reads,
            writes=writes,
            parameters=tuple(p.name for p in operator.parameters),
            attributes=dict(operator.attributes) | {"where": self.where[operator.name]},
            work=self.work(operator, reads, writes),
        )

    def work(self, operator: Operator, reads: tuple[str, ...], writes: tuple[str, ...]) -> Work:
        """Product sizes of a linear layer; elements and bytes moved of anything else."""
        moved = self.bytes_of(*dict.fromkeys((*reads, *writes)))
        if operator.kind == "linear":
            x, y = self.buffers[reads[0]].shape, self.buffers[writes[0]].shape
            return Work(m=x[0] * x[1], k=x[2], n=y[2], bytes=moved, elements=self.elements(writes[0]))
        largest = reads[0] if operator.kind in ("logits_max", "exp_sum", "loss", "gated") else writes[0]
        return Work(elements=self.elements(largest), bytes=moved)

    # ---- attention: one operator, several implementations ------------------------------------------------------------

    def attention_kind(self, operator: Operator) -> str:
        """The implementation that the plan runs for an attention operator."""
        if "cp" in self.axes and self.signature(operator, "cp").name == "ring":
            return "ring"
        return self.plan.attention

    def attention_work(self, q: str, k: str, share: Any = 1.0, products: int = 2) -> Work:
        """`products` batched products of [Sq, d]·[d, Sk] per head."""
        (queries, batch, heads, width), keys = self.buffers[q].shape, self.buffers[k].shape[0]
        pairs = queries * keys * batch * heads
        return Work(
            m=queries, n=keys, k=width, batch=batch * heads * products, elements=pairs,
            bytes=self.bytes_of(q, k, k, q), share=share,
        )  # fmt: skip

    def visible(self, operator: Operator, q: str, k: str) -> Any:
        """Share of query-key pairs that the mask leaves, averaged over a whole sequence."""
        return visible_share(self.plan.model.seq_len, operator.attributes["causal"], operator.attributes["window"])

    def _attention(self, operator: Operator, reads: tuple[str, ...], out: list[Task]) -> None:
        q, k, v = reads
        implementation = self.attention_kind(operator)
        target = operator.outputs[0].name
        layouts = dict(self.layouts[q])
        if implementation == "plain":
            shape = ("batch", "heads", "seq", "key_seq")
            self._declare_probabilities(f"{operator.name}.probabilities", shape, q, k)
            saved = f"{operator.name}.probabilities"
        else:
            saved = f"{operator.name}.logsumexp"
            self.declare(saved, ("batch", "heads", "seq"), layouts, dtype="statistics")
        attributes = dict(operator.attributes) | {"where": self.where[operator.name]}
        if implementation == "ring":
            self._ring_forward(operator, reads, target, saved, attributes, out)
            return
        out.append(
            Task(
                f"{self.stage}.{operator.role}.forward", f"attention_{implementation}.forward", operator.name,
                reads=(q, k, v), writes=(target, saved), attributes=attributes,
                work=self.attention_work(q, k, self.visible(operator, q, k)),
            )
        )  # fmt: skip

    def _declare_probabilities(self, name: str, dims: tuple[str, ...], q: str, k: str) -> None:
        (queries, batch, heads, _), keys = self.buffers[q].shape, self.buffers[k].shape[0]
        self.buffers[name] = Buffer((batch, heads, queries, keys), name)
        self.dims[name], self.layouts[name] = dims, dict(self.layouts[q])

    def _ring_forward(
        self,
        operator: Operator,
        reads: tuple[str, ...],
        target: str,
        saved: str,
        attributes: dict[str, Any],
        out: list[Task],
    ) -> None:
        """Ring attention (Liu et al. 2023, arXiv:2310.01889): fold one block, pass K and V on, fold the next."""
        q, k, v = reads
        running = f"{operator.name}.running_max"
        self.declare(running, ("batch", "heads", "seq"), dict(self.layouts[q]), category="buffers", dtype="statistics")
        summed = self._accumulator(operator, target)
        for step in range(self.axis_sizes["cp"]):
            if step:
                k, v = self.ring_shift(operator, (k, v), step, out, "forward")
            out.append(
                Task(
                    f"{self.stage}.{operator.role}.forward", "attention_step.forward", operator.name,
                    reads=(q, k, v) + ((summed, running, saved) if step else ()), writes=(summed, running, saved),
                    attributes=attributes | {"step": step},
                    work=self.attention_work(q, k, self.visible(operator, q, k)),
                )
            )  # fmt: skip
        out.append(
            Task(
                f"{self.stage}.layer.attention_finish.forward", "attention_finish.forward", operator.name,
                reads=(summed, running, saved), writes=(target, saved), attributes=attributes,
                work=Work(elements=self.elements(target), bytes=self.bytes_of(summed, target)),
            )
        )  # fmt: skip

    def _accumulator(self, operator: Operator, target: str) -> str:
        """Where a ring sums its unnormalised output: in the output itself, or in float32 beside one of 16 bits.

        The sum grows with the keys seen, in long sequences beyond float16's range.
        """
        if self.item_bytes >= 4:
            return target
        name, layouts = f"{operator.name}.accumulator", dict(self.layouts[target])
        self.declare(name, self.dims[target], layouts, category="buffers", dtype="statistics")
        return name

    def ring_shift(
        self, operator: Operator, names: tuple[str, ...], step: int, out: list[Task], way: str, phase: str = "F",
        into: tuple[str, ...] | None = None,
    ) -> tuple[str, ...]:  # fmt: skip
        """Pass buffers to the next rank of the ring; `step` shifts have been made once this one is done."""
        results = list(into or ())
        for name in names if into is None else ():
            result = f"{name.split('@ring')[0]}@ring{step}"
            shape = list(self.buffers[name].shape)
            shape[0] = self.sizes.ring_extent("seq", step)
            self.buffers[result] = Buffer(tuple(shape), result, None, "buffers")
            self.dims[result], self.layouts[result] = self.dims[name], self.layouts[name]
            results.append(result)
        payload = self.bytes_of(*names)
        out.append(
            Task(
                f"cp.ring_shift.layer.{'+'.join(n.rsplit('.', 1)[-1].split('@')[0] for n in names)}.{way}",
                "ring_shift", operator.name, phase, reads=names, writes=tuple(results), axis="cp",
                attributes={"step": step}, work=Work(bytes=payload, full_bytes=payload),
            )
        )  # fmt: skip
        return tuple(results)


def visible_share(seq_len: int, causal: bool, window: int | None) -> float:
    """Share of the S² query-key pairs that a causal mask and an attention window leave visible."""
    return attention_pairs(seq_len, causal=causal, window=window) / seq_len**2
