"""`foldkv plan`: how many tokens and sequences fit in some memory, mode by mode, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import UsageError, cli_errors, emit_json, output


@cli_errors()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint, config.json, hub id or shape (llama3-8b-shape).")],
    memory: Annotated[str, typer.Option(help="Bytes of the cache: 40GB, 32GiB.")] = "",
    card: Annotated[str, typer.Option(help="Or bytes of a card: the cache gets what the weights and 4 % leave.")] = "",
    kv: Annotated[str, typer.Option(help="Modes, comma-separated; per layer: c4,0:c8.")] = "c16,c8,c8d,k8v4,c4,c4r",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")] = 8192,
    page_size: Annotated[int, typer.Option(help="Tokens of a page: 16, 32, 64, 128.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of weights and the c16 cache: fp16 or bf16.")] = "bf16",
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print tokens and sequences that fit, for each mode, from the model's config alone."""
    if bool(memory) == bool(card):
        raise UsageError("plan: expected --memory or --card, got " + ("both" if memory else "neither"))
    from foldkv.bench.model_cases import empty_model
    from foldkv.engine.build import RESERVE
    from foldkv.engine.memory import format_bytes, parse_bytes, pool_size
    from foldkv.hf.models import check_model, kv_shapes
    from quant.errors import ArgumentError, describe
    from quant.spec import check_page_size, parse_modes

    from .report import split_modes

    check_page_size(page_size)
    empty = check_model(empty_model(model, dtype))
    weights = sum(tensor.nbytes for tensor in empty.parameters())
    size = parse_bytes(memory or card)
    budget = size if memory else int(size * (1 - RESERVE)) - weights
    if budget <= 0:
        raise ArgumentError(describe("--card", f"more than the weights, {format_bytes(weights)}", format_bytes(size)))
    text = empty.config.get_text_config(decoder=True)
    shapes = kv_shapes(text)
    rows = []
    for mode in split_modes(kv):
        specs = parse_modes(mode, text.num_hidden_layers, dtype)
        pool = pool_size(shapes, specs, page_size, memory=budget)
        rows.append({
            "mode": mode, "bytes_per_token": pool.bytes_per_token, "tokens": pool.num_tokens,
            "sequences": pool.num_sequences(seq_len), "num_pages": pool.num_pages, "pool_bytes": pool.nbytes,
        })  # fmt: skip
    if json:
        emit_json({"model": model, "weights_bytes": weights, "cache_bytes": budget, "seq_len": seq_len, "modes": rows})
        return
    from rich.table import Table

    layers = f"{len(shapes)} layers with a cache, {shapes[0][0]} KV heads of {shapes[0][1]}"
    output.print(f"{model}: weights {format_bytes(weights)} ({dtype}), {layers}", highlight=False, soft_wrap=True)
    table = Table(title=f"{format_bytes(budget)} of cache", title_justify="left", box=None, header_style="bold")
    table.add_column("mode")
    for name in ("bytes/token", "tokens", f"sequences of {seq_len}", f"x {rows[0]['mode']}"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row["tokens"] / rows[0]["tokens"]  # type: ignore[operator]
        table.add_row(
            str(row["mode"]),
            f"{row['bytes_per_token']:,.0f}",
            f"{row['tokens']:,}",
            f"{row['sequences']:,}",
            f"{ratio:.2f}",
        )
    output.print(table)
