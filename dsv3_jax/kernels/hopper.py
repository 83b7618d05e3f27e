"""What our Mosaic GPU kernels share: matrix products of a warpgroup, loads in their layout, and a ring of buffers.

A Hopper GPU (compute capability 9.0) multiplies matrices by `wgmma`: a warpgroup of 128 threads holds the result in its
registers, in one fixed layout, and takes both factors from shared memory, or the left one from registers. In interpret
mode there are no layouts, and the interpreter knows neither accumulators with a first value nor factors in registers:
here plain JAX stands in for those few, so that everything else of a kernel (its copies, barriers, slots, loops, masks
and arithmetic) is what runs on the chip.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP_ROWS = 64  # of a product
SWIZZLE_BYTES = 128
TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters  # from jax 0.12 on


def refusal(dtype: Any) -> str | None:
    """Why the kernels cannot run inputs of this dtype here; None if they can."""
    if jax.default_backend() != "gpu":  # interpreted: a thread waits for each warpgroup
        return (
            None
            if len(jax.local_devices()) >= 4
            else ("interpreting it takes four threads: set XLA_FLAGS=--xla_force_host_platform_device_count=4 or more")
        )
    if jnp.dtype(dtype).itemsize != 2:
        return f"tensor cores multiply bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if (capability := jax.local_devices()[0].compute_capability) != "9.0":
        return f"it is written for Hopper, compute capability 9.0; this GPU has {capability}"
    return None


def _interpreter() -> Any:
    """What makes `plgpu.kernel` interpret. A device of the host runs each warpgroup, and waits when it waits."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from 0.11 on

    return InterpretGPUParams()


