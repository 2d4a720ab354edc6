"""Graphs that were prepared for Blackwell, turned back: what needs SM100 becomes plain, FP4 products become W4A16."""

from fp4pass.passes.unfuse.graph import refuse_products as refuse_products
from fp4pass.passes.unfuse.rewrite import unfuse as unfuse
