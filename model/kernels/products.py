"""Few rows times matrices, as decoding multiplies them: a token a row, in as quick calls as can be."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.kernels import matmul

SHARED_OUT = 64  # rows up to which a CPU's threads each multiply by their own outputs, measured
FEW = 8  # rows of which a product is made dense, as the next one reads them several times as slowly otherwise, measured


class Matrix:
    """The weights of linear layers side by side, (out, in).

    in_place: the layers' own weights become views of these, so that there is no second copy.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype, in_place: bool = False) -> None:
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        self.whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        on_cpu = self.whole.device.type == "cpu"
        self.shared_out = SHARED_OUT if on_cpu else 0
        self.parts = self.whole.unflatten(0, (_parts(len(self.whole)) if on_cpu else 1, -1))  # (parts, out / parts, in)
        self.packed: Tensor | None = None
        if in_place:
            for layer, view in zip(layers, self.whole.split([layer.out_features for layer in layers])):
                layer.weight.data = view

    def in_packs(self) -> Tensor:
        """The same once more, as oneDNN multiplies it fastest."""
        if self.packed is None:
            self.packed = matmul.pack(self.whole)
        return self.packed


def _parts(outputs: int) -> int:
    """One for each thread, if they are large enough and come out even."""
    return max(n for n in range(1, torch.get_num_threads() + 1) if outputs % n == 0 and (n == 1 or outputs // n >= 64))


class Product:
    """Rows times matrices of one shape: (rows, in) -> (rows, out), at a place that the next call overwrites.

    On CPUs torch's own product of few rows is up to half as fast as one that is turned round, weights times rows, with
    each thread at its own outputs, which then may stand before the rows in memory. Where oneDNN is the faster library,
    it is left all but a single row.
    """

    def __init__(self, matrix: Matrix, rows: int, fixed: bool = False, dense: bool = False) -> None:
        """matrix: one of that shape. fixed: the result is always at `place`. dense: and its rows are dense there."""
        like, (outputs, _) = matrix.whole, matrix.whole.shape
        self.packs = rows > 1 and matmul.suits(like, rows)
        self.turned, self.count = rows <= matrix.shared_out and not self.packs, len(matrix.parts)
        if self.turned:
            self.parts = like.new_empty(*matrix.parts.shape[:2], rows)
            self.made = self.parts.view(outputs, rows).t() if rows > 1 else self.parts.view(1, outputs)
        else:
            self.made = like.new_empty(rows, outputs)
        self.copies = (fixed and self.packs) or (dense and not self.made.is_contiguous())
        self.place = like.new_empty(rows, outputs) if self.copies else self.made
        self.given: Tensor | None = None

    def __call__(self, x: Tensor, matrix: Matrix) -> Tensor:
        made = self.made
        if self.packs:
            made = matmul.onednn(x, matrix.in_packs())
        elif self.turned:
            torch.bmm(matrix.parts, self._spread(x), out=self.parts)
        else:
            torch.mm(x, matrix.whole.t(), out=made)
        return self.place.copy_(made) if self.copies else made

    def add(self, x: Tensor, matrix: Matrix) -> None:
        """To what is at the place."""
        if self.packs:
            self.place.add_(matmul.onednn(x, matrix.in_packs()))
        elif self.turned:
            self.parts.baddbmm_(matrix.parts, self._spread(x))
        else:
            self.made.addmm_(x, matrix.whole.t())

    def _spread(self, x: Tensor) -> Tensor:
        """(parts, in, rows). Mostly x is the tensor of the last call, and views cost as much as small products."""
        if x is not self.given:
            self.given, self.spread = x, x.t().expand(self.count, -1, -1)
        return self.spread
