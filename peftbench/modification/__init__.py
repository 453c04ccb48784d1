"""The core of peftbench: a small function computes Δh, which is combined with a hidden representation h of a frozen
transformer.

There is one file for each axis of He et al. (2022). The other files attach the modifications to a model:

    functional_form.py   axis 1: f(x W_down) W_up           reparameterization.py  the prefix's training-time MLP
    representation.py    axis 2: which h, and its x         prompt.py              prompt tuning
    insertion.py         axis 3: f(h) or f(x)               edit.py                one modification at one leaf module
    composition.py       axis 4: h + Δh, h + sΔh, gated     head_attention.py      modifications of heads
    attach.py            a run's modifications on a model   counting.py, state.py  how many numbers; fold, save, load
    merge.py             affine ones inside the weights     memo.py                values computed once a pass
    prefix_start.py      a decoder's prefixes at the start
"""
