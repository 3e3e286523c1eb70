from .interface import Order, combine, dispatch, route, sort_by_expert

__all__ = ["Order", "combine", "dispatch", "route", "sort_by_expert"]
