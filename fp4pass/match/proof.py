"""The proof that a cone computes an NVFP4 weight: run it on chosen leaves and compare with every convention.

Two sizes without a common factor, independent fills, extreme ones and one whose global scales are no powers of two
must all be explained by the same convention.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from fp4pass.match.cone import Cone, value
from fp4pass.match.convention import Convention, conventions
from fp4pass.match.diagnosis import diagnose
from fp4pass.match.dims import NotRescalableError
from fp4pass.match.fill import Meant, decoded, fills, runs, weight_shape
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import CANNOT_RUN, Replay
from fp4pass.match.roles import Roles
from fp4pass.match.structure import Memo, table_bytes

FULL_RUN_BYTES = 256 << 20
BYTES_A_WEIGHT = 48  # at the worst moment: int64 numbers in the cone, or what it makes and what is meant in float64


@dataclass(frozen=True)
class Weight:
    """A proven NVFP4 weight. ``rows_last``: the cone gives ``[..., K, N]``, the transpose of ``[..., N, K]``."""

    roles: Roles
    convention: Convention
    rows_last: bool


_PROOFS = Memo()


def prove(cone: Cone, readings: Sequence[Roles]) -> Weight | Refusal:
    """Prove that ``cone`` computes an NVFP4 weight by one of the ``readings`` of its leaves, or say why not."""
    verdicts = []
    for roles in readings:
        verdict = _prove(cone, roles)
        if not isinstance(verdict, Refusal):
            return Weight(roles, *verdict)
        verdicts.append(verdict)
    return verdicts[0]


def _prove(cone: Cone, roles: Roles) -> tuple[Convention, bool] | Refusal:
    """`prove` for one reading of the leaves: its convention, and whether rows come last."""
    try:
        replay = Replay(roles.part(cone))
    except NotRescalableError as error:
        return Refusal(Reason.GROUPS, str(error))
    if replay.why_full:
        weights = roles.n * roles.k * (roles.experts or 1)
        too_large = roles.rows_vary or weights * BYTES_A_WEIGHT > FULL_RUN_BYTES
        return Refusal(Reason.TOO_LARGE, replay.why_full) if too_large else _explain(cone, roles, replay)
    return _PROOFS(_what_runs(roles, replay), lambda: _explain(cone, roles, replay))


def _what_runs(roles: Roles, replay: Replay) -> Hashable:
    """All that the outcome depends on where a cone is run at small sizes: N and E are not part of it."""
    sizes = runs(roles, replay)
    shapes = [weight_shape(roles, each) for each in sizes]
    given = [roles.global_scale is not None, roles.ids is not None, *(table_bytes(table) for _, table in roles.tables)]
    leaves = [value(leaf).dtype for leaf in replay.leaf_shapes]
    return replay.calls(sizes), repr((sizes, shapes, given, leaves, roles.arrangement))


def _explain(cone: Cone, roles: Roles, replay: Replay) -> tuple[Convention, bool] | Refusal:
    """The one convention that explains every fill."""
    tries = conventions(roles.arrangement, roles.global_scale is not None)
    candidates = [(each, rows_last) for rows_last in (False, True) for each in tries]
    try:
        for fill in fills(cone, roles, replay):
            found, meant = decoded(roles, replay, fill), Meant(roles, fill)
            candidates = [(c, last) for c, last in candidates if meant.explains(found.mT if last else found, c)]
            if not candidates:
                return diagnose(roles, replay, fill)
    except CANNOT_RUN as error:
        return Refusal(Reason.UNKNOWN_OP, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return candidates[0]
