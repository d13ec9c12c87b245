"""The table of float32, bfloat16 and int8: its arithmetic, and that docs show the records."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.int8 import COLUMNS, VARIANTS, table

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("int8-*.json"))


def cell(seconds: float, right: float, batch: int = 1, what: str = "accuracy") -> dict[str, Any]:
    return {f"seconds, batch {batch}": seconds, what: right}


def test_times_are_relative_to_the_fastest_dense_float32_network() -> None:
    rows = {
        "dense": {"macs": 1.0, "cells": {
            "onnxruntime float32": cell(0.004, 0.9), "onnxruntime int8": cell(0.001, 0.89),
            "openvino float32": cell(0.002, 0.9),
        }},
        "kernels 0.5": {"macs": 0.53, "cells": {
            "onnxruntime float32": cell(0.002, 0.8), "onnxruntime int8": cell(0.0005, 0.79),
            "openvino float32": cell(0.001, 0.8),
        }},
    }  # fmt: skip
    assert table(rows, [1]).splitlines() == [
        "Batch 1: the fastest dense float32 network takes 2.00 ms.",
        "",
        "| network | MACs | onnxruntime float32 | onnxruntime int8 | openvino float32 |",
        "|---|---|---|---|---|",
        "| dense | 1.00 | 2.00 (90.0) | 0.50 (89.0) | 1.00 (90.0) |",
        "| kernels 0.5 | 0.53 | 1.00 (80.0) | 0.25 (79.0) | 0.50 (80.0) |",
    ]


def test_a_network_without_labels_shows_its_agreement() -> None:
    rows = {"dense": {"macs": 1.0, "cells": {"torch float32": cell(0.004, 0.97, 2, "agreement")}}}
    assert table(rows, [2]).splitlines()[-1] == "| dense | 1.00 | 1.00 (97.0) |"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_docs_show_the_record(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "int8.md").read_text(encoding="utf-8")
    assert f"benchmarks/results/{path.name}" in page
    lines = [line for line in table(record["rows"], record["settings"]["batch"]).splitlines() if line]
    assert [line for line in lines if line not in page.splitlines()] == []
    assert len(lines) >= 5


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_it_was_made_on_and_is_whole(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"cpu", "cpu_flags", "instructions", "threads", "load", "commit"} <= record["environment"].keys()
    assert record["environment"]["threads"] == 1
    first = record["settings"]["batch"][0]
    for name, row in record["rows"].items():
        assert name in VARIANTS
        assert set(row["cells"]) == set(record["settings"].get("columns", COLUMNS)) <= set(COLUMNS)
        assert all(found[f"seconds, batch {first}"] > 0 for found in row["cells"].values())
    assert "dense" in record["rows"]


def test_there_are_records() -> None:
    assert RECORDS
