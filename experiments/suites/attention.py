"""Attention alone, causal: ours against XLA's, cuDNN's, splash, tokamax's and PyTorch's, by length and window, with and
without gradients.

Where there is a window, ours without one runs too: what a window is worth. Memory is of the compiled program. What rows
are compared with is measured first: the rate of a large matmul, and of a large copy.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError, Full, Windowed
from experiments.suites import Case, launched, launches, matmul_rate, rate

UNIT = "tokens/s"
UNLIMITED = "dsv3_jax, no window"  # beside a case with a window


class Sizes(NamedTuple):
    """longest_dense: the longest row of which contenders that keep all scores are asked for. longest_blocked: of which
    "blocked" is without a window, whose program grows with the row. matmul, copy: sides of the square matrices whose
    product and whose copy are timed. flex: lengths that flex_attention is asked for, which compiles for long."""

    lengths: tuple[int, ...]
    windows: tuple[int | None, ...]
    heads: int
    width: int
    dtype: str
    longest_dense: int
    longest_blocked: int = 32768
    matmul: int = 8192
    copy: int = 16384
    flex: tuple[int, ...] = (32768,)


SIZES = {
    "cpu": Sizes((2048, 8192), (512, None), 2, 64, "float32", 8192, matmul=2048, copy=8192, flex=(2048, 8192)),
    "gpu": Sizes((32768, 8192, 131072, 2048), (4096, 512, None), 16, 128, "bfloat16", 16384),
    "tpu": Sizes((32768, 8192, 131072, 2048), (4096, 512, None), 16, 128, "bfloat16", 16384),
}
TOKAMAX = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}  # its kernels, where there are kernels at all


def _ours(window: int | None, implementation: str | None = None) -> Callable:
    from dsv3_jax.kernels.windowed_attention import windowed_attention

    def attend(q, k, v):
        pattern = Full() if window is None else Windowed(window)
        scale = q.shape[-1] ** -0.5
        return windowed_attention(q, k, v, pattern=pattern, scale=scale, implementation=implementation)[0]

    return attend


def _like_jax_nn(attend: Any, window: int | None, implementation: Any) -> Callable:
    """Of jax.nn's, and of tokamax's, which takes the same arguments."""
    sides = None if window is None else (window - 1, 0)
    return functools.partial(attend, is_causal=True, local_window_size=sides, implementation=implementation)


def _splash(length: int, window: int | None, heads: int, interpret: bool = False) -> Callable:
    import jax.numpy as jnp

    from experiments.peers.splash_attention import make_attention

    block = 512 if window is not None and window <= 512 else 1024
    attention = make_attention(length, window or 0, min(block, length), heads, interpret)

    def attend(q, k, v):
        q, k, v = (jnp.swapaxes(x[0], 0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.swapaxes(attention(q, k, v), 0, 1)[None]

    return attend


def _timed(attend: Callable, inputs: tuple, gradients: bool) -> tuple[Callable[..., object], int]:
    """A call to time, and the bytes of its temporaries."""
    import jax
    import jax.numpy as jnp

    def loss(q, k, v):
        out = attend(q, k, v)
        return 0.5 * jnp.sum(jnp.square(out.astype(jnp.float32))), out  # its gradient depends on out

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True) if gradients else attend)
    compiled = step.lower(*inputs).compile()
    memory = compiled.memory_analysis()
    return lambda: compiled(*inputs), memory.temp_size_in_bytes if memory else 0


def _measure_limits(sizes: Sizes) -> tuple[float, float]:
    """FLOP/s of a product of square matrices, and bytes/s, read and written, of a copy of one."""
    import jax

    x = jax.random.normal(jax.random.key(0), (sizes.copy, sizes.copy), sizes.dtype)
    return matmul_rate(sizes.matmul, sizes.dtype), rate(lambda x: x + 1, 2 * x.nbytes, x)


def _limits(sizes: Sizes, peaks: tuple[float, float], length: int, window: int | None, gradients: bool):
    """Seconds at each limit. Visible FLOPs: two products forward, four more backward, nothing computed twice. Bytes: q,
    k, v and out; backward q, k, v, out and d out read, and three gradients written."""
    import jax.numpy as jnp

    from dsv3_jax.ops.patterns import visible_keys

    keys = visible_keys(Full() if window is None else Windowed(window), length)
    flops = (3 if gradients else 1) * 4 * length * keys * sizes.heads * sizes.width
    moved = (12 if gradients else 4) * length * sizes.heads * sizes.width * jnp.dtype(sizes.dtype).itemsize
    return {"of matmul peak": flops / peaks[0], "of bandwidth": moved / peaks[1]}


def _import(module: str, who: str, notes: list[str]) -> Any:
    """A peer's module; None, and a note, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        notes.append(f"{who} left out: {error}" + (" (make peers installs it)" if "torch" in module else ""))
        return None


