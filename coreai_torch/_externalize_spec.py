"""What to hand over to a converter as a composite op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class ExternalizeSpec:
    """Names a module class whose calls a converter keeps together as one op.

    API-compatible with the class of the same name in Apple's `coreai-torch`.

    Args:
        target_class: the `torch.nn.Module` subclass, for example
            :class:`coreai_torch.composite_ops.RMSNormImpl`.
        composite_op_name: the composite op that it becomes, for example ``"rms_norm"``.
        composite_attrs: the attributes of the module that become attributes of the op, for example
            ``["axes", "eps"]``.

    Raises:
        ValueError: `composite_attrs` without `composite_op_name`.
        TypeError: `target_class` is not a class, or `composite_attrs` is one string.
    """

    target_class: type
    composite_op_name: str | None = None
    composite_attrs: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target_class, type):
            raise TypeError(
                f"ExternalizeSpec: expected target_class to be a class, got {self.target_class!r}"
            )
        if isinstance(self.composite_attrs, str):
            raise TypeError(
                "ExternalizeSpec: expected composite_attrs to be a list of names, "
                f"got {self.composite_attrs!r}"
            )
        if self.composite_attrs is not None and self.composite_op_name is None:
            raise ValueError(
                "ExternalizeSpec: expected composite_op_name with composite_attrs, got None; "
                "attributes belong to a composite op, so name it"
            )
