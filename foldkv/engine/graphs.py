"""Steps as CUDA graphs: captured at their first use, replayed ever after. On a CPU a step is simply called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class GraphRunner:
    """Captured steps by key, all in one memory pool, as no two run at a time.

    enabled: None captures on CUDA and goes on without graphs, warning once, where a model cannot be captured; True makes
    that an error; False never captures.

    reason: why steps are not captured, "" where they are.
    """

    def __init__(self, device: torch.device, enabled: bool | None = None, forbidden: str = "") -> None:
        self.device = device
        self.strict = enabled is True
        self.reason = forbidden
        if enabled is False:
            self.reason = "graphs were turned off (graphs=False)"
        elif device.type != "cuda":
            self.reason = "CUDA graphs need a GPU; on a CPU the same step is called without one"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], T], warm_up: Callable[[], object]) -> T:
        """`step()`, or the replay of its graph: the same tensors with new contents.

        warm_up: called before the first capture; does what `step` does and leaves no trace.
        """
        if not self.reason and key not in self._graphs:
            self._capture(key, step, warm_up)
        if self.reason:
            return step()
        graph, result = self._graphs[key]
        graph.replay()
        return result  # type: ignore[return-value]

    def _capture(self, key: Hashable, step: Callable[[], object], warm_up: Callable[[], object]) -> None:
        warm_up()
        torch.cuda.synchronize(self.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that fails stays on its own
            if self.strict:
                raise
            self.clear()
            self.reason = f"capturing the step failed: {str(error).splitlines()[0]}"
            torch.cuda.synchronize(self.device)
            warnings.warn(f"foldkv: decoding without CUDA graphs, as {self.reason}", stacklevel=2)
            return
        self._graphs[key] = (graph, result)

    def clear(self) -> None:
        """Forget every graph: for when addresses change."""
        self._graphs.clear()
        self._pool = None