@contextlib.contextmanager
def _leaves_out(who: str, notes: list[str]) -> Iterator[None]:
    """A peer that fails, as for want of memory, is left out with a note."""
    try:
        yield
    except Exception as error:
        notes.append(f"{who} left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


@dataclasses.dataclass
class _Suite:
    """What the cases of a run share. peaks: of `_measure_limits`. torch, tokamax: modules; None if not installed."""

    platform: str
    sizes: Sizes
    threads: int
    peaks: tuple[float, float]
    torch: Any
    tokamax: Any
    notes: list[str]

    def case(self, length: int, window: int | None, gradients: bool, inputs: tuple) -> Case | None:
        """Its contenders, each compiled and run once; None where all of ours are left out."""
        name = f"{length}, {'no window' if window is None else f'window {window}'}"
        name += ", forward and backward" if gradients else ", forward"
        ours, calls, memory, repeats = self._ours(name, length, window, inputs), {}, [], 1
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:  # compiles side by side
            contenders = ours | self._jax_peers(length, window)
            compiled = {who: pool.submit(_timed, attend, inputs, gradients) for who, attend in contenders.items()}
        for who, result in compiled.items():
            with contextlib.nullcontext() if who == "dsv3_jax" else _leaves_out(f"{name}: {who}", self.notes):
                call, temporary = result.result()
                repeats = repeats if calls else launches(call)
                contender = launched(call, repeats)
                contender()
                calls[who] = contender
                memory.append(f"{who} {temporary / 2**20:,.0f} MiB")
        self.notes.append(f"{name}: {', '.join(memory)}")
        if not any(who in calls for who in ours):
            return None
        for who, flex in (("PyTorch SDPA", False), ("PyTorch flex_attention", True)) if self.torch else ():
            reason = self.torch.flex_refusal(gradients) if flex else None
            if flex and length not in self.sizes.flex:
                reason = "it compiles for long, and was asked for " + ", ".join(map(str, self.sizes.flex))
            if not flex and window is not None and length > self.sizes.longest_dense:
                reason = f"there a window is a mask of {length}²"
            if reason:
                self.notes.append(f"{name}: {who} left out: {reason}")
                continue
            with _leaves_out(f"{name}: {who}", self.notes):
                call = self.torch.make_step(inputs, window, gradients, self.threads, flex, repeats)
                call()
                calls[who] = call
        return Case(name, length, calls, _limits(self.sizes, self.peaks, length, window, gradients), repeats)

    def _ours(self, name: str, length: int, window: int | None, inputs: tuple) -> dict[str, Callable]:
        import jax.numpy as jnp

        from dsv3_jax.kernels.windowed_attention.api import default_implementation, refusal
        from dsv3_jax.kernels.windowed_attention.call import Call
        from dsv3_jax.ops.patterns import Place

        found = {"dsv3_jax": _ours(window)}
        if window is not None and self.platform == "cpu":
            found[UNLIMITED] = _ours(None)
        place = Place(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        q_BTHN, k_BTGN, v_BTGM = inputs
        call = Call(q_BTHN, k_BTGN, v_BTGM, place, Full() if window is None else Windowed(window), 1.0)
        default = default_implementation(call)
        if default == "blocked" and length > self.sizes.longest_blocked:
            unlimited = "dsv3_jax" if window is None else UNLIMITED
            del found[unlimited]
            self.notes.append(f"{name}: {unlimited} left out: the program of 'blocked' grows with the row")
        kernel = f"pallas_{self.platform}"
        if self.platform in TOKAMAX and kernel != default:
            if reason := refusal(kernel, call):
                self.notes.append(f"{name}: {kernel} left out: {reason}")
            else:
                found[f"dsv3_jax, {kernel}"] = _ours(window, kernel)
        return found

    def _jax_peers(self, length: int, window: int | None) -> dict[str, Callable]:
        import jax

        found = {}
        if self.platform == "gpu":
            found["cuDNN"] = _like_jax_nn(jax.nn.dot_product_attention, window, "cudnn")
        if self.platform == "tpu":
            found["splash"] = _splash(length, window, self.sizes.heads)
        if self.tokamax is not None:
            found["tokamax"] = _like_jax_nn(self.tokamax.dot_product_attention, window, TOKAMAX[self.platform])
        if length <= self.sizes.longest_dense:
            found["XLA"] = _like_jax_nn(jax.nn.dot_product_attention, window, "xla")
        return found


def cases(config_path: str | None) -> tuple[Iterator[Case], list[str]]:
    """A case for each length, window and pass, made when it is asked for; notes, which grow with the cases, give the
    memory, and say who is missing and why.

    Raises:
      ConfigError: a config, which this suite has no use for.
    """
    import jax

    if config_path:
        raise ConfigError(f"--config={config_path}: --suite=attention has sizes of its own; leave --config out")
    platform = jax.default_backend()
    sizes, threads = SIZES[platform], len(os.sched_getaffinity(0))
    peaks = _measure_limits(sizes)
    notes = [
        f"causal, {sizes.heads} heads of {sizes.width}, {sizes.dtype}, one row; {threads} threads; MiB: temporaries",
        f"measured first: a matmul of {sizes.matmul}², {peaks[0] / 1e12:.3g} TFLOP/s; a copy of {sizes.copy}², "
        f"{peaks[1] / 1e9:.3g} GB/s. Shares: of the FLOPs of the keys that the case's window lets be seen, and of the "
        "least bytes",
    ]
    torch = _import("experiments.peers.torch_attention", "PyTorch", notes)
    tokamax = _import("tokamax", "tokamax", notes) if platform in TOKAMAX else None
    kernels = {"cuDNN": ("gpu",), "splash": ("tpu",), "tokamax": tuple(TOKAMAX)}
    notes += [f"{who} left out: no kernel for {platform}" for who, where in kernels.items() if platform not in where]
    suite = _Suite(platform, sizes, threads, peaks, torch, tokamax, notes)

    def each() -> Iterator[Case]:
        for length in sizes.lengths:
            shape = (1, length, sizes.heads, sizes.width)
            inputs = tuple(jax.random.normal(key, shape, sizes.dtype) for key in jax.random.split(jax.random.key(0), 3))
            for window in (window for window in sizes.windows if window is None or window < length):
                for gradients in (False, True):
                    if case := suite.case(length, window, gradients, inputs):
                        yield case

    return each(), notes


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Median time against length, a line for each contender and window; forward, and forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    colours = {who: f"C{index}" for index, who in enumerate(dict.fromkeys(row["name"] for row in rows))}
    for panel, passes in zip(panels, ("forward", "forward and backward"), strict=True):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            length, window, of = row["case"].split(", ")
            if of == passes and row["name"] != UNLIMITED:
                lines.setdefault((row["name"], window), []).append((int(length), row["seconds"] * 1e3))
        styles = dict(zip(dict.fromkeys(window for _, window in lines), ("-", "--", ":", "-."), strict=False))
        for (who, window), points in lines.items():
            panel.loglog(*zip(*points), styles[window], marker="o", color=colours[who], label=f"{who}, {window}")
        panel.set(title=passes, xlabel="tokens", ylabel="median ms")
        panel.grid(alpha=0.3)
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
