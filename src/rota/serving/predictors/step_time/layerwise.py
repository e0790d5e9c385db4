"""Step time from tables of layer times: what each layer of the model takes, added up."""

from collections.abc import Mapping, Sequence

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Instant
from rota.serving.predictors.step_time.attention import DecodeAttention, MixedAttention
from rota.serving.predictors.step_time.layer_tables import LayerTables, read_layer_tables
from rota.serving.predictors.step_time.models import shape_of
from rota.serving.predictors.step_time.surface import Curve, interpolated, run_along

_ONCE = ("embedding", "final_layernorm")
_TWICE_A_LAYER = ("layernorm",)
_ONCE_A_LAYER = ("qkv_proj", "qk_norm", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
_NEEDED = ("qkv_proj", "o_proj", "down_proj")

_NS_PER_US = 1000
_BYTES_PER_VALUE = 2
_MAX_ROWS_KEPT = 4096


class LayerwiseStepTime:
    """A step costs its dense layers by tokens, its head by sequences, and its attention by what each sequence reads.

    * Dense layers (matrix products, norms): straight between the points of the table, by all tokens of the step.
    * Head and sampler: by sequences; the engine computes them for every sequence of a step.
    * Attention of decodes alone: by their number and the sum of their contexts.
    * Attention of a prefill chunk beside decodes: straight between the points of the table along all four quantities.
      Several prefills in a step add up what each costs above the smallest one; their decodes are looked up beside one
      chunk of all their tokens, over the context of the longest to compute.
    * Decodes of unlike length (`skew_time`): the longest sequence reads on when the others are done, on its own and
      so not at the memory's full speed. In the tables what that costs is a straight line of the tokens by which the
      longest exceeds the mean, whatever the mean; its slope is read off the skewed batches, by their size.

    Nothing is fitted to a run. Beyond the tables it goes straight on. A table is levelled where it dips, so that more
    context and more tokens of a sequence never take less; one sequence more in a mixed step may, by a few per cent
    of attention, where the sequences it is averaged with are longer.
    """

    def __init__(
        self,
        *,
        tables: str,
        tensor_parallel: int = 1,
        num_layers: int | None = None,
        skew: bool | None = None,
        all_reduce_us: float | None = None,
        all_reduce_gb_per_s: float | None = None,
    ) -> None:
        """`tables` is a folder (`layer_tables`). `num_layers` is the model's, by default as Rota knows it. `skew` is
        whether unlike decodes cost more, by default as the folder's meta.yaml says (`skew_fit.enabled`).

        The tables hold no communication: with `tensor_parallel` above 1 state what one all-reduce takes, its latency
        and its bandwidth on each GPU (ring: 2 (n - 1) / n of the bytes). Raises `ConfigError` or `DataError`.
        """
        read = read_layer_tables(tables, tensor_parallel)
        self.model, self.gpu, self.engine = read.model, read.gpu, read.engine
        if num_layers is None:
            num_layers = shape_of(read.model).num_layers
        if num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, got {num_layers}")
        reduce_ns, reduce_ns_per_token = _all_reduce(
            read.model, tensor_parallel, num_layers, all_reduce_us, all_reduce_gb_per_s
        )
        self._reduce = round(reduce_ns)
        self._dense = _dense(read, tables, num_layers, reduce_ns_per_token)
        self._head = _head(read, tables)
        attention = {point: time * _NS_PER_US * num_layers for point, time in read.attention.items()}
        self._decode = DecodeAttention(attention)
        self._decode_rows: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._mixed = MixedAttention(attention)
        self._smallest = self._mixed.prefill(0, 0)
        is_skewed = read.is_skew_declared if skew is None else skew
        if is_skewed and not read.skew:
            raise DataError(f"{tables}: skew is asked for, but there is no skew.csv")
        self._skew = _skew_slopes(read, num_layers) if is_skewed else {}

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step; 0 for an empty one."""
        if not prefills:
            if not num_decodes:
                return 0
            sums, times = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
            return self._around(num_decodes, num_decodes) + interpolated(sums, times, decode_kv_tokens)
        mixed = self._mixed
        attention = self._smallest
        num_new = most = before = 0
        for new_tokens, context_tokens in prefills:
            time = mixed.prefill(new_tokens, context_tokens) - self._smallest
            attention += time
            num_new += new_tokens
            if time >= most:
                most, before = time, context_tokens
        if num_decodes:
            attention += mixed.decodes_beside(num_new, before, num_decodes, decode_kv_tokens // num_decodes)
            sums, times = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
            attention = max(attention, interpolated(sums, times, decode_kv_tokens))
        return self._around(num_new + num_decodes, len(prefills) + num_decodes) + attention

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` decode-only steps in a row; see `DecodeRunPredictor`."""
        if not num_decodes:
            return [0] * num_steps
        sums, times = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
        around = self._around(num_decodes, num_decodes)
        return run_along(sums, times, decode_kv_tokens, num_decodes, num_steps, plus=around)

    def skew_time(
        self, num_prefill_tokens: int, num_decodes: int, decode_kv_tokens: int, longest_decode_kv_tokens: int
    ) -> int:
        """Nanoseconds beyond `step_time` for a longest decode over `longest_decode_kv_tokens`; see `SkewPredictor`."""
        if num_decodes < 2 or not self._skew:
            return 0
        excess = longest_decode_kv_tokens * num_decodes - decode_kv_tokens
        if not num_prefill_tokens:
            return self._skew[0](num_decodes) * excess // (num_decodes * _SLOPE_UNITS)
        chunks = [chunk for chunk in self._skew if chunk]
        slopes = [self._skew[chunk](num_decodes) for chunk in chunks]
        nearest = max(chunks[0], min(chunks[-1], num_prefill_tokens))
        return interpolated(chunks, slopes, nearest) * excess // (num_decodes * _SLOPE_UNITS)

    def _around(self, num_tokens: int, num_seqs: int) -> int:
        return self._dense(num_tokens) + self._head(num_seqs) + self._reduce

    def _decode_row(self, num_decodes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if len(self._decode_rows) >= _MAX_ROWS_KEPT:
            self._decode_rows.clear()
        row = self._decode_rows[num_decodes] = self._decode.row(num_decodes)
        return row


_SLOPE_UNITS = 1 << 20
"""Slopes are whole numbers of 2**-20 ns a token."""


def _all_reduce(
    model: str, tensor_parallel: int, num_layers: int, latency_us: float | None, gb_per_s: float | None
) -> tuple[float, float]:
    """What the all-reduces of a step take, in nanoseconds and in nanoseconds a token: one after attention and one after
    the MLP of each layer."""
    if tensor_parallel == 1:
        return 0.0, 0.0
    if latency_us is None or gb_per_s is None or latency_us < 0 or gb_per_s <= 0:
        raise ConfigError(
            "layer tables hold no communication: tensor_parallel above 1 needs all_reduce_us and all_reduce_gb_per_s",
            hint="measured with nccl-tests on the machine, such as 15 and 20 over PCIe, 8 and 300 over NVLink",
        )
    num_bytes = 2 * (tensor_parallel - 1) / tensor_parallel * shape_of(model).hidden_size * _BYTES_PER_VALUE
    return 2 * num_layers * latency_us * 1e3, 2 * num_layers * num_bytes / gb_per_s


def _dense(read: LayerTables, tables: str, num_layers: int, per_token: float) -> Curve:
    weights = dict.fromkeys(_ONCE, 1) | dict.fromkeys(_TWICE_A_LAYER, 2 * num_layers)
    weights |= dict.fromkeys(_ONCE_A_LAYER, num_layers)
    unknown = sorted(set(read.dense) - set(weights))
    if unknown:
        raise DataError(f"{tables}: dense.csv has the layer {unknown[0]!r}, of which it is not known how often it runs")
    missing = sorted(set(_NEEDED) - set(read.dense))
    if missing:
        raise DataError(f"{tables}: dense.csv lacks the layer {missing[0]!r}")
    total = _added(read.dense, weights)
    return Curve(list(total), [time + per_token * tokens for tokens, time in total.items()])


def _head(read: LayerTables, tables: str) -> Curve:
    if "lm_head" not in read.per_sequence:
        raise DataError(f"{tables}: per_sequence.csv lacks the layer 'lm_head'")
    total = _added(read.per_sequence, dict.fromkeys(read.per_sequence, 1))
    return Curve(list(total), list(total.values()))


def _added(layers: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> dict[int, float]:
    """Nanoseconds of all layers at every count that any of them was measured at."""
    total: dict[int, float] = {}
    curves = {name: (sorted(points), points) for name, points in layers.items()}
    for count in sorted({count for points in layers.values() for count in points}):
        sum_us = 0.0
        for name, (at, points) in curves.items():
            time = points.get(count)
            sum_us += weights[name] * (_between(at, points, count) if time is None else time)
        total[count] = sum_us * _NS_PER_US
    return total


def _between(at: Sequence[int], points: Mapping[int, float], count: int) -> float:
    picoseconds = [round(points[one] * 1e6) for one in at]
    return interpolated(at, picoseconds, count) / 1e6 if len(at) > 1 else points[at[0]]


def _skew_slopes(read: LayerTables, num_layers: int) -> dict[int, Curve]:
    """For decodes alone (0) and for each chunk beside them: what a token costs by which the longest decode exceeds the
    mean, by the number of decodes, in units of 2**-20 ns.

    The slope is the least-squares line through 0 over all batches of a size. Times in skew.csv are used as they relate
    to each other and scaled to attention.csv, since the profiler adds up its iterations in the one and takes their mean
    in the other."""
    products: dict[tuple[int, int], float] = {}
    squares: dict[tuple[int, int], float] = {}
    ours = theirs = 0.0
    decode = DecodeAttention({point: time * _NS_PER_US for point, time in read.attention.items()})
    for point in read.skew:
        key = point.prefill_chunk, point.num_decodes
        excess = point.longest_kv - point.mean_kv
        products[key] = products.get(key, 0.0) + excess * (point.skewed_us - point.mean_us)
        squares[key] = squares.get(key, 0.0) + excess * excess
        if not point.prefill_chunk:
            ours += interpolated(*decode.row(point.num_decodes), point.num_decodes * point.mean_kv)
            theirs += point.mean_us * _NS_PER_US
    scale = ours / theirs * num_layers * _NS_PER_US * _SLOPE_UNITS if theirs else 0.0
    curves: dict[int, Curve] = {}
    for chunk in sorted({chunk for chunk, _ in products}):
        sizes = sorted(num for of, num in products if of == chunk and squares[of, num])
        slopes = [max(0.0, products[chunk, num] / squares[chunk, num]) * scale for num in sizes]
        curves[chunk] = Curve([*sizes, 2 * sizes[-1]], [*slopes, slopes[-1]], level=False)
    return curves
