"""fuse(model): capture -> match -> plan -> apply."""

from fused_resnet.fusing.apply import fuse, plans, refresh, unfuse
from fused_resnet.fusing.page import Timings
from fused_resnet.fusing.report import Report, Row, report
from fused_resnet.fusing.verify import Verification, verify

__all__ = ["Report", "Row", "Timings", "Verification", "fuse", "plans", "refresh", "report", "unfuse", "verify"]
