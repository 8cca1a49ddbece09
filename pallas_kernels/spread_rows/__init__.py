"""Copies of rows at the places they go to. `api` is the face."""

from pallas_kernels.spread_rows.api import spread_rows

__all__ = ["spread_rows"]
