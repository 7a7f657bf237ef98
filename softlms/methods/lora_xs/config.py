"""`LoraXSConfig`: the settings of LoRA-XS, as PEFT reads and writes them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from softlms.methods.lora_xs.basis import COMPONENTS
from softlms.utils.ranges import check_at_least_one, check_positive

__all__ = ["NAME", "LoraXSConfig"]

NAME = "LORA_XS"


def _add_type() -> None:
    """Add our name to PEFT's enumeration of methods: `register_peft_method` takes no other."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        type.__setattr__(PeftType, NAME, member)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)


_add_type()


@dataclass
class LoraXSConfig(PeftConfig):  # type: ignore[misc, unused-ignore]
    """Settings of LoRA-XS: y = W x + (alpha / r) B R A x; only R, shape (r, r), learns.

    B and A are singular vectors of W itself (`softlms.methods.lora_xs.basis.basis_of`). The base determines them, so
    an adapter's file has r^2 numbers a layer, and r more by which another base is recognised.

    Parameters
    ----------
    r : int
        At most the rank of each adapted layer.
    rank_pattern : dict
        Other r for single layers, as in ``LoraConfig``: a name, or the end of one, to its r.
    alpha : float
        The change is scaled by alpha / r, with a layer's own r.
    target_modules : list of str or str, optional
        As in ``LoraConfig``: the layers' own names, such as "q_proj", also where they are thin. Default: the linears
        that softlms factors, or for a family that it does not know those of PEFT's LoRA.
    exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        As in ``LoraConfig``.
    components : {"top", "random", "bottom"}
        Which components of W make B and A; "random" draws them by `seed`.
    seed : int
    grow : bool
        Merge into a thin layer as r more components. Otherwise its rank stays: the change is within its own factors.
    init_std : float
        R starts from normal numbers of this standard deviation.

    Raises
    ------
    ValueError
        A setting is unknown or out of range.

    Notes
    -----
    arXiv 2405.17504; r, alpha, the start of R and its scale as in the authors' code (CODE). Fixed signs, the
    fingerprint, thin layers, `components` and `grow` are ours.
    """

    r: int = 16
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha: float = 16.0
    target_modules: Collection[str] | None = None
    exclude_modules: Collection[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)
    components: str = "top"
    seed: int = 0
    grow: bool = False
    init_std: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(r=self.r, **{f"rank_pattern[{name!r}]": r for name, r in self.rank_pattern.items()})
        check_positive(alpha=self.alpha, init_std=self.init_std)
        if self.components not in COMPONENTS:
            raise ValueError(f"components must be one of {', '.join(map(repr, COMPONENTS))}, got {self.components!r}.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs names in target_modules, not one pattern: give a list.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: give the layers' indices, or leave it out.")
        self.peft_type = PeftType[NAME]
        self.target_modules, self.exclude_modules = (
            set(names) if isinstance(names, list) else names for names in (self.target_modules, self.exclude_modules)
        )

    def rank_of(self, name: str) -> int:
        """r of a layer."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), name), self.r)
