"""The differences between the paper's text and its released code, with a switch for each.

The code is jxhe/unify-parameter-efficient-tuning at 3222ce2; docs/fidelity.md has the lines. Where the code differs, it
nearly always is at another point of the four axes, or has another option of one. `apply_fidelity` rewrites a run's
modifications, so that neither `attach` nor a layer knows of two readings. Two switches are not about a modification:
`attach` leaves the task head frozen, and `modification/dead_parameters.py` counts dead parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from peftbench.config.schema import (
    ACTIVATIONS,
    HELP,
    Composition,
    FFNInput,
    Fidelity,
    HeadInput,
    Init,
    Insertion,
    LayerNormPlace,
    Modification,
    Representation,
    Run,
    TaskKind,
    Unfreeze,
    list_modifications,
    name_module,
)
from peftbench.utils.errors import UserError

PREFIX_MLP = 800  # petl/options.py, mid_dim


@dataclass(frozen=True)
class Deviation:
    """A switch that applies to a run, as the record stores it."""

    name: str
    sentence: str


@dataclass(frozen=True)
class Switch:
    """One place where text and code differ.

    It applies to a run if `change` changes one of its modifications, or if `touches` returns true for the run and the
    backbone's `model_type` (None: any).
    """

    name: str  # a key of `Fidelity`
    change: Callable[[Modification], Modification] = lambda m: m
    touches: Callable[[Run, str | None], bool] = lambda run, model_type: False
    families: tuple[str, ...] = ()  # the `model_type`s to which `change` applies; none: all

    @property
    def sentence(self) -> str:
        """What the code does: the help of the key."""
        (sentence,) = (item.metadata[HELP] for item in fields(Fidelity) if item.name == self.name)
        return str(sentence)


def apply_fidelity(run: Run, model_type: str) -> tuple[Run, list[Deviation]]:
    """Return the run as the released code has it on a backbone of this `model_type`, and the switches that apply.

    Raises:
        UserError: a switch that was set individually, not with its set, does not apply to the run.
    """
    changed, touching = _apply_switches(run, model_type)
    if idle := _find_idle(run, touching, f" on {model_type}"):
        raise UserError(*idle)
    return changed, [Deviation(name, SWITCHES[name].sentence) for name in touching]


def find_idle_switches(run: Run) -> list[str]:
    """Return a sentence for each switch that was set individually and applies to the run on no backbone at all."""
    return _find_idle(run, _apply_switches(run, None)[1], "")


def list_dead_kinds(m: Modification, model_type: str | None) -> list[str]:
    """Return the unused parameters that the code trains in addition to `m`, by the names of `DEAD`."""
    return [kind for kind, (family, made) in DEAD.items() if model_type in (None, family) and made(m)]


def _find_idle(run: Run, touching: list[str], where: str) -> list[str]:
    if run.fidelity.name != Fidelity().name:  # most switches of a set apply to no given run, which is no error
        return []
    return [
        f"fidelity.{name}=true changes nothing{where} with method={run.method} and task={run.task.name}; leave it out."
        for name in SWITCHES
        if getattr(run.fidelity, name) and name not in touching
    ]


def _apply_switches(run: Run, model_type: str | None) -> tuple[Run, list[str]]:
    """Return the changed run and the names of the switches that apply; without a `model_type`, as if of every
    family."""
    on = {name: switch for name, switch in SWITCHES.items() if getattr(run.fidelity, name)}
    touching = {name for name, switch in on.items() if switch.touches(run, model_type)}
    found: dict[str, Modification] = {}
    for prefix, m in list_modifications(run).items():
        before = _split_sublayers(_strip_run(m))
        after = []
        for part in before:
            for name, switch in on.items():
                if not switch.families or model_type is None or model_type in switch.families:
                    part, unchanged = switch.change(part), part
                    touching |= {name} if part != unchanged else set()
            after.append(part)
        if after == before:
            found[prefix] = m
            continue
        found[prefix], *ffn = after
        for part in ffn:
            name = f"{name_module(prefix)}_ffn"
            while name in run.mix:
                name += "_"
            found[f"mix.{name}."] = part
    return _replace_modifications(run, found), [name for name in SWITCHES if name in touching]


def _split_sublayers(m: Modification) -> list[Modification]:
    """Split what modifies both the attention and the FFN, because the code has separate options for them."""
    if m.modified_representation.name is not Representation.attention_ffn:
        return [m]
    return [_move_to(m, Representation.attention), _move_to(m, Representation.ffn)]


def _move_to(m: Modification, representation: Representation) -> Modification:
    return replace(m, modified_representation=replace(m.modified_representation, name=representation))


def _strip_run(m: Modification) -> Modification:
    """Return the root's modification without the rest of its run."""
    return Modification(**{item.name: getattr(m, item.name) for item in fields(Modification)})


