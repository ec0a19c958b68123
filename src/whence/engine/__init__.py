"""Per-unit gradients from one forward and one backward pass over a batch.

    capture    hooks that bring each layer's input ``A`` and output gradient ``G``, and leave the model as it was
    coverage   which parameters are taken from which layer, and which by running the whole model unit by unit
    tables     parameters that are broadcast over the events, of which each event has a copy
    layers     one file a layer kind; each makes the layer's per-unit gradients of its ``A`` and ``G``
    sinks      what is wanted of them: norms, dot products, projections, the gradients themselves; curvature
    check      the comparison with autograd on the first batch

A *unit* is a run of consecutive events of a batch whose gradients are taken as one: a batch of ``event`` events in
``unit`` units holds ``event / unit`` events in each. Layers are consumed as the backward pass reaches them, so at no
time are the gradients of more than one layer in memory, but for a sink that collects them.
"""
