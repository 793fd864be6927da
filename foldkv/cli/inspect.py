"""`foldkv inspect`: what a calibration found."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import UsageError, cli_errors, emit_json, output
from .plan_table import drift_lines, show_plan

if TYPE_CHECKING:
    from calib.summary import HeadSummary
    from quant.scales import KVScales


@cli_errors()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the scales, or the model's folder.")],
    layer: Annotated[int | None, typer.Option(help="Only this layer, head by head.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the ranges, outlier channels and origin of the KV scales in DIR."""
    from calib.summary import OUTLIER_RATIO, bits_per_mode, summarise
    from quant.errors import describe
    from quant.scales import CONFIG_FILE, KVScales

    inner = directory / "kv_cache"
    scales = KVScales.load(inner if (inner / CONFIG_FILE).is_file() else directory)
    heads = summarise(scales)
    if layer is not None:
        heads = [head for head in heads if head.layer == layer]
        if not heads:
            known = ", ".join(str(idx) for idx, stats in enumerate(scales.layers) if stats is not None)
            raise UsageError(describe("--layer", f"one of {known}", str(layer)))
    if json:
        found = [asdict(head) for head in heads]
        shaped = {name: [gram is not None for gram in grams] for name, grams in zip("kv", scales.grams, strict=True)}
        sizes = bits_per_mode(scales)
        emit_json({"config": scales.config, "bits_per_element": sizes, "shaped": shaped, "heads": found})
        return
    _show_origin(scales)
    if scales.plan is not None and layer is None:
        show_plan(scales.config["plan"])
    rows = heads if layer is not None else [_worst(list(group)) for _, group in groupby(heads, _tensor_of)]
    output.print(_table(rows, per_head=layer is not None))
    _line(f"outlier: the largest channel's absmax over the median one's; > {OUTLIER_RATIO:g}: channels beyond that")
    _line("offset: the largest |mean| / standard deviation of a channel; balance: the largest over the smallest")
    _line("at: the channel of the figure before it")
    modes = "  ".join(f"{name} {bits:g}" for name, bits in bits_per_mode(scales).items())
    _line(f"[bold]bits per element[/]  {modes}")


def _tensor_of(head: HeadSummary) -> tuple[int, str]:
    return head.layer, head.tensor


def _worst(heads: list[HeadSummary]) -> HeadSummary:
    """The heads of one tensor in one row: the widest range and, of every other figure, the worst."""
    outlier = max(heads, key=lambda head: head.outlier_ratio)
    offset = max(heads, key=lambda head: head.offset_sigmas)
    return replace(
        outlier,
        min=min(head.min for head in heads),
        max=max(head.max for head in heads),
        num_outliers=sum(head.num_outliers for head in heads),
        offset_sigmas=offset.offset_sigmas,
        offset_channel=offset.offset_channel,
        balance_spread=max(head.balance_spread for head in heads),
    )


def _table(rows: list[HeadSummary], per_head: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("layer", "tensor", *(["head"] if per_head else []), "min", "max"):
        table.add_column(title, justify="right")
    for title in ("outlier", "at", "> 4", "offset", "at", "balance"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            str(row.layer),
            row.tensor.upper(),
            *([str(row.head)] if per_head else []),
            f"{row.min:.3g}",
            f"{row.max:.3g}",
            f"{row.outlier_ratio:.2f}",
            str(row.outlier_channel),
            str(row.num_outliers),
            f"{row.offset_sigmas:.2f}",
            str(row.offset_channel),
            f"{row.balance_spread:.2f}",
        )
    return table


def _show_origin(scales: KVScales) -> None:
    config = scales.config
    model, data = config.get("model", {}), config.get("data", {})
    present = [layer for layer in scales.layers if layer is not None]
    shapes = sorted({(layer.k.h_kv, layer.k.head_dim) for layer in present})
    facts: dict[str, Any] = {
        "model": f"{model.get('name')} ({model.get('dtype')}), config {str(model.get('config_hash'))[:12]}",
        "layers": f"{len(present)} of {len(scales.layers)}, "
        + ", ".join(f"{h_kv} kv heads of {head_dim}" for h_kv, head_dim in shapes),
        "mode": config.get("mode"),
        "data": f"{data.get('source')}, {data.get('num_samples')} x {data.get('max_seq_len')} tokens, "
        f"positions to {data.get('max_position')}, seed {data.get('seed')}, hash {str(data.get('sha256'))[:12]}",
        "versions": ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items()),
        "shaped": _shaped(scales),
        "date": config.get("date"),
    }
    for name, value in facts.items():
        _line(f"[bold]{name:<10}[/]{escape(str(value))}")
    for line in drift_lines(data.get("drift", {})):
        _line(escape(line))


def _shaped(scales: KVScales) -> str:
    """Whose dynamic rows have their codes chosen together: tensors with a Gram matrix."""
    counts = [sum(stats is not None for stats in found) for found in scales.grams]
    named = [f"{tensor} in {count} layers" for tensor, count in zip("KV", counts, strict=True) if count]
    return "dynamic rows of " + ", of ".join(named) if named else "no rows: there are no Gram matrices"


def _line(text: str) -> None:
    output.print(text, highlight=False, soft_wrap=True)
