"""The tables of docs/performance.md are those that the kept results give."""

import json

from benchmarks import tables
from benchmarks.common import RESULTS


def test_every_table_of_the_page_is_what_its_result_gives():
    text = tables.PAGE.read_text()
    assert {match[2] for match in tables.BLOCK.finditer(text)} == set(tables.TABLES)
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"


def test_results_name_hardware_versions_and_commit():
    found = sorted(RESULTS.glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert result["benchmark"] == path.stem
        assert result["commit"] != "unknown"
        assert result["hardware"]["cpu"]
        assert result["hardware"]["torch"]


def test_a_table_has_a_row_a_back_end_and_a_column_a_size():
    cases = [
        {"backend": "resident", "res": 32, "samples_per_s": 12345, "ratio_dataloader": 30.04},
        {"backend": "resident", "res": 64, "samples_per_s": 2345, "ratio_dataloader": 29.0},
        {"backend": "dataloader", "res": 32, "samples_per_s": 411, "ratio_dataloader": 1.0},
    ]
    hardware = {"cpu": "some CPU", "capability": "AVX2", "gpu": None, "torch": "2", "dali": "3"}
    text = tables.loaders({"cases": cases, "cores": 2, "commit": "abc", "hardware": hardware})
    assert "| `resident` | 12,345 | 30.0 | 2,345 | 29.0 |" in text
    assert "| DataLoader with Pillow | 411 | 1.0 | - | - |" in text
    assert text.endswith("Measured on 2 cores, some CPU (AVX2); torch 2, dali 3; commit abc.")
