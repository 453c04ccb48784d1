"""Count the parameters that the paper's released code trains although nothing reads them. They are never created.

They make the numbers of that code reproducible. A user of the code reports 46,783,200 for MAM with l = 16 and r = 16 on
RoBERTa-base (its issue 15). These are 15,695,840 parameters that take part, 15,391,520 for each of two unused sets of
prefixes, and 304,320 for a second adapter at each FFN.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from peftbench.backbones.sites import find_sites
from peftbench.config.fidelity import list_dead_kinds
from peftbench.config.schema import Modification, name_module
from peftbench.modification.head_attention import HEADS


def count_dead(model: PreTrainedModel, modifications: Mapping[str, Modification]) -> int:
    """Return the number for a model to which `attach` has added `modifications` and which is not folded yet."""
    sites = find_sites(model)
    total = 0
    for prefix, m in modifications.items():
        name = name_module(prefix)
        kinds = list_dead_kinds(m, model.config.model_type)
        at_ffns = [layer.dense.dropout for layer in sites.layers if layer.dense is not None]
        at_heads = [getattr(a.module, HEADS, None) for layer in sites.layers for a in layer.attentions]
        if "ffn_adapter" in kinds:
            total += _count_parameters(_find_named(name, at_ffns))
        if "prefix_sets" in kinds:
            total += 2 * _count_parameters(_find_named(name, at_heads))
        if "query_norm" in kinds:
            total += 2 * sites.width * len(_find_named(name, at_heads))
    return total


def _find_named(name: str, parents: list[nn.Module | None]) -> list[nn.Module]:
    """Return the children called `name`, of those parents that have one."""
    return [child for parent in parents for own, child in (parent.named_children() if parent else ()) if own == name]


def _count_parameters(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())  # counts shared ones once
