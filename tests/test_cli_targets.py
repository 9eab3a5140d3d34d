"""`derc targets`, and the table that `derc profile -o` writes, as a user types them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from derc.cli import cli
from derc.errors import IntegrityError, UsageError
from derc.inspection import check_writable
from derc.tables import write
from derc.target import SHIPPED
from tests.test_tables import made, measured


@pytest.fixture
def derc(tmp_path, monkeypatch):
    """Runs the command line with a store and a configuration folder of its own; errors come out as they are."""
    monkeypatch.setenv("DERC_CACHE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*words):
        result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_targets_are_listed_and_shown(derc):
    shown = json.loads(derc("targets", "ls", "--json"))
    by_name = {row["name"]: row for row in shown["targets"]}
    assert next(iter(by_name)) == "cpu" and by_name["cpu"]["here"] and shown["tables"] == []
    assert set(by_name) == {path.stem for path in SHIPPED.glob("*.toml")}
    assert "no table was imported" in derc("targets", "ls")
    text = derc("targets", "show", "h200")
    assert "4800 GB/s, 141 GB" in text and "fp16 989.5" in text and "nvidia.com" in text
    assert json.loads(derc("targets", "show", "h200", "--json"))["peaks"]["fp16"] == 989.5
    with pytest.raises(UsageError, match="no latency table 'h2'"):
        derc("targets", "show", "h2")


def test_a_table_is_imported_listed_shown_exported_and_removed(derc, tmp_path):
    table, path = made(), tmp_path / "table.json"
    write(table, path, measured().samples)
    assert f"{len(table.entries)} entries for a100" in derc("targets", "import", path)
    (row,) = json.loads(derc("targets", "ls", "--json"))["tables"]
    assert row == {
        "name": table.seal[:12],
        "target": "a100",
        "engine": "tensorrt",
        "batch": 1,
        "created": table.created,
        "device": "NVIDIA A100-SXM4-40GB",
        "entries": len(table.entries),
        "donors": ["a", "b"],
        "noise": table.noise,
    }
    assert "NVIDIA A100-SXM4-40GB" in derc("targets", "ls") and row["name"] in derc("targets", "show", "a100")
    assert json.loads(derc("targets", "show", row["name"], "--json")) == json.loads(path.read_text())
    assert "driver 580.1" in derc("targets", "show", row["name"]) == derc("targets", "show", path)
    derc("targets", "export", "a100", tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == path.read_bytes()
    assert (tmp_path / "out.samples.jsonl").read_bytes() == (tmp_path / "table.samples.jsonl").read_bytes()
    derc("cache", "gc", "--all")
    assert row["name"] in derc("targets", "remove", row["name"][:5])
    assert json.loads(derc("targets", "ls", "--json"))["tables"] == []


def test_a_damaged_table_is_refused_and_listed_as_such(derc, tmp_path):
    path = tmp_path / "table.json"
    write(made(), path)
    derc("targets", "import", path)
    path.write_text(path.read_text().replace("580.1", "580.2"))
    with pytest.raises(IntegrityError, match="changed after it was written"):
        derc("targets", "import", path)
    (kept,) = (tmp_path / "store" / "tables").glob("*.json")
    kept.write_text(path.read_text())
    assert "damaged" in derc("targets", "ls")


def test_a_target_of_ones_own_is_kept_and_used(derc, tmp_path):
    path = tmp_path / "mine.toml"
    derc("targets", "export", "l4", tmp_path / "l4.toml")
    assert (tmp_path / "l4.toml").read_text() == (SHIPPED / "l4.toml").read_text()
    path.write_text((SHIPPED / "l4.toml").read_text().replace('name = "l4"', 'name = "mine"'))
    derc("targets", "import", path)
    assert "300 GB/s" in derc("targets", "show", "mine") == derc("targets", "show", path)
    assert "mine" in derc("targets", "ls")
    with pytest.raises(UsageError, match="there is a target mine already"):
        derc("targets", "import", path)
    with pytest.raises(UsageError, match=r"mine.toml.*its name is 'l4'"):
        path.write_text((SHIPPED / "l4.toml").read_text())
        derc("targets", "import", path)


def test_where_no_table_can_be_written_is_said_before_anything_is_measured(tmp_path):
    check_writable(tmp_path / "table.json")
    for path in (tmp_path, tmp_path / "no" / "table.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            check_writable(path)
