from .interface import cross_scan
from .reference import cross_scan_reference

__all__ = ["cross_scan", "cross_scan_reference"]
