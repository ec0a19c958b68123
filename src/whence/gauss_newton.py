"""Products with the Gauss-Newton matrix of the mean squared error, over some events of training images.

    G = mean_e J_e^T (2/d) J_e

J_e is the Jacobian of the prediction, d numbers, at event e. No part of G is ever made: J v comes from differentiating
J^T u, which is linear in u, once more (a double backward pass), and J^T from an ordinary one. So it works for whatever
autograd can differentiate twice; attention is computed in its plain form meanwhile.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.data import ImageData
from whence.diffusion.adapters import predict
from whence.engine.curvature_sinks import SquaredLengthSink
from whence.event_table import EventTable, make_batch
from whence.gradients import GradientSource
from whence.precision import tensor_float_32


class GaussNewton:
    """The Gauss-Newton matrix of some events at one checkpoint.

    Products are computed in the type of the parameters, without autocast: an iteration of coarse products would not
    converge.

    Args:
        source: The model.
        images: The images that events point into.
        table: The events.
    """

    def __init__(self, source: GradientSource, images: ImageData, table: EventTable):
        self.source, self.images, self.table = source, images, table

    def multiply(
        self, vectors: Float[Tensor, "vector param"], update: Callable[[int], Any], events: EventTable | None = None
    ) -> Float[Tensor, "vector param"]:
        """Multiply vectors with G.

        Args:
            vectors: What to multiply, laid out as the source says.
            update: Called with the number of passes done: two for each event and vector.
            events: Take the mean over these events instead.

        Returns:
            The products.
        """
        events = self.table if events is None else events
        products = torch.zeros_like(vectors)
        with tensor_float_32(self.source.tf32), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for start in range(0, len(events), self.source.batch_size):
                some = events.take(slice(start, start + self.source.batch_size))
                self._add_products(products, vectors, some, 1.0 / len(events), update)
        return products

    def mean_eigenvalue(self, update: Callable[[int], Any]) -> float:
        """Estimate the mean eigenvalue of G, tr(G) / P for P parameters, from one sampled residual for each event.

        The squared length of J^T r has the mean tr(G_e) if the residual r is normal of variance 2/d (Hutchinson 1990).

        Args:
            update: Called with the number of events done.

        Returns:
            The estimate, which is a function of the events' noise keys alone.
        """
        sink = SquaredLengthSink()
        self.source.sampled_gradients(self.table, self.images, [sink], update)
        return sum(sink.totals.values()) / len(self.table) / self.source.layout.num_params

    def _add_products(
        self,
        products: Float[Tensor, "vector param"],
        vectors: Float[Tensor, "vector param"],
        events: EventTable,
        share: float,
        update: Callable[[int], Any],
    ) -> None:
        source = self.source
        batch = make_batch(events, self.images, source.process, dtype=source.dtype, device=source.device)
        parameters, spans = list(source.capture.parameters.values()), list(source.layout.spans.values())
        prediction = predict(source.model, batch.noisy, batch.times, batch.conditions)
        anything = torch.zeros_like(prediction, requires_grad=True)
        # J^T u, as a function of u, which stays the same for all vectors. What the prediction does not use is 0.
        pulled = torch.autograd.grad(prediction, parameters, anything, create_graph=True, materialize_grads=True)
        used = [k for k, part in enumerate(pulled) if part.requires_grad]
        factor = share * 2 / prediction[0].numel()
        for vector, product in zip(vectors, products, strict=True):
            tangents = [vector[spans[k]].view_as(parameters[k]) for k in used]
            (pushed,) = torch.autograd.grad([pulled[k] for k in used], anything, tangents, retain_graph=True)
            parts = torch.autograd.grad(prediction, [parameters[k] for k in used], pushed * factor, retain_graph=True)
            for k, part in zip(used, parts, strict=True):
                product[spans[k]] += part.flatten()
            update(2 * len(events))