def launch(
    name: str,
    kernel: Callable[[Any, Any, Any], None],
    grid: dict[str, int],
    warpgroups: int,
    inputs: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    shared: Sequence[Any],
    barriers: Sequence[Any],
    cost: pl.CostEstimate,
    interpret: bool,
) -> Any:
    """Runs kernel(refs of inputs and outputs, shared memory, barriers) in a block of threads for each place of a grid.

    Args:
      name: what profilers show. grid: size of each axis by name, the last one innermost; a warpgroup finds its own
        index along "warpgroup". outputs: shape and dtype of each. shared, barriers: what to allocate. cost: what XLA
        counts, where jax passes it on (`TAKES_COST`).
    """

    def body(*refs):
        kernel(
            refs[: len(inputs) + len(outputs)],
            refs[-len(shared) - len(barriers) : -len(barriers)],
            refs[-len(barriers) :],
        )

    body.__name__ = name
    more: dict[str, Any] = {"cost_estimate": cost} if TAKES_COST else {}
    run = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types=[*shared, *barriers],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if interpret else None,
        **more,
    )
    return run(*inputs)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """The operations of a warpgroup; with `interpret`, their stand-ins."""

    interpret: bool

    def matrix(self, *shape: int, dtype: Any, swizzle: int = SWIZZLE_BYTES) -> Any:
        """Shared memory for matrices [..., rows, width], laid out as `wgmma` reads them.

        swizzle: in bytes, one for all factors of a kernel; a right factor has at least as many rows as it has elements.
        """
        if self.interpret:
            return plgpu.SMEM(shape, dtype)
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    def zeros(self, rows: int, columns: int) -> jax.Array:
        """A float32 result to add to."""
        return self._laid_out(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)

    def full(self, length: int, value: float) -> jax.Array:
        """A float32 value for each row of a result."""
        return self._laid_out(jnp.full((length,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """The index along an axis of a result, int32."""
        return self._laid_out(jax.lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)

    def load(self, ref: Any, of_rows: bool) -> jax.Array:
        """A vector in shared memory, one element for each row of a result, or for each column."""
        return self._laid_out(ref[...], plgpu.Layout.WGMMA.reduce(1 if of_rows else 0))

    def widened(self, matrix: Any, dtype: Any) -> jax.Array:
        """8-bit numbers of a matrix in shared memory, in a 16-bit dtype that holds them exactly; to be stored there."""
        if self.interpret:
            return matrix[...].astype(jnp.float32).astype(dtype)
        values = self._laid_out(matrix[...], plgpu.Layout.WGMMA_UPCAST_2X)
        if values.dtype != jnp.int8 and dtype != jnp.float16:  # a Hopper GPU turns 8-bit floats into float16 alone
            values = values.astype(jnp.float16).astype(jnp.float32)
        return self._laid_out(values.astype(dtype), plgpu.Layout.WGMMA)

    def transposed(self, matrix: Any) -> Any:
        """A matrix in shared memory as a factor, read across."""
        return _Transposed(matrix) if self.interpret else plgpu.transpose_ref(matrix, (1, 0))

    def products(
        self,
        *sums: tuple[jax.Array, Callable[[], Sequence[tuple[Any, Any]]]],
        meanwhile: Callable[..., Any] = lambda: None,
        value: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """acc + Σ a · b of each (acc, factors), where factors() gives pairs a, b; all are issued before one is waited
        for.

        a: in shared memory or, in the 16-bit dtype of b, in registers. b: in shared memory. meanwhile: what is done
        between. With a `value`, meanwhile(value) is returned after the sums.
        """
        values = [] if value is None else [value]
        if self.interpret:
            found = [meanwhile(*values)] if values else meanwhile() or []
            return *(sum((_plain_product(a, b) for a, b in factors()), acc) for acc, factors in sums), *found

        def body(refs):
            for acc_ref, (_, factors) in zip(refs, sums, strict=False):
                for a, b in factors():
                    plgpu.wgmma(acc_ref, a, b)
            if values:
                refs[-1][...] = meanwhile(refs[-1][...])
            else:
                meanwhile()

        return cast(Any, pl.run_state(body)((*(plgpu.ACC.init(acc) for acc, _ in sums), *values)))

    def contraction(
        self,
        ring: "Ring",
        steps: Any,
        shapes: Sequence[tuple[int, int]],
        factors: Callable[[Any, Any], Any],
        prepare: Callable[[Any, Any], None] | None = None,
    ) -> list[jax.Array]:
        """Σ a · b over the steps of a ring, of each shape. factors(step, slot): (a, b) of each, in shared memory.
        prepare(step, slot): what is done with a slot before its factors are read.

        The products of a step are in flight while the next one's are issued: a slot is released a step late. Plain JAX
        multiplies a step late too, after the next one is prepared.
        """
        prepare = prepare or (lambda step, slot: None)
        if self.interpret:

            def multiply(step, accs):
                """The step before."""
                before = jnp.maximum(step - 1, 0)
                terms = [_plain_product(a, b) for a, b in factors(before, ring.slot(before))]
                pl.when(step > 0)(lambda: ring.release(before))
                return [jnp.where(step > 0, acc + term, acc) for acc, term in zip(accs, terms, strict=True)]

            def turn(step, accs):
                prepare(step, ring.wait(step))
                return multiply(step, accs)

            return multiply(steps, jax.lax.fori_loop(0, steps, turn, [self.zeros(*shape) for shape in shapes]))

        def scope(*acc_refs):
            @pl.loop(0, steps)
            def _(step):
                slot = ring.wait(step)
                prepare(step, slot)
                for acc_ref, (a, b) in zip(acc_refs, factors(step, slot), strict=True):
                    plgpu.wgmma(acc_ref, a, b)
                plgpu.wgmma_wait(len(shapes))
                pl.when(step > 0)(lambda: ring.release(step - 1))

            accs = [acc_ref[...] for acc_ref in acc_refs]
            pl.when(steps > 0)(lambda: ring.release(steps - 1))
            return accs

        return cast(Any, pl.run_scoped(scope, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))

    def store(self, *results: tuple[jax.Array, Any, Any]) -> None:
        """Copies each (values, through shared memory, to global memory), in the dtype of these."""
        for values, smem, _ in results:
            smem[...] = values.astype(smem.dtype)
        plgpu.commit_smem()
        for _, smem, ref in results:
            plgpu.copy_smem_to_gmem(smem, ref)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _laid_out(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)


class _Transposed(NamedTuple):
    matrix: Any


def _plain_product(a: Any, b: Any) -> jax.Array:
    def value(x: Any) -> jax.Array:
        return x.matrix[...].T if isinstance(x, _Transposed) else x if isinstance(x, jax.Array) else x[...]

    return jnp.dot(value(a), value(b), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers in shared memory, one a slot, that one warpgroup fills and others read, step by step.

    full, free: a barrier for each slot (`barriers`).
    """

    slots: int
    full: Any
    free: Any

    @staticmethod
    def barriers(slots: int, copies: int, readers: int) -> tuple[Any, Any]:
        """What to allocate for `full` and `free`. copies: into a slot, a step. readers: warpgroups."""
        return (
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        )

    def slot(self, step: Any) -> Any:
        """The slot of a step."""
        return jax.lax.rem(step, jnp.int32(self.slots))

    def claim(self, step: Any) -> tuple[Any, Any]:
        """(slot, barrier that the copies into it arrive at), once all have released it."""
        slot = self.slot(step)
        pl.when(step >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        return slot, self.full.at[slot]

    def wait(self, step: Any) -> Any:
        """The slot of a step, once it is full."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step: Any) -> None:
        """This warpgroup has read the slot of a step."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def drain(self, steps: Any) -> None:
        """The warpgroup that fills waits until all have released every slot. After `steps` steps."""

        @pl.loop(jnp.maximum(steps - self.slots, 0), steps)
        def _(step):
            plgpu.barrier_wait(self.free.at[self.slot(step)])
