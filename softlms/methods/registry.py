"""temporary"""

from softlms.modules import Replacement


def forms() -> dict[str, type[Replacement]]:
    from softlms.fused import SplitLinear
    from softlms.layers import LowRankLinear, SoftLinear
    from softlms.lowrank.masks import MaskedLinear

    return {c.form: c for c in (SoftLinear, LowRankLinear, SplitLinear, MaskedLinear)}
