"""The backward pass of a stage: gradients with layouts of their own, summed where a tensor has several consumers."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph import Operator
from planner.program.stage import EXTERNAL, Layouts, StageForward, direction
from planner.program.tasks import Buffer, Task, Work


@dataclass(slots=True)
class Contribution:
    """A gradient that one or more consumers left for a tensor, in the layout in which they left it."""

    buffer: str
    layouts: Layouts


class StageBackward:
    """Lays out the backward pass of one stage in reverse order of its forward pass.

    `split` keeps what the weight gradients need apart until a later W instruction; without it a buffer may be reused as
    soon as the operator is done.
    """

    def __init__(self, forward: StageForward, *, split: bool) -> None:
        self.forward, self.plan, self.split = forward, forward.plan, split
        self.tasks: dict[str, list[Task]] = {}
        self.out: list[Task] = []
        self.contributions: dict[str, list[Contribution]] = {}
        self.gathered: set[str] = set()

    # ---- gradients -------------------------------------------------------------------------------------------------

    def leave(self, tensor: str) -> str:
        """The stage's output: its gradient is received from the next stage, in the output's own layout."""
        name = f"{tensor}.grad"
        self._declare_grad(name, tensor, self.forward.layouts[tensor])
        self.contributions.setdefault(tensor, []).append(Contribution(name, dict(self.forward.layouts[tensor])))
        return name

    def _declare_grad(self, name: str, like: str, layouts: Layouts, root: str | None = None) -> None:
        forward = self.forward
        if like in forward.dims:
            forward.declare(name, forward.dims[like], dict(layouts), root=root, category="buffers")

    def target(
        self, operator: Operator, i: int, *, accumulate: bool, root: str | None = None
    ) -> tuple[str | None, bool]:
        """Where the operator's backward task writes the gradient of input `i`, and whether it adds to what is there.

        With `root` the gradient takes over (or views) that buffer. None for inputs that have no gradient.
        """
        tensor = operator.inputs[i]
        if tensor in EXTERNAL:
            return None, False
        edge = self.forward.edges[operator.name, i]
        existing = self.contributions.setdefault(tensor, [])
        for contribution in existing:
            if contribution.layouts == edge.grad_layouts and accumulate and root is None:
                return contribution.buffer, True
        name = f"{tensor}.grad" + (f".{len(existing)}" if existing else "")
        self._declare_grad(name, edge.buffer, edge.grad_layouts, root)
        existing.append(Contribution(name, edge.grad_layouts))
        return name, False

    def pass_on(self, operator: Operator, i: int, gradient: str | None) -> None:
        """The gradient of input `i` is one that exists already, unchanged."""
        assert gradient is not None
        edge = self.forward.edges[operator.name, i]
        self.contributions.setdefault(operator.inputs[i], []).append(Contribution(gradient, edge.grad_layouts))

    def gradient(self, tensor: str) -> str | None:
        """The gradient of a produced tensor in the layout that its producer needs; None if nobody consumed it."""
        need = self.forward.grad_layouts[tensor]
        names = []
        for contribution in self.contributions.get(tensor, []):
            name = contribution.buffer
            for axis in self.forward.axes:
                name = self.forward.redistribute(name, tensor, axis, need[axis], self.out, "backward", "I")
            names.append(name)
        for other in names[1:]:
            work = Work(elements=self.forward.elements(other), bytes=3 * self.forward.bytes_of(other))
            key = f"{self.forward.stage}.layer.add.backward"
            self.out.append(
                Task(key, "add", tensor, "I", reads=(names[0], other), writes=(names[0],), work=work)
            )  # fmt: skip
        return names[0] if names else None

    # ---- operators -------------------------------------------------------------------------------------------------

    def run(self, block: str, block_operators: list[Operator]) -> None:
        """Lay out the backward pass of one block; recomputes it first where the plan says so."""
        self.out = self.tasks.setdefault(block, [])
        if self.plan.recompute == "full" and block.startswith("layers"):
            self.out += [direction(self._as_backward(task), "recompute") for task in self.forward.tasks[block]]
        for operator in reversed(block_operators):
            grads = tuple(self.gradient(t.name) for t in operator.outputs)
            getattr(self, f"_{operator.kind}")(operator, grads)

    @staticmethod
    def _as_backward(task: Task) -> Task:
        copy = direction(task, "recompute")
        copy.phase = "I"
        return copy

    def emit(
        self, operator: Operator, kind: str, reads: tuple[str | None, ...], writes: tuple[str | None, ...], *,
        phase: str = "I", way: str = "backward", gradients: bool = True, work: Work | None = None, **attributes: object,
    ) -> None:  # fmt: skip
        """Append a backward task of an operator; None marks an absent optional argument."""
        forward = self.forward
        real = tuple(dict.fromkeys(name for name in (*reads, *writes) if name is not None))
        if work is None:
            largest = max(real, key=lambda name: len(forward.buffers[name].shape))
            work = Work(elements=forward.elements(largest), bytes=forward.bytes_of(*real))
        self.out.append(
            Task(
                f"{forward.stage}.{operator.role}.{way}", kind, operator.name, phase,
                reads=tuple(name for name in reads if name is not None),
                writes=tuple(name for name in writes if name is not None),
                parameters=tuple(p.name for p in operator.parameters),
                gradients=tuple(p.name for p in operator.parameters) if gradients else (),
                attributes=dict(operator.attributes) | {"where": forward.where[operator.name]} | attributes, work=work,
            )
        )  # fmt: skip

    def _linear(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        (dy,) = grads
        assert dy is not None
        x = self.forward.edges[operator.name, 0].buffer
        product = self.forward.work(operator, (x,), (dy,))
        dx, accumulate = self.target(operator, 0, accumulate=True)
        for_input = Work(m=product.m, n=product.k, k=product.n, bytes=product.bytes, elements=self.forward.elements(x))
        reads = (dy, dx) if accumulate else (dy,)
        self.emit(
            operator, "linear.backward_input", reads, (dx,), way="backward_input", gradients=False, work=for_input,
            accumulate=accumulate,
        )  # fmt: skip
        self._gather_again(operator, x)
        for_weight = Work(m=product.k, n=product.n, k=product.m, bytes=product.bytes, elements=product.k * product.n)
        self.emit(operator, "linear.backward_weight", (x, dy), (), phase="W", way="backward_weight", work=for_weight)

    def _gather_again(self, operator: Operator, x: str) -> None:
        """Gather a sequence-parallel input again for its weight gradient rather than keep it whole.

        Korthikanti et al. 2022 (arXiv:2205.05198), §4.2.2: this is what lets sequence parallelism save memory.
        """
        block = operator.name.rsplit(".", 1)[0]
        for task in self.forward.tasks.get(block, []):
            if task.kind == "all_gather" and task.axis == "tp" and task.writes == (x,) and x not in self.gathered:
                copy = direction(task, "regather")
                copy.phase = "W"
                self.out.append(copy)
                self.gathered.add(x)

    def _embedding(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        self.emit(operator, "embedding.backward", ("ids", grads[0]), (), phase="W", way="backward_weight")

    def _positions(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        dx, _ = self.target(operator, 0, accumulate=False, root=grads[0])
        self.emit(operator, "positions.backward", (grads[0],), (dx,))

    def _norm(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        x = self.forward.edges[operator.name, 0].buffer
        dx, accumulate = self.target(operator, 0, accumulate=True)
        saved = tuple(t.name for t in operator.saved)
        reads = (grads[0], x, *saved, *((dx,) if accumulate else ()))
        self.emit(operator, "norm.backward", reads, (dx,), accumulate=accumulate)

    def _residual(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        reuse = grads[0] if self._may_reuse else None
        dx, _ = self.target(operator, 0, accumulate=False, root=reuse)
        self.pass_on(operator, 1, grads[0])
        self.emit(operator, "residual.backward", (grads[0],), (dx,))

    @property
    def _may_reuse(self) -> bool:
        """Without dropout the branch's gradient is the sum's own, unless later W tasks still need both."""
        return self.plan.training.dropout == 0 and not self.split

    def _residual_norm(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        d_stream, d_normed = grads
        d_residual, _ = self.target(operator, 1, accumulate=False)
        dx, _ = self.target(operator, 0, accumulate=False, root=d_residual if self._may_reuse else None)
        stream, saved = operator.outputs[0].name, tuple(t.name for t in operator.saved)
        self.emit(
            operator, "residual_norm.backward", (d_normed, stream, *saved, d_stream), (dx, d_residual),
            has_stream_gradient=d_stream is not None,
        )  # fmt: skip

    def _activation(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        dx, _ = self.target(operator, 0, accumulate=False, root=grads[0])
        self.emit(operator, "activation.backward", (grads[0], operator.saved[0].name), (dx,))

    def _gated(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        dx, _ = self.target(operator, 0, accumulate=False)
        self.emit(operator, "gated.backward", (grads[0], self.forward.edges[operator.name, 0].buffer), (dx,))

    def _split_heads(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        """The packed gradient may already hold views that attention's backward wrote; the rest is copied in."""
        packed = f"{operator.inputs[0]}.grad"
        if packed not in self.forward.buffers:
            packed, _ = self.target(operator, 0, accumulate=False)  # type: ignore[assignment]
        else:
            self.pass_on(operator, 0, packed)
        saved = tuple(t.name for t in operator.saved)
        self.emit(operator, "split_heads.backward", (*grads, *saved), (packed,))

    def _packed_view(self, operator: Operator, i: int) -> str | None:
        """Name of the packed gradient if the gradient of input `i` can be written straight into its columns."""
        forward, tensor = self.forward, operator.inputs[i]
        edge = forward.edges[operator.name, i]
        buffer = forward.buffers[tensor]
        if buffer.selector is None or edge.grad_layouts != forward.grad_layouts[tensor]:
            return None
        packed = f"{buffer.root}.grad"
        if packed not in forward.buffers:
            producer = next(
                iter(forward.edges[key] for key in forward.edges if forward.edges[key].buffer == buffer.root)
            )
            self._declare_grad(packed, buffer.root, producer.grad_layouts)
        return packed

    def _attention(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        forward = self.forward
        implementation = forward.attention_kind(operator)
        if implementation == "plain" and self.plan.recompute == "selective":
            self._recompute_core(operator)
        q, k, v = (forward.edges[operator.name, i].buffer for i in range(3))
        targets = []
        for i in range(3):
            packed = self._packed_view(operator, i) if implementation != "ring" or i == 0 else None
            name, _ = self.target(operator, i, accumulate=False, root=packed)
            assert name is not None
            if packed is not None:
                buffer = forward.buffers[name]
                selector = operator.inputs[i].rsplit(".", 1)[-1]
                forward.buffers[name] = Buffer(buffer.shape, buffer.root, selector, "buffers")
            targets.append(name)
        if implementation == "ring":
            self._ring_backward(operator, grads[0], (q, k, v), targets)
            return
        saved = f"{operator.name}.{'probabilities' if implementation == 'plain' else 'logsumexp'}"
        out = () if implementation == "plain" else (operator.outputs[0].name,)
        products = 4 if implementation == "plain" else 5
        self.emit(
            operator, f"attention_{implementation}.backward", (grads[0], q, k, v, *out, saved), tuple(targets),
            work=forward.attention_work(q, k, forward.visible(operator, q, k), products),
        )  # fmt: skip

    def _recompute_core(self, operator: Operator) -> None:
        """Selective recomputation (Korthikanti et al. 2022, §5): the core again, its output into scratch."""
        block = operator.name.rsplit(".", 1)[0]
        (task,) = [t for t in self.forward.tasks[block] if t.name == operator.name]
        scratch = f"{operator.name}.scratch"
        attended = operator.outputs[0].name
        self._declare_grad(scratch, attended, self.forward.layouts[attended])
        copy = direction(self._as_backward(task), "recompute")
        copy.writes = (scratch, task.writes[1])
        self.out.append(copy)

    def _ring_backward(
        self, operator: Operator, d_out: str | None, qkv: tuple[str, str, str], targets: list[str]
    ) -> None:
        """K, V and their gradients travel the ring together; after as many shifts as ranks the gradients are home."""
        forward, (q, k, v) = self.forward, qkv
        size, saved, out = forward.axis_sizes["cp"], f"{operator.name}.logsumexp", operator.outputs[0].name
        delta = f"{operator.name}.delta"
        forward.declare(
            delta, ("batch", "heads", "seq"), dict(forward.layouts[q]), category="buffers", dtype="statistics"
        )
        self.emit(operator, "attention_delta.backward", (d_out, out), (delta,), gradients=False)
        dk, dv = f"{k}.grad_block", f"{v}.grad_block"
        for name, like in ((dk, k), (dv, v)):
            self._declare_grad(name, like, forward.layouts[like])
        dq = targets[0]
        for step in range(size):
            if step:
                k, v = forward.ring_shift(operator, (k, v), step, self.out, "backward", "I")
                dk, dv = forward.ring_shift(operator, (dk, dv), step, self.out, "backward", "I")
            reads = (d_out, q, k, v, saved, delta) + ((dq, dk, dv) if step else ())
            work = forward.attention_work(q, k, forward.visible(operator, q, k), 5)
            self.emit(
                operator, "attention_step.backward", reads, (dq, dk, dv), gradients=False, work=work,
                step=step,
            )  # fmt: skip
        forward.ring_shift(operator, (dk, dv), size, self.out, "backward", "I", into=tuple(targets[1:]))

    def _logits_max(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        self.pass_on(operator, 0, grads[0])
        if operator.parameters:
            self.emit(operator, "bias.backward", (grads[0],), ())

    def _exp_sum(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        self.pass_on(operator, 0, grads[0])

    def _loss(self, operator: Operator, grads: tuple[str | None, ...]) -> None:
        exp, stats = (self.forward.edges[operator.name, i].buffer for i in range(2))
        dlogits, _ = self.target(operator, 0, accumulate=False, root=exp)
        self.emit(operator, "loss.backward", (exp, stats, "targets", "weights"), (dlogits,))
