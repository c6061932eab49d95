"""The deployment of an earlier answer, from the record that `recommend --out` leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesim.choices import MoeComm, Overlap
from moesim.errors import FormatError, InputError
from moesim.jobs.inputs import token_trace_of
from moesim.model.names import load_model
from moesim.serving.engines import engine_profile
from moesim.serving.speculative import MAX_DRAFTS
from moesim.studies.recommend.layouts import Bench, Layout
from moesim.studies.recommend.need import need_of
from moesim.studies.recommend.others import mtp
from moesim.studies.recommend.shapes import Place, Shape

if TYPE_CHECKING:
    from moesim.trace.format import Trace

_Degree = Annotated[int, Field(ge=1, le=65_536)]
_Number = Annotated[int, Field(ge=0, le=1 << 24)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


class _Role(_Record):
    engines: _Degree
    tp: _Degree
    dp: _Degree
    pp: _Degree
    ep: _Degree
    moe_comm: MoeComm
    max_batch_tokens: _Number
    two_batch_overlap: Overlap
    redundant_experts: _Number
    expert_gpus: _Number
    expert_dtype: str
    kv_dtype: str
    memory_fraction: float

    def shape(self, cluster: str) -> Shape:
        return Shape(
            self.tp,
            self.dp,
            self.ep,
            self.moe_comm,
            self.max_batch_tokens,
            overlap=self.two_batch_overlap,
            redundant=self.redundant_experts,
            pp=self.pp,
            expert_gpus=self.expert_gpus,
            cluster=cluster,
        )


class _Option(_Record):
    roles: Annotated[dict[str, _Role], Field(min_length=1, max_length=2)]


class _Drafting(_Record):
    acceptance: Annotated[float, Field(ge=0, le=1)]
    drafts: Annotated[int, Field(ge=1, le=MAX_DRAFTS)]


class _Answer(_Record):
    model_source: str
    engine_source: str
    trace_source: str | None
    cluster: str
    decode_cluster: str
    speculation: _Drafting | None
    options: Annotated[list[_Option], Field(min_length=1)]


class _Asked(_Record):
    slo: str
    seed: Annotated[int, Field(ge=0)]


class _Recommendation(_Record):
    asked: _Asked
    answers: Annotated[list[_Answer], Field(min_length=1)]


def deployed(folder: Path, rate: float, prompt: float, output: float) -> tuple[Bench, Layout]:
    """A bench with the place of an answer's first option, and its layout, for requests at `rate` of
    `prompt` and `output` tokens in the mean.

    Raises FormatError for a folder without such a record, InputError for one of several answers, or
    with a trace that has no name.
    """
    file = folder / "recommendation.json"
    try:
        record = _Recommendation.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise FormatError(
            f"{file}: no recommendation{_said(error)}",
            "give the folder that `moesim recommend --out` wrote",
        ) from None
    if len(record.answers) != 1:
        raise InputError(f"{folder.name} holds several answers", "give one that holds one")
    one = record.answers[0]
    roles = list(one.options[0].roles.values())
    options = {
        "expert_dtype": roles[0].expert_dtype,
        "kv_dtype": roles[0].kv_dtype,
        "memory_fraction": roles[0].memory_fraction,
        "trace": _trace(one.trace_source),
    }
    place = Place(
        load_model(one.model_source),
        one.cluster,
        engine_profile(one.engine_source),
        options,
        decode_cluster=one.decode_cluster,
    )
    if one.speculation is not None:
        drafting = mtp(place, one.speculation.acceptance, one.speculation.drafts)
        place = replace(place, speculation=drafting)
    second = roles[1] if len(roles) > 1 else None
    back = (None, 0) if second is None else (second.shape(one.decode_cluster), second.engines)
    need = need_of(record.asked.slo, rate, round(prompt), round(output), None, record.asked.seed)
    return Bench(place, need), Layout(roles[0].shape(""), roles[0].engines, *back)


def _said(error: OSError | ValidationError) -> str:
    """Where a record is not as it should be, in few words."""
    if isinstance(error, OSError):
        return ""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:80]
    return f" ({where}: {first['msg'][:80]})" if where else ""


def _trace(source: str | None) -> Trace | None:
    """The routing that the answer rests on. Raises InputError where it has no name."""
    if source is None:
        return None
    if not source:
        raise InputError(
            "the answer rests on a trace that was given as an object, without a file",
            "make the answer again with a trace's name or path",
        )
    return token_trace_of(source, "recommend")
