"""The W&B workspace: the same JSON every time, updated in place, and only panels of figures that runs log."""

import json
import re
from types import SimpleNamespace

import pytest

from semi_fast.commands import dashboard
from semi_fast.commands.dashboard import build_workspace
from semi_fast.parts.figures import USED, Figure
from tests.semi_fast.trained_runs import command

EXPECTED = "tests/semi_fast/expected/workspace.json"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No network, no key."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def methods(monkeypatch):
    """Two methods that declare the same figures, whichever methods there are."""
    declared = (USED, Figure("mine/gap", "percent", "Gap between this and that."))
    monkeypatch.setattr(dashboard, "method_names", lambda: ["mine", "another"])
    monkeypatch.setattr(dashboard, "method_class", lambda name: SimpleNamespace(figures=declared))


def test_the_dry_run_prints_the_workspace_without_a_key(nobody, methods, root, capsys):
    assert command("dashboard", "--entity", "E", "--project", "P", "--dry-run") == 0
    shown = json.loads(capsys.readouterr().out)
    wanted = json.loads((root / EXPECTED).read_text())
    assert shown == wanted, f"panels changed; if they should have, {EXPECTED} follows"


def test_the_workspace_has_its_five_sections():
    model = build_workspace("e", "p")._to_model()
    sections = model.spec.section.panel_bank_config.sections
    assert [s.name for s in sections] == [
        "Throughput", "Learning", "Pseudo-labels", "Method", "Comparison across runs",
    ]  # fmt: skip
    ids = [panel.id for s in sections for panel in s.panels]
    assert len(set(ids)) == len(ids) == sum(map(len, dashboard.sections().values()))
    for section in sections:
        assert section.flow_config.columns_per_page * section.flow_config.rows_per_page >= len(section.panels)


def test_what_a_method_declares_has_a_panel(methods):
    model = build_workspace("e", "p")._to_model()
    (section,) = (s for s in model.spec.section.panel_bank_config.sections if s.name == "Method")
    (panel,) = section.panels
    config = panel.config
    assert (config.chart_title, config.y_axis_title, config.metrics) == ("Gap between this and that", "%", ["mine/gap"])


def test_a_family_of_figures_is_one_panel():
    (section,) = (s for s in build_workspace("e", "p")._to_model().spec.section.panel_bank_config.sections[1:2])
    patterns = [panel.config.metric_regex for panel in section.panels if hasattr(panel.config, "metric_regex")]
    (loss,) = (pattern for pattern in filter(None, patterns) if re.match(pattern, "loss/labeled"))
    assert re.match(loss, "loss/a_part-of.mine")
    assert not re.match(loss, "eval/loss/labeled")


def test_without_a_key_it_is_one_line_and_code_2(nobody, capsys):
    assert command("dashboard", "--project", "P") == 2
    error = capsys.readouterr().err
    assert error == (
        "error: The workspace cannot be saved: nobody is logged in. Run `wandb login`, or see it with --dry-run.\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--project", ""], ["--project", "me/mine"], ["--projekt", "P"]])
def test_mistakes_are_one_line_and_code_2(capsys, arguments):
    assert command("dashboard", *arguments, "--dry-run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


class Server:
    """W&B's interface, as far as workspaces go."""

    def __init__(self, projects=("P",)):
        self.views, self.projects = {}, projects

    def __call__(self, api, query, variables):
        if variables["projectName"] not in self.projects:
            if "UpsertView" in query:
                raise ValueError("project not found")
            return {"project": None}
        if "UpsertView" in query:
            known = {view["id"]: name for name, view in self.views.items()}
            name = known.get(variables.get("id"), variables["name"])
            assert variables.get("id") in (None, *known)
            self.views[name] = {"id": f"id-{name}", "displayName": variables["displayName"], "spec": variables["spec"]}
            return {"upsertView": {"view": {"id": f"id-{name}", "name": name}, "inserted": "id" not in variables}}
        found = [{"node": view} for name, view in self.views.items() if name == variables["viewName"]]
        return {"project": {"allViews": {"edges": found}}}


@pytest.fixture
def server(monkeypatch):
    from wandb_workspaces.workspaces import interface, internal

    made = Server()
    monkeypatch.setattr(internal, "execute_graphql", made)
    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(default_entity="me"))
    monkeypatch.setattr(dashboard, "why_offline", lambda: "")
    monkeypatch.setattr(interface.Workspace, "url", property(lambda self: f"{self.entity}/{self.project}"))
    return made


def test_a_second_call_updates_the_workspace_of_the_first(server, monkeypatch, capsys):
    assert command("dashboard", "--project", "P") == 0
    assert capsys.readouterr().out == "me/P\n"
    (first,) = server.views.values()
    every = dashboard.sections()
    monkeypatch.setattr(dashboard, "sections", lambda: {"Learning": every["Learning"][:1]})
    assert command("dashboard", "--project", "P") == 0
    (second,) = server.views.values()
    assert first["id"] == second["id"]
    assert len(first["spec"]) > len(second["spec"])


def test_what_the_server_refuses_is_one_line_and_code_2(server, capsys):
    assert command("dashboard", "--project", "unknown") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: W&B did not take the workspace: ")
    assert error.count("\n") == 1
