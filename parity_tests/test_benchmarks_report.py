"""The page of all results: from the committed files and from made-up ones, complete and self-contained."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import report, results, transfer, tuning_log
from benchmarks.implementations import OWN
from benchmarks.op import point_name
from benchmarks.report import figure, page, sources, tuned
from benchmarks.results import CEILING, Row
from ssm_configs import SPECS, read_table, shipped_tables

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results"
DEVICE = "NVIDIA_H200"
OP = "causal_conv1d"
HEAD = {
    "device": DEVICE,
    "versions": {"torch": "2.11.0"},
    "date": "2026-11-21",
    "command": "python -m benchmarks start",
}


class Reader(HTMLParser):
    """What of a page can be wrong: links, names, regions without a name."""

    VOID = ("meta", "br", "img")

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.outside: list[str] = []
        self.images: list[str | None] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.VOID:
            self.stack.append(tag)
        if "id" in given:
            self.ids.append(str(given["id"]))
        for name in ("href", "xlink:href", "src", "srcset"):
            if name in given:
                local = str(given[name]).startswith("#")
                (self.targets if local else self.outside).append(str(given[name])[1 if local else 0 :])
        if given.get("role") == "img":
            self.images.append(given.get("aria-label"))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """(the page, the files written, the sections that it was made of) of the committed results."""
    out, made, sections = tmp_path_factory.mktemp("report") / "report.html", [], page.sections
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "sections", lambda results: made.append(sections(results)) or made[-1])
        assert command.main(["report", "--device", DEVICE, "--out", str(out)]) == 0
    return out.read_text("utf-8"), out, *made


def test_the_page_is_self_contained_and_well_formed(committed):
    text, *_ = committed
    reader = Reader(text)
    assert not reader.stack and not reader.outside
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert set(reader.targets) <= set(reader.ids)
    twice = {one for one in reader.ids if reader.ids.count(one) > 1}
    assert all(re.match(r"[mp][0-9a-f]{10}", one) for one in twice), twice  # shapes that several figures share
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_every_figure_is_described_and_drawn(committed):
    text, out, _ = committed
    images = Reader(text).images
    pngs = sorted(out.with_suffix("").glob("*.png"))
    assert len(images) == text.count("<svg ") == len(pngs) >= 8
    assert all(label and re.search(r"\d", label) for label in images)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)
    for svg in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))


def test_every_figure_and_table_names_its_file_command_device_and_versions(committed):
    text, _, made = committed
    blocks = [block for section in made for block in section.blocks]
    shown = [one for block in blocks for one in (block if isinstance(block, list) else [block])]
    assert len(shown) > 20
    for one in shown:
        assert one.sources
        for source in one.sources:
            assert source.device == "NVIDIA H200" and source.file and source.date and source.versions
            assert source.command.startswith("python -m benchmarks"), source
    assert text.count('<details class="source">') == len(shown)


def test_the_numbers_are_those_of_the_files(committed):
    text, *_ = committed
    for path in (COMMITTED / DEVICE).glob("*.json"):
        if path.stem in SPECS:
            data = json.loads(path.read_text("utf-8"))
            assert path.name in text
            for run in data.get("runs", [data]):
                assert run["date"] in text and run["command"] in html.unescape(text)
                for row in run["rows"][::7]:
                    assert f">{row['us']:.2f}</td>" in text


def test_what_is_missing_is_said(committed):
    text, *_ = committed
    for name in ("start.json", "host.json", f"transfer.json, {OP}"):
        if not (COMMITTED / DEVICE / name.partition(",")[0]).exists():
            assert f"<li>{name}: <code>python -m benchmarks" in text


def test_a_tuned_rows_gain_is_the_logs_own():
    spec = SPECS[OP]
    table = next(table for table in shipped_tables(OP) if (table.device_name, table.dtype) == (DEVICE, "float16"))
    gains = [gain for gain in tuned.gains(spec, table, COMMITTED / DEVICE / "tuning" / OP) if gain.speedup]
    assert {gain.twin for gain in gains} == {"triton", "pallas"}
    times = {}
    for line in (COMMITTED / DEVICE / "tuning" / OP / "width=4,dtype=float16 triton.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "time":
            times[record["size"], json.dumps(record["knobs"], sort_keys=True)] = record["us"]
    gain = next(gain for gain in gains if gain.twin == "triton")
    rule = spec.heuristic({"width": 4}, "float16", tuned._device(DEVICE), gain.entry.size)
    ratio = (
        times[gain.entry.size, json.dumps(rule, sort_keys=True)]
        / times[gain.entry.size, json.dumps(gain.knobs, sort_keys=True)]
    )
    assert gain.speedup == pytest.approx(ratio)


def test_a_rule_that_was_timed_only_because_it_is_good_is_not_compared_with(tmp_path):
    """In JAX few sizes see every candidate; the best of those see the others, and the rule with them only if it is one."""
    spec = SPECS[OP]
    table = next(table for table in shipped_tables(OP) if (table.device_name, table.dtype) == (DEVICE, "float16"))
    entries = read_table(table.path, spec, table.statics).entries
    log = tuning_log.TuningLog(tmp_path / "width=4,dtype=float16 pallas.jsonl", {"device": "NVIDIA H200"})
    for number, entry in enumerate(entries[:2]):
        own = spec.launch_knobs("pallas", entry.shared, entry.own.get("pallas"), table.statics)
        rule = spec.heuristic(table.statics, table.dtype, tuned._device(DEVICE), entry.size)
        timed = [own, spec.launch_knobs("pallas", rule, None, table.statics)]
        if number == 0:
            timed.append({"BLOCK_SIZE_T": 4, "BLOCK_SIZE_D": 2048})
        for us, knobs in enumerate(timed, 1):
            log.add_time(entry.size, knobs, us=float(us))
    found = {gain.entry.size: gain.speedup for gain in tuned.gains(spec, table, tmp_path) if gain.twin == "pallas"}
    assert [found[entry.size] for entry in entries[:3]] == [2.0, None, None]


# -- made-up results


@pytest.fixture
def folder(tmp_path):
    """One operator, two sizes, a copy, and a start, a host and a transfer file."""
    place = tmp_path / DEVICE
    made = [Row(case="copy 1 MiB", dims={"bytes": 2**20}, implementation=CEILING, us=1.0, bytes=2**21)]
    for size in (64, 128):
        dims = {"B": size, "D": 128, "W": 4, "dtype": "bfloat16"}
        for name, us, error in (("triton", 4.0, 1e-3), ("mosaic_gpu", 5.0, 2e-3), ("peer:<vllm>", 8.0, 3e-3)):
            made.append(
                Row(case=point_name("B", size, "D=128"), dims=dims, implementation=name, us=us * size / 64, bytes=2**21,
                    error=error, host_us=30.0)
            )  # fmt: skip
    results.set_floors(made)
    results.write(place / f"{OP}.json", OP, DEVICE, {"torch": "2.11.0"}, "python -m benchmarks run <it>", made)
    rows = [
        {"op": OP, "package": "triton", "phase": "import", "seconds": 1.25},
        {"op": OP, "package": "triton", "phase": "cold", "seconds": 7.0, "compiles": 3, "case": "Nemotron"},
        {"op": OP, "package": "triton", "phase": "cold", "seconds": 8.0, "compiles": 3, "case": "Nemotron"},
        {"op": OP, "package": "triton", "phase": "warm", "seconds": 0.75, "compiles": 0},
    ]
    (place / "start.json").write_text(json.dumps(HEAD | {"rows": rows}))
    hosts = [{"op": OP, "implementation": "triton", "us": 71.25, "replay_us": 42.125}]
    later = HEAD | {
        "command": "a-later-command",
        "note": "on a slow host",
        "rows": [{"op": OP, "implementation": "xla", "us": 31.5}],
    }
    (place / "host.json").write_text(json.dumps({"runs": [HEAD | {"rows": hosts}, later]}))
    common = {"statics": {"width": 4}, "dtype": "float16", "size": 64, "twin": "pallas", "knobs": {"BLOCK_SIZE_D": 64}}
    moved = [
        transfer.Row(**common, origin="own", us=10.0),
        transfer.Row(**common, origin="twin", us=12.5),
        transfer.Row(**common, origin="device:NVIDIA_B200", wrong="y: relative error 0.5 (tolerance 0.001)"),
    ]
    transfer.write(place / transfer.FILE, OP, DEVICE, {"torch": "2.11.0"}, "python -m benchmarks transfer x", moved)
    return place


def rendered(folder: Path) -> str:
    return command_page(folder).read_text("utf-8")


def command_page(folder: Path) -> Path:
    arguments = ["report", "--results", str(folder.parent), "--device", folder.name]
    assert command.main(arguments) == 0
    return folder / "report.html"


def test_sections_appear_with_their_files(folder):
    text = rendered(folder)
    assert Reader(text).stack == []
    for words in (
        "Cold and warm start",
        "7.50",
        "cold 3, warm 0",
        "Launch overhead",
        "71.2",
        "42.1",
        "31.5",
        "a-later-command",
        "rows from elsewhere",
    ):
        assert words in text, words
    assert text.count("on a slow host") == 3  # beside the row, below its table, and in the list of sources
    assert ">1.25</td>" in text  # the other twin's row: 12.5 over 10
    assert "NVIDIA B200" in text and "relative error 0.5" in text
    assert "peer:&lt;vllm&gt;" not in text and "&lt;vllm&gt;" in text and "<vllm>" not in text
    assert "2.00" in text and "1.60" in text  # the peer over Triton and over Pallas
    assert "start.json:" not in text  # not among what is missing
    for name in ("start.json", "host.json", f"transfer.json, {OP}"):
        (folder / name.partition(",")[0]).unlink()
        assert f"<li>{name}: <code>" in rendered(folder)


def test_a_figure_follows_the_pages_colours_and_is_the_same_each_time(folder):
    made = [page.sections(sources.load(folder))[1].pictures for _ in range(2)]
    assert [one.name for one in made[0]] == [f"{OP}-bfloat16-d-128-time", f"{OP}-bfloat16-d-128-rate"]
    for first, second in zip(*made, strict=True):
        assert (first.svg, first.png) == (second.svg, second.png)
        assert "var(--ink)" in first.svg and "var(--series-triton)" in first.svg
        assert not re.search(r"#(20242a|1769aa|d5d9df|000000)", first.svg)
        assert ' width="' not in first.svg.partition(">")[0]  # as wide as there is room


def test_every_implementation_has_a_mark_and_a_colour_for_light_and_for_dark():
    css = (Path(page.__file__).parent / "page.css").read_text("utf-8")
    for variable in figure._SVG_COLORS.values():
        assert css.count(f"{variable[4:-1]}: #") == 2, variable
    assert OWN.keys() <= figure._MARKS.keys()  # peers without one take a spare


@pytest.mark.parametrize(
    ("size", "label"), [(8, "8"), (1024, "1k"), (5376, "5.25k"), (1 << 20, "1M"), (1 << 30, "1G"), (1000, "1000")]
)
def test_sizes_are_powers_of_two(size, label):
    assert figure.size_label(size) == label


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("start.json", "{", "start.json: is no JSON"),
        ("start.json", "[]", "start.json: expected an object, got list"),
        ("start.json", json.dumps({"rows": []}), "without versions, date, command"),
        ("start.json", json.dumps(HEAD | {"rows": [{"op": OP, "implementation": "xla", "phase": "hot", "seconds": 1}]}),
         "phase: expected one of"),
        ("start.json", json.dumps(HEAD | {"rows": [{"op": OP, "phase": "cold", "seconds": 1}]}),
         "implementation: expected str, got None"),
        ("host.json", json.dumps(HEAD | {"rows": [{"op": OP, "implementation": "xla", "us": "1"}]}),
         "us: expected float, got '1'"),
        ("transfer.json", "{}", "transfer.json: is no result file of `transfer`"),
        (f"{OP}.json", json.dumps({"rows": [{"case": "x"}]}), "causal_conv1d.json: is no result file of `run`"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(folder, name, content, message, capsys):
    (folder / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        command.main(["report", "--results", str(folder.parent), "--device", folder.name])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_device_without_results_is_named(folder, capsys):
    with pytest.raises(SystemExit):
        command.main(["report", "--results", str(folder.parent), "--device", "NVIDIA_X1"])
    assert f"--device: expected one of {DEVICE}, got NVIDIA_X1" in capsys.readouterr().err
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="expected result files"):
        report.sources.load(folder.parent / "empty")
