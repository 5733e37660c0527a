"""Create or update a project's workspace at W&B: `python -m semi_fast dashboard --project P [--entity E] [--dry-run]`.

Change the panels in `semi_fast/commands/dashboard_panels.py`, run the command again, and the same workspace changes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_prep.errors import UserError
from semi_fast.commands.dashboard_panels import Bars, Lines, Matrix, Panel, Scatter, Table, sections
from semi_fast.methods import method_class, method_names
from semi_fast.observe.metrics import find_figure, symbol, title
from semi_fast.observe.tracking import why_offline
from semi_fast.observe.wandb_run import STEP
from semi_fast.parts.figures import Figure

NAME = "semi-fast"
VIEW = "nw-semifast-v"  # the workspace's name within W&B: one a project
COLUMNS = 3  # panels side by side


def declared_figures() -> list[Figure]:
    """What all methods declare, by method."""
    return [figure for name in method_names() for figure in method_class(name).figures]


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, a wandb_workspaces.workspaces.Workspace; needs no network. The same every time, to the byte."""
    import wandb_workspaces.workspaces as ws

    shown = []
    for number, (name, panels) in enumerate(sections(declared_figures()).items()):
        drawn = [_draw(panel, f"semifast-{number}-{i}") for i, panel in enumerate(panels)]
        section = ws.Section(name=name, panels=drawn, is_open=True)
        section.layout_settings.columns, section.layout_settings.rows = COLUMNS, -(-len(panels) // COLUMNS)
        shown.append(section)
    columns = ["run:displayName", *(f"summary:{key}" for key in ("accuracy_best", "accuracy_mean20", "images_per_s"))]
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=shown,
        settings=ws.WorkspaceSettings(x_axis=STEP, smoothing_type="none"),
        runset_settings=ws.RunsetSettings(pinned_columns=columns),
    )
    workspace._internal_name = VIEW
    return workspace


def _draw(panel: Panel, name: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    drawn: Any
    if isinstance(panel, Lines):
        drawn = _draw_lines(panel)
    elif isinstance(panel, Bars):
        drawn = wr.BarPlot(title=panel.title, metrics=[wr.SummaryMetric(panel.name)])
    elif isinstance(panel, Scatter):
        drawn = wr.ScatterPlot(title=panel.title, x=wr.SummaryMetric(panel.x), y=wr.SummaryMetric(panel.y))
    elif isinstance(panel, Table):
        drawn = wr.WeavePanelSummaryTable(table_name=panel.name)
    elif isinstance(panel, Matrix):
        drawn = wr.CustomChart.from_table(
            panel.name,
            chart_fields={key: key for key in ("Actual", "Predicted", "nPredictions")},
            chart_strings={"title": panel.title},
        )
        drawn.chart_name = "wandb/confusion_matrix/v1"
    else:
        drawn = wr.RunComparer(diff_only="split")
    drawn._id = name  # instead of a random one
    return drawn


def _draw_lines(panel: Lines) -> Any:
    import wandb_workspaces.reports.v2 as wr

    figure = find_figure(panel.names[0], declared_figures())
    assert figure is not None, f"no figure of that name: {panel.names[0]}"
    patterns = [f"^{re.escape(name)}$".replace(r"\*", "[^/]+") for name in panel.names if "*" in name]
    drawn = wr.LinePlot(
        title=panel.title or title(figure),
        x=STEP,
        y=[name for name in panel.names if "*" not in name],
        metric_regex="|".join(patterns) or None,
        log_y=panel.log or None,
        title_y=symbol(figure) or None,
    )
    if panel.by_method:
        drawn.groupby, drawn.groupby_aggfunc, drawn.groupby_rangefunc = wr.Config("method.name"), "mean", "stddev"
    return drawn


def as_json(workspace: Any) -> str:
    """What is sent to W&B, indented."""
    return json.dumps(json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)), indent=1)


def save(workspace: Any) -> str:
    """Send the workspace to W&B, over the one of an earlier call; returns its address.

    Raises: UserError when W&B refuses or cannot be reached.
    """
    import requests
    import wandb
    from wandb_workspaces.workspaces import internal

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity or ""
        try:
            workspace._internal_id = internal.View.from_name(workspace.entity, workspace.project, VIEW).id
        except ValueError as error:  # no project, which saving will say, or no such view yet
            if "Workspace" not in str(error):
                raise
        return str(workspace.save().url)
    except (wandb.Error, requests.RequestException, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"W&B did not take the workspace: {reason}. Check --project and --entity; a project exists once "
            "a run of it was uploaded."
        ) from None


def dashboard(project: str, entity: str = "", dry_run: bool = False) -> None:
    """Create the W&B workspace of a project, or update the one created before.

    Args:
        project: as in wandb_project=. entity: user or team; "": that of whoever is logged in.
        dry_run: print it as JSON instead, which needs neither network nor key.

    Raises: UserError for a name with a slash, without a login, and when W&B refuses.
    """
    for name, value in {"--project": project, "--entity": entity}.items():
        if "/" in value or (name == "--project" and not value.strip()):
            raise UserError(f"{name} is a name without slashes, got '{value}'.")
    workspace = build_workspace(entity, project)
    if dry_run:
        print(as_json(workspace))
        return
    if reason := why_offline():
        raise UserError(f"The workspace cannot be saved: {reason}. Run `wandb login`, or see it with --dry-run.")
    print(save(workspace))
