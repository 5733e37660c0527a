"""Create or update a project's workspace at W&B: `python -m semi_fast dashboard --project P [--entity E] [--dry-run]`.

Change the panels in `sections`, run the command again, and the same workspace changes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_prep.errors import UserError
from semi_fast.methods import method_class, method_names
from semi_fast.observe.metrics import FIGURES, find_figure, symbol, title
from semi_fast.observe.tracking import CONFUSION, MATRIX, PER_CLASS, STEP, why_offline

NAME = "semi-fast"
VIEW = "nw-semifast-v"  # the workspace's name within W&B: one a project
COLUMNS = 3  # panels side by side


def sections() -> dict[str, list[Any]]:
    """The panels by section, those of figures that methods declare among them; a name with `*` is that of a family."""
    import wandb_workspaces.reports.v2 as wr

    declared = {figure.name: figure for name in method_names() for figure in method_class(name).figures}

    def lines(*names: str, heading: str = "", log: bool = False, **more: Any) -> Any:
        figure = find_figure(names[0], declared.values())
        assert figure is not None, f"no figure of that name: {names[0]}"
        patterns = [f"^{re.escape(name)}$".replace(r"\*", "[^/]+") for name in names if "*" in name]
        return wr.LinePlot(
            title=heading or title(figure),
            x=STEP,
            y=[name for name in names if "*" not in name],
            metric_regex="|".join(patterns) or None,
            log_y=log or None,
            title_y=symbol(figure) or None,
            **more,
        )

    def bars(heading: str, name: str) -> Any:
        return wr.BarPlot(title=heading, metrics=[wr.SummaryMetric(name)])

    matrix = wr.CustomChart.from_table(
        f"{CONFUSION}_table",
        chart_fields={key: key for key in MATRIX},
        chart_strings={"title": "Confusion matrix"},
    )
    matrix.chart_name = "wandb/confusion_matrix/v1"
    by_method: Any = {"groupby": wr.Config("method.name"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    spread = "Test accuracy by method, mean and spread over runs (%)"
    seconds, accuracy = wr.SummaryMetric("seconds"), wr.SummaryMetric("accuracy_last")
    parts = (f"time/{name}_ms" for name in ("forward_backward", "augment", "data_wait", "optimizer"))
    return {
        "Throughput": [
            *(lines(f"throughput/{name}") for name in ("images_per_s", "samples_per_s", "ceiling_share")),
            lines(*parts, heading="Where a step's time goes (ms)", log=True),
            lines("time/step_ms", "time/slowest_step_ms", heading="Step (ms)"),
            lines("time/data_wait_share"),
            lines("time/evaluation_share"),
            lines("memory/host_mb", "memory/device_mb", heading="Memory (MiB)"),
            lines("gpu/utilization"),
            lines("time/evaluation_s", "time/checkpoint_s", heading="Evaluation and checkpoints (s)"),
        ],
        "Learning": [
            lines("eval/accuracy"),
            lines("validation/accuracy"),
            lines("eval/ema/*/accuracy", heading="Test accuracy of every head, averaged weights (%)"),
            lines("eval/raw/*/accuracy", heading="Test accuracy of every head, raw weights (%)"),
            lines("eval/ema/*/many", heading="Many: classes with most labels (%)"),
            lines("eval/ema/*/medium", heading="Medium (%)"),
            lines("eval/ema/*/few", heading="Few: classes with fewest labels (%)"),
            lines("loss/total", log=True),
            lines("loss/*", heading="Parts of the loss", log=True),
            lines("optim/lr"),
            lines("guard/skipped"),
            matrix,
            wr.WeavePanelSummaryTable(table_name=PER_CLASS),
        ],
        "Pseudo-labels": [
            lines("pseudo/used"),
            lines("pseudo/easy", "pseudo/hard", "pseudo/ultra_hard", heading="Easy, hard and ultra-hard (share)"),
            lines("pseudo/accuracy"),
            lines("pseudo/accuracy_*", heading="Right, by class size (%)"),
            lines("pseudo/class_gap"),
            lines("pseudo/confidence"),
        ],
        "Method": [lines(name) for name, figure in declared.items() if figure not in FIGURES],
        "Comparison across runs": [
            lines("eval/accuracy", heading=spread, **by_method),
            bars("Accuracy, mean of the last 20 evaluations (%)", "accuracy_mean20"),
            bars("Best accuracy (%)", "accuracy_best"),
            bars("Images per second", "images_per_s"),
            wr.ScatterPlot(title="Accuracy (%) against seconds", x=seconds, y=accuracy),
            wr.RunComparer(diff_only="split"),
        ],
    }


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, a wandb_workspaces.workspaces.Workspace; needs no network. The same every time, to the byte."""
    import wandb_workspaces.workspaces as ws

    shown = []
    for number, (name, panels) in enumerate(sections().items()):
        for i, panel in enumerate(panels):
            panel._id = f"semifast-{number}-{i}"  # instead of a random one
        section = ws.Section(name=name, panels=panels, is_open=True)
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
    """The command. Raises: UserError for a name with a slash, without a login, and when W&B refuses."""
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
