"""The proof that a cone computes an NVFP4 weight: run it on chosen leaves and compare with every convention.

Two sizes without a common factor, independent fills, extreme ones and one whose global scales are no powers of two
must all be explained by the same convention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fp4pass.match.cone import Cone, Inputs
from fp4pass.match.convention import Convention, conventions
from fp4pass.match.diagnosis import diagnose
from fp4pass.match.dims import NotRescalableError
from fp4pass.match.fill import decoded, expected, fills
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import CANNOT_RUN, Replay
from fp4pass.match.roles import Roles, assign

FULL_RUN_BYTES = 256 << 20
BYTES_A_WEIGHT = 16


@dataclass(frozen=True)
class Weight:
    """A proven NVFP4 weight. ``rows_last``: the cone gives ``[..., K, N]``, the transpose of ``[..., N, K]``."""

    roles: Roles
    convention: Convention
    rows_last: bool


def prove(cone: Cone, codes: fx.Node, inputs: Inputs) -> Weight | Refusal:
    """Prove that ``cone`` computes an NVFP4 weight and by which convention, or say why it does not."""
    readings = assign(cone, codes, inputs)
    if isinstance(readings, Refusal):
        return readings
    verdicts = []
    for roles in readings:
        verdicts.append(_prove(cone, roles))
        if isinstance(verdicts[-1], Weight):
            return verdicts[-1]
    return verdicts[0]


def _prove(cone: Cone, roles: Roles) -> Weight | Refusal:
    """`prove` for one reading of the leaves."""
    try:
        replay = Replay(roles.part(cone))
    except NotRescalableError as error:
        return Refusal(Reason.GROUPS, str(error))
    weights = roles.n * roles.k * (roles.experts or 1)
    if replay.why_full and weights * BYTES_A_WEIGHT > FULL_RUN_BYTES:
        return Refusal(Reason.TOO_LARGE, replay.why_full)
    try:
        return _explain(cone, roles, replay)
    except CANNOT_RUN as error:
        return Refusal(Reason.UNKNOWN_OP, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _explain(cone: Cone, roles: Roles, replay: Replay) -> Weight | Refusal:
    """The one convention that explains every fill."""
    tries = conventions(roles.arrangement, roles.global_scale is not None)
    candidates = [(each, rows_last) for rows_last in (False, True) for each in tries]
    for fill in fills(cone, roles, replay):
        found = decoded(roles, replay, fill)
        wanted = {each: expected(each, roles, fill) for each, _ in candidates}
        candidates = [
            (c, last) for c, last in candidates if _agrees(found.mT if last else found, wanted[c], fill.exact)
        ]
        if not candidates:
            return diagnose(roles, replay, fill)
    convention, rows_last = candidates[0]
    return Weight(roles, convention, rows_last)


def _agrees(found: torch.Tensor, wanted: torch.Tensor | None, exactly: bool) -> bool:
    if wanted is None or wanted.shape != found.shape:
        return False
    return torch.equal(found, wanted) if exactly else torch.allclose(found, wanted, rtol=2**-6, atol=0)
