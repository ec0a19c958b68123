"""Tables of vectors: the gradient of a row is the sum of the output gradients where it was looked up."""

from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from whence.engine._base import AbstractLayerFactors
from whence.engine._lengths import SquaredLengths, squared_lengths


class EmbeddingFactors(AbstractLayerFactors):
    """Gradients of an ``nn.Embedding``; its inputs are indices.

    Few rows of the table are looked up by a unit, so norms and products are taken of these alone.
    """

    layer: nn.Embedding

    def materialise(self) -> dict[str, Float[Tensor, "unit *shape"]]:
        """Put the rows in their places."""
        places, rows = self._rows
        table = rows.new_zeros(self.num_units * self.layer.num_embeddings, rows.shape[1])
        return {"weight": table.index_copy_(0, places, rows).unflatten(0, (self.num_units, -1))}

    def measure(self, names: Collection[str], lengths: SquaredLengths) -> None:
        """Add up the rows that were looked up."""
        places, rows = self._rows
        unit = places // self.layer.num_embeddings
        of_rows = squared_lengths(rows)
        lengths.add(of_rows.new_zeros(self.num_units).index_add_(0, unit, of_rows))

    def dot(
        self, vectors: Mapping[str, Float[Tensor, "vector param"]], lengths: SquaredLengths
    ) -> Float[Tensor, "unit vector"]:
        """Multiply the rows that were looked up with theirs of each vector."""
        places, rows = self._rows
        unit, index = places // self.layer.num_embeddings, places % self.layer.num_embeddings
        tables = vectors["weight"].unflatten(1, (self.layer.num_embeddings, -1))
        products = torch.einsum("vrd,rd->rv", tables[:, index], rows)
        dots = products.new_zeros(self.num_units, len(tables)).index_add_(0, unit, products)
        self.measure(["weight"], lengths)
        return dots

    @cached_property
    def _rows(self) -> tuple[Int[Tensor, " row"], Float[Tensor, "row feature"]]:
        """Join all that a unit looked up in the same row of the table: its place in all units' tables, and gradient."""
        all_places, all_grads = [], []
        for indices, grads in self.calls:
            of_unit = indices.reshape(self.num_units, -1)
            first = torch.arange(self.num_units, device=indices.device)[:, None] * self.layer.num_embeddings
            places, grads = (of_unit + first).flatten(), grads.flatten(0, -2)
            if self.layer.padding_idx is not None:
                used = of_unit.flatten() != self.layer.padding_idx
                places, grads = places[used], grads[used]
            all_places.append(places)
            all_grads.append(grads)
        places, row = torch.cat(all_places).unique(return_inverse=True)
        grads = torch.cat(all_grads)
        return places, grads.new_zeros(len(places), grads.shape[1]).index_add_(0, row, grads)
