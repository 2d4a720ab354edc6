"""What is wrong with a cone that no convention explains: the probe's parts, varied one at a time."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp4pass.lowering.layout import PLAIN, PLAIN_HIGH_FIRST, nibbles
from fp4pass.lowering.reference import decode_codes
from fp4pass.match.convention import ABSENT, MULTIPLY, Convention, codes_by_rows, run
from fp4pass.match.fill import Fill, Meant, as_bytes, decoded, weight_shape
from fp4pass.match.reasons import Reason, Refusal
from fp4pass.match.replay import Replay
from fp4pass.match.roles import Roles

ONE_SCALE, ONE_CODES = 0x38, 0x22  # E4M3 1.0; two E2M1 codes of 1.0
E2M1 = decode_codes(torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8)).double()


def diagnose(roles: Roles, replay: Replay, fill: Fill) -> Refusal:
    """The nearest reason for what ``replay`` gives on ``fill``."""
    if (refusal := _wrong_shape(roles, replay, fill)) is not None:
        return refusal
    plain_scales = _with(roles, fill, scale=ONE_SCALE, unit_global=True)
    if (refusal := _wrong_codes(roles, replay, plain_scales)) is not None:
        return refusal
    plain_codes = _with(roles, fill, codes=ONE_CODES, unit_global=True)
    if (refusal := _wrong_scales(roles, replay, plain_codes)) is not None:
        return refusal
    return Refusal(Reason.WRONG_VALUES, "codes and block scales decode as they should when the global scale is 1")


def _with(
    roles: Roles, fill: Fill, codes: int | None = None, scale: int | None = None, unit_global: bool = False
) -> Fill:
    """The fill with all codes, or all scale bytes, the same, and the global scale 1."""
    leaves = dict(fill.leaves)
    for node, byte in ((roles.codes, codes), (roles.scale, scale)):
        if byte is not None:
            leaves[node] = torch.full_like(leaves[node].view(torch.uint8), byte).view(leaves[node].dtype)
    if unit_global and roles.global_scale is not None:
        leaves[roles.global_scale] = torch.ones_like(leaves[roles.global_scale])
    return replace(fill, leaves=leaves)


def _pair(roles: Roles, replay: Replay, fill: Fill, layout: str = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """(found, wanted) as ``[rows, K]``, the found one transposed if that makes the shapes agree."""
    mode = ABSENT if roles.global_scale is None else MULTIPLY
    want = Meant(roles, fill)(Convention(layout, roles.arrangement, mode))
    found = decoded(roles, replay, fill)
    if found.shape != want.shape or (want.shape[-1] == want.shape[-2] and _rows_last(roles, replay, fill, want)):
        found = found.mT
    return found.reshape(-1, want.shape[-1]), want.reshape(-1, want.shape[-1])


def _rows_last(roles: Roles, replay: Replay, fill: Fill, want: torch.Tensor) -> bool:
    """For a square weight: whether the transpose agrees in more places."""
    found = decoded(roles, replay, fill)
    return int((found.mT == want).sum()) > int((found == want).sum())


def _wrong_shape(roles: Roles, replay: Replay, fill: Fill) -> Refusal | None:
    mode = ABSENT if roles.global_scale is None else MULTIPLY
    want = Meant(roles, fill)(Convention(PLAIN, roles.arrangement, mode))
    found = decoded(roles, replay, fill)
    if sorted(found.shape) == sorted(want.shape):
        return None
    if found.numel() * 2 == want.numel():
        return Refusal(Reason.EIGHT_BIT, f"{list(found.shape)} weights from {want.numel() // 2} bytes")
    return Refusal(Reason.WRONG_AXIS, f"the weight's shape is {list(found.shape)}, expected {list(want.shape)}")


def _wrong_codes(roles: Roles, replay: Replay, fill: Fill) -> Refusal | None:
    """With all scales 1, each code must give its E2M1 value, in every row."""
    tries = [(layout, *_pair(roles, replay, fill, layout)) for layout in (PLAIN, PLAIN_HIGH_FIRST)]
    if any(torch.equal(found, want) for _, found, want in tries):
        return None
    for layout, found, _ in tries:
        if (refusal := _wrong_table(found, _code_numbers(roles, fill, layout))) is not None:
            return refusal
    for _, found, want in tries:
        if (refusal := _some_rows(replay, found, want)) is not None:
            return refusal
    return Refusal(Reason.NOT_E2M1, "one code gives several values")


def _code_numbers(roles: Roles, fill: Fill, layout: str) -> torch.Tensor:
    """The number 0 to 15 of the code behind every weight, ``[rows, K]``."""
    *rows, k = weight_shape(roles, fill.sizes)
    stored = codes_by_rows(run, roles.arrangement, as_bytes(fill.of(roles.codes)), [*rows, k // 2])
    numbers = nibbles(stored, layout)
    return (numbers if roles.ids is None else numbers[fill.of(roles.ids)]).reshape(-1, roles.k)


def _wrong_table(found: torch.Tensor, numbers: torch.Tensor) -> Refusal | None:
    """Each code gives one value, but not its own."""
    values = [found[numbers == code].unique() for code in range(16)]
    if any(len(v) != 1 for v in values):
        return None
    seen = torch.stack(values).flatten()
    factors = (seen / E2M1)[E2M1 != 0].unique()
    if len(factors) == 1 and not seen[E2M1 == 0].any():
        return Refusal(Reason.WRONG_VALUES, f"an extra factor of {float(factors):g}")
    code = int((seen != E2M1).nonzero()[0])
    return Refusal(Reason.NOT_E2M1, f"code {code} gives {float(seen[code]):g}, in E2M1 it is {float(E2M1[code]):g}")


def _wrong_scales(roles: Roles, replay: Replay, fill: Fill) -> Refusal | None:
    """With all codes 1, each block of 16 must show its scale."""
    found, want = _pair(roles, replay, fill)
    if torch.equal(found, want):
        return None
    if (refusal := _some_rows(replay, found, want)) is not None:
        return refusal
    blocks = found.unflatten(-1, (-1, roles.arrangement.group))
    if not torch.equal(blocks.amin(-1), blocks.amax(-1)):
        return Refusal(Reason.GROUPS, f"a block of {roles.arrangement.group} shows more than one scale")
    if torch.equal(found.flatten().sort().values, want.flatten().sort().values):
        return Refusal(Reason.SCALES_MISPLACED, "every scale occurs, in other places")
    where = int((found != want).flatten().nonzero()[0])
    got, should = float(found.flatten()[where]), float(want.flatten()[where])
    return Refusal(Reason.WRONG_VALUES, f"a block scale of {should:g} acts as {got:g}")


def _some_rows(replay: Replay, found: torch.Tensor, want: torch.Tensor) -> Refusal | None:
    """Some rows agree in full and others do not, where the operations can tell rows apart at all."""
    if replay.why_full is None:
        return None
    good = (found == want).all(-1)
    if not good.any() or good.all():
        return None
    return Refusal(
        Reason.NOT_UNIFORM,
        f"{int((~good).sum())} of {len(good)} rows, the first is row {int(good.logical_not().nonzero()[0])}",
    )