def _replace_modifications(run: Run, found: Mapping[str, Modification]) -> Run:
    """Return the run with other modifications, by the prefix of their keys."""
    root = {item.name: getattr(found.get("", run), item.name) for item in fields(Modification)}
    return replace(run, **root, mix={name_module(prefix): m for prefix, m in found.items() if prefix})


def _is_adapter(m: Modification, *places: Representation, insertion: Insertion | None = None) -> bool:
    """Return whether m is an activation at one of the places, in parallel or sequential form."""
    return (
        m.functional_form.name in ACTIVATIONS
        and m.modified_representation.name in places
        and insertion in (None, m.insertion_form.name)
    )


def _is_attention_adapter(m: Modification) -> bool:
    return _is_adapter(m, Representation.attention, Representation.heads_joint)


def _is_parallel_ffn_adapter(m: Modification) -> bool:
    return _is_adapter(m, Representation.ffn, insertion=Insertion.parallel)


def _is_head_adapter(m: Modification) -> bool:
    """Return whether m is the multi-head parallel adapter that reads queries. The one of table 1, which reads the
    attention input, is in no code."""
    return (
        _is_adapter(m, Representation.heads, insertion=Insertion.parallel)
        and m.modified_representation.head_input is not HeadInput.hidden
    )


def _is_prefix(m: Modification) -> bool:
    axes = (m.functional_form.name, m.modified_representation.name, m.composition_function.name)
    return axes == ("softmax", Representation.heads, Composition.gated)


def _move_before_output(m: Modification) -> Modification:
    at_attention = _is_adapter(m, Representation.attention, insertion=Insertion.parallel)
    return _move_to(m, Representation.heads_joint) if at_attention else m


def _add_norm(m: Modification) -> Modification:
    return replace(m, layer_norm=LayerNormPlace.input) if _is_attention_adapter(m) else m


def _set_bert_init(m: Modification) -> Modification:
    return replace(m, init=Init.bert) if _is_attention_adapter(m) else m


def _make_from_mlp(m: Modification) -> Modification:
    return replace(m, prefix_mlp=m.prefix_mlp or PREFIX_MLP, bias=False) if _is_head_adapter(m) else m


def _read_normed_query(m: Modification) -> Modification:
    if not _is_head_adapter(m):
        return m
    return replace(m, modified_representation=replace(m.modified_representation, head_input=HeadInput.normed_query))


def _read_residual(m: Modification) -> Modification:
    if not _is_parallel_ffn_adapter(m):
        return m
    return replace(m, modified_representation=replace(m.modified_representation, ffn_input=FFNInput.residual))


# Unused parameters that the code creates: the family, and the modifications for which it creates them.
DEAD: dict[str, tuple[str, Callable[[Modification], bool]]] = {
    # modeling_roberta.py 522-529: RobertaOutput has an adapter for every option; the parallel one is RobertaLayer's
    "ffn_adapter": ("roberta", lambda m: any(map(_is_parallel_ffn_adapter, _split_sublayers(m)))),
    # petl_factory.py 45-136: prefixes of encoder, decoder and cross attention; RoBERTa's layers use one of them
    "prefix_sets": ("roberta", _is_prefix),
    # modeling_mbart.py: the LayerNorm that BART's queries pass through, see head_adapter_normed_query
    "query_norm": ("mbart", _is_head_adapter),
}

_SWITCHES = (
    Switch(
        "frozen_task_head",
        touches=lambda run, model_type: run.task.kind is not TaskKind.text_to_text and run.unfreeze is not Unfreeze.all,
    ),
    Switch("attention_adapter_before_output", _move_before_output),
    Switch("attention_adapter_norm", _add_norm),
    Switch("attention_adapter_bert_init", _set_bert_init),
    Switch("head_adapter_from_mlp", _make_from_mlp),
    Switch("head_adapter_normed_query", _read_normed_query, families=("bart",)),
    Switch("mbart_ffn_adapter_reads_residual", _read_residual, families=("mbart",)),
    Switch(
        "dead_parameters",
        touches=lambda run, model_type: any(list_dead_kinds(m, model_type) for m in list_modifications(run).values()),
    ),
)
SWITCHES = {switch.name: switch for switch in _SWITCHES}
