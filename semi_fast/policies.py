"""The view policies of a run: settings `views.weak` and `views.strong`, each a ready-named policy or changes to one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_prep.errors import UserError, unknown
from pipelines import VIEWS, View


class ViewSettings(BaseModel):
    """A policy in full, see `pipelines.augment.views.View`; the defaults are the weak view's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    flip: bool = Field(True, description="mirror left to right with probability 1/2")
    pad: float = Field(1 / 8, description="padding of the random crop, as a fraction of the side; 0: no crop")
    border: str = Field("reflect", description="what is padded: reflect or black")
    area: list[float] = Field([], description="smallest and largest share of the image in a resized crop; []: padded")
    ratio: list[float] = Field([3 / 4, 4 / 3], description="smallest and largest width / height of a resized crop")
    jitter: list[float] = Field([0.0, 0.0, 0.0], description="strengths of brightness, contrast and saturation")
    ops: list[str] = Field([], description="operations drawn from, uniformly and with replacement")
    n: int = Field(0, description="how many are drawn")
    levels: list[int] = Field([1, 9], description="smallest and largest level, out of 10")
    probability: float = Field(0.5, description="with which each drawn operation is applied")
    cutout: float = Field(0.0, description="side of the cutout, as a fraction of the image's; 0: none")
    gray: int = Field(127, description="what fills the cutout, 0..255")
    ops_first: bool = Field(False, description="operations before flip and crop")

    def view(self) -> View:
        """Raises: UserError for a value out of range, an unknown operation or border."""
        values = self.model_dump()
        values.update({key: tuple(value) for key, value in values.items() if isinstance(value, list)})
        return View(**values)


class StrongSettings(ViewSettings):
    """The same with the strong view's defaults."""

    ops: list[str] = Field(list(VIEWS["strong"].ops), description="operations drawn from")
    n: int = Field(VIEWS["strong"].n, description="how many are drawn")
    cutout: float = Field(VIEWS["strong"].cutout, description="side of the cutout, as a fraction of the image's")


class ViewsSettings(BaseModel):
    """What is done to images before the network sees them. `policy` in each names the policy that the rest changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weak: ViewSettings = ViewSettings()
    strong: StrongSettings = StrongSettings()

    def policies(self) -> dict[str, View]:
        """All views by name: the ready-named ones, with weak and strong as set. Raises: UserError, naming the view."""
        chosen = {}
        for name in type(self).model_fields:
            try:
                chosen[name] = getattr(self, name).view()
            except UserError as error:
                raise UserError(f"views.{name}: {error}") from None
        return {**VIEWS, **chosen}


def complete_views(raw: Any) -> dict[str, Any]:
    """Write policies out: `{strong: randaugment_3_4}`, or `{strong: {policy: randaugment_3_4}}` with further keys that
    change it, become every value of that policy. A view that names no policy stays as it is: changes to what was said.

    Raises: UserError for an unknown view or policy.
    """
    if not isinstance(raw, dict):
        raise UserError(f"views reads {{view: {{key: value}}}}, got {raw!r}.")
    completed = {}
    for name, value in raw.items():
        if name not in ViewsSettings.model_fields:
            raise unknown("view", name, ViewsSettings.model_fields)
        changes = {"policy": value} if isinstance(value, str) else value
        if not isinstance(changes, dict):
            raise UserError(f"views.{name} reads {{key: value}} or names a policy, got {value!r}.")
        policy = changes.get("policy")
        if policy is not None and str(policy) not in VIEWS:
            raise unknown("policy", policy, VIEWS)
        base = {} if policy is None else asdict(VIEWS[policy])
        base = {key: list(item) if isinstance(item, tuple) else item for key, item in base.items()}
        completed[name] = {**base, **{key: item for key, item in changes.items() if key != "policy"}}
    return completed
