"""The base's predictions of a whole way, kept until every mode has been compared with them.

Small ones stay as they are. Larger ones are kept as 16-bit steps of a log-probability in a temporary file, so that memory
does not grow with the text; what that costs is measured and becomes part of the report.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXACT_BYTES = 1 << 29
"""Logits of a way up to this size, or up to a quarter of a GPU's free memory, are kept as they are."""

RANGE = 32.0
"""Nats below a position's most likely token that the compact form tells apart; what lies lower is stored at the end."""

_STEP = RANGE / 65535


class BaseStore:
    """Logits `[windows, positions, vocab]` of the base, written once and read once a mode.

    exact: kept in their own dtype; else as steps of RANGE / 65535 = 4.9e-4 nats, uint16, in a file that vanishes with the
    object. floor: the largest mean KLD, over the parts written, of the stored distribution to the true one: 0 if exact.
    """

    def __init__(self, windows: int, positions: int, vocab: int, device: torch.device | str = "cpu") -> None:
        self.shape = (windows, positions, vocab)
        room = torch.cuda.mem_get_info(device)[0] // 4 if torch.device(device).type == "cuda" else 0
        self.exact = 4 * windows * positions * vocab <= max(EXACT_BYTES, room)
        self.floor = 0.0
        self._logits: Tensor | None = None
        self._file: Any = None
        if not self.exact:
            self._file = tempfile.TemporaryFile(prefix="foldkv-base-")  # noqa: SIM115
            self._codes = np.memmap(self._file, dtype=np.uint16, mode="w+", shape=self.shape)

    def write(self, window: int, position: int, logits: Tensor) -> None:
        """Keep logits `[w, n, vocab]` of the windows and positions from `window` and `position` on."""
        rows, columns = slice(window, window + logits.shape[0]), slice(position, position + logits.shape[1])
        if self.exact:
            if self._logits is None:
                self._logits = torch.empty(self.shape, dtype=logits.dtype, device=logits.device)
            self._logits[rows, columns] = logits
            return
        log_p = logits.float().log_softmax(-1)
        top = log_p.amax(-1, keepdim=True)
        codes = ((log_p - top).clamp(-RANGE, 0) / -_STEP).round()
        stored = (codes * -_STEP).log_softmax(-1)
        kld = (log_p.double().exp() * (log_p.double() - stored.double())).nan_to_num(0.0).sum(-1)
        self.floor = max(self.floor, float(kld.mean()))
        self._codes[rows, columns] = codes.cpu().numpy().astype(np.uint16)

    def read(self, window: int, windows: int, begin: int, end: int, device: torch.device) -> Tensor:
        """Logits `[windows, end - begin, vocab]`, up to a constant a position."""
        if self._logits is not None:
            return self._logits[window : window + windows, begin:end]
        codes = torch.from_numpy(self._codes[window : window + windows, begin:end].view(np.int16).copy())
        return (codes.to(device).to(torch.int32) & 0xFFFF).float() * -_STEP
