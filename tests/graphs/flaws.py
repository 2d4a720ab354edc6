"""What makes a near miss of an NVFP4 product: one step of a recipe that does something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .recipes import Recipe

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Flaw:
    """``change(value, x)`` stands in the place of the value that the step named ``stage`` gives."""

    stage: str
    change: Change
    fits: Callable[[Recipe], bool] = lambda recipe: True

    def plant(self, stage: str, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The value, changed if it is the one that this step gives."""
        return self.change(value, x) if stage == self.stage else value


def first_columns_swapped(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((value[..., 1:2], value[..., :1], value[..., 2:]), -1)


def moved_by_one(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((value[..., 1:], value[..., :1]), -1)


def late_row_doubled(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((value[..., :-1, :], 2 * value[..., -1:, :]), -2)


def late_row_by_mask(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(value.shape[-2]).unsqueeze(-1)
    return torch.where(rows == value.shape[-2] - 2, -value, value)


def late_row_written(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[..., -1, :] = 1.0
    return value


def late_expert_negated(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((value[:-1], -value[-1:]))


def experts_moved_by_one(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((value[1:], value[:1]))


def wrong_number(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(value == 11, torch.full_like(value, 10), value)


def signs_of_half_lost(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(value == 9, torch.ones_like(value), value)


def wrong_entry(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat((table[:3], table[3:4] + 1, table[4:]))


def has_table(recipe: Recipe) -> bool:
    return recipe.decode not in ("integers", "powers", "steps") and not recipe.decode.startswith("bits")


def has_numbers(recipe: Recipe) -> bool:
    return not recipe.decode.startswith("bytes")


def has_global(recipe: Recipe) -> bool:
    """Whether the global scale is part of the weight."""
    return bool(recipe.factor_goes) and recipe.factor != "absent"


def in_wide_floats(recipe: Recipe) -> bool:
    """Whether large numbers are no infinity."""
    return has_global(recipe) and torch.float16 not in (recipe.through, recipe.dtype)


def all_experts_at_once(recipe: Recipe) -> bool:
    """Whether the last entry of the first dimension is the last expert."""
    return recipe.experts > 0 and not recipe.product.startswith("gathered_first")


FLAWS: dict[str, Flaw] = {
    "wrong_table_entry": Flaw("table", wrong_entry, has_table),
    "wrong_number": Flaw("numbers", wrong_number, has_numbers),
    "sign_of_one_code_lost": Flaw("numbers", signs_of_half_lost, has_numbers),
    "numbers_swapped": Flaw("numbers", first_columns_swapped, has_numbers),
    "scale_columns_swapped": Flaw("scale", first_columns_swapped),
    "scale_columns_moved": Flaw("scale", moved_by_one),
    "scale_of_the_next_row": Flaw("scale", lambda s, x: torch.cat((s[..., 1:, :], s[..., :1, :]), -2)),
    "scale_clamped_below": Flaw("scale", lambda s, x: s.clamp(min=2**-6)),
    "scale_clamped_above": Flaw("scale", lambda s, x: s.clamp(max=240)),
    "scale_without_sign": Flaw("scale", lambda s, x: s.abs()),
    "scale_over_its_amax": Flaw("scale", lambda s, x: s / s.abs().amax()),
    "scale_late_row": Flaw("scale", late_row_doubled),
    "group_boundary_off_by_one": Flaw("wide", moved_by_one, lambda r: r.spread != "as_blocks"),
    "values_clamped": Flaw("values", lambda v, x: v.clamp(-4, 4)),
    "values_moved": Flaw("values", lambda v, x: v + 0.125),
    "values_over_their_amax": Flaw("values", lambda v, x: v / v.abs().amax(-1, keepdim=True)),
    "global_squared": Flaw("factor", lambda f, x: f * f, has_global),
    "global_rooted": Flaw("factor", lambda f, x: f.sqrt(), has_global),
    "global_without_sign": Flaw("factor", lambda f, x: f.abs(), has_global),
    "global_clamped_below": Flaw("factor", lambda f, x: f.clamp(min=0.01), has_global),
    "global_clamped_above": Flaw("factor", lambda f, x: f.clamp(max=1000), has_global),
    "global_a_power_of_two": Flaw("factor", lambda f, x: torch.exp2(f.abs().log2().round()) * f.sign(), has_global),
    "global_in_float8": Flaw("factor", lambda f, x: f.to(torch.float8_e5m2).to(f.dtype), has_global),
    "weight_doubled": Flaw("weight", lambda w, x: w * 2),
    "weight_times_an_eighth_more": Flaw("weight", lambda w, x: w * 1.125),
    "weight_negated": Flaw("weight", lambda w, x: -w),
    "weight_moved": Flaw("weight", lambda w, x: w + 0.5),
    "weight_clamped": Flaw("weight", lambda w, x: w.clamp(-100, 100)),
    "weight_clamped_far_away": Flaw("weight", lambda w, x: w.clamp(max=2.0**40), in_wide_floats),
    "small_weights_lost": Flaw("weight", lambda w, x: torch.where(w.abs() < 1e-6, torch.zeros_like(w), w), has_global),
    "weight_over_its_amax": Flaw("weight", lambda w, x: w / w.abs().amax()),
    "weight_late_row": Flaw("weight", late_row_doubled),
    "weight_late_row_by_mask": Flaw("weight", late_row_by_mask),
    "weight_late_row_written": Flaw("weight", late_row_written),
    "weight_late_column": Flaw("weight", lambda w, x: torch.cat((w[..., :-1], torch.zeros_like(w[..., -1:])), -1)),
    "weight_in_float8": Flaw("rounded", lambda w, x: w.to(torch.float8_e4m3fn).to(w.dtype)),
    "times_an_activation": Flaw("rounded", lambda w, x: w * x.mean()),
    "plus_nothing_of_an_activation": Flaw("rounded", lambda w, x: w + 0 * x[0]),
    "scaled_by_amax_of_an_activation": Flaw("scale", lambda s, x: s * x.abs().amax().to(s.dtype)),
    "late_expert": Flaw("weight", late_expert_negated, all_experts_at_once),
    "scale_of_the_next_expert": Flaw("scale", experts_moved_by_one, all_experts_at_once),
    "global_of_the_next_expert": Flaw(
        "factor", experts_moved_by_one, lambda r: all_experts_at_once(r) and r.factor != "absent"
    ),
}
OF_EXPERTS = frozenset({"late_expert", "scale_of_the_next_expert", "global_of_the_next_expert"})
