"""The README's table of ratios is the one that the kept results give."""

import json

from benchmarks import tables
from benchmarks.common import RESULTS


def test_the_table_of_the_readme_is_what_the_results_give():
    text = tables.PAGE.read_text()
    assert len(tables.BLOCK.findall(text)) == 1
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"


def test_results_name_hardware_versions_and_commit():
    found = sorted(RESULTS.glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert result["commit"] != "unknown"
        assert result["hardware"]["cpu"]
        assert result["hardware"]["torch"]
        for line in result.get("lines", []):
            for case in line.get("cases", {}).values():
                assert case["min"] <= case["q1"] <= case["median"] <= case["q3"], (path, line["benchmark"])
                assert case["rounds"] >= 3


def test_a_table_has_a_row_a_ratio_and_a_column_a_processor():
    lines = [
        {"benchmark": "augment", "ratios": {"views": 30.04}, "cases": {"kernel": {"min": 1.0, "median": 1.4}}},
        {"benchmark": "build", "ratios": {"loops": 0.98}, "cases": {"build": {"min": 1.0, "median": 1.6}}},
    ]
    hardware = {"cpu": "some CPU", "instructions": ["AVX2"], "threads": 2, "torch": "2", "dali": "3"}
    other = {"hardware": {**hardware, "instructions": []}, "commit": "cde", "note": "by hand"}
    lacking = [{"benchmark": "build", "ratios": {"loops": [0.8, 0.94]}}]
    made = {"lines": lines, "commit": "abc", "hardware": hardware}
    text = tables.table([made, {**other, "lines": lacking}])
    assert "| some CPU AVX2 | some CPU |" in text
    assert "x Pillow | 30 |  |" in text
    assert "x bare Pillow loops | ~0.98 | 0.8 to 0.94 |" in text
    assert text.endswith(
        "2 cores, torch 2, dali 3, commit abc.\nsome CPU: 2 cores, torch 2, dali 3, commit cde; by hand."
    )
