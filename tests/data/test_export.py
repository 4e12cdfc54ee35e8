"""`data export`: what is written, what is refused, what a failure leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cadtrain.cad import dequantize, get_codec, quantize, read_deepcad_json, to_deepcad_json
from cadtrain.cad.formats.deepcad17 import to_vectors
from cadtrain.cli.data import app
from cadtrain.data.export import designs as service
from cadtrain.data.export.designs import export
from cadtrain.data.export.options import ExportFormat, ExportOptions, parse_formats
from cadtrain.data.export.source import Source, dataset_sources, file_sources, read_source, text_sources
from cadtrain.errors import DataError, EnvironmentFault, GeometryError, GrammarError, UsageError
from cadtrain.geometry import read_stl
from tests.cad.designs import PLATE_WITH_HOLE

runner = CliRunner()
PLATE_TEXT = get_codec("compact").encode(quantize(PLATE_WITH_HOLE))
LIGHT = "cadquery,deepcad17,json,text"


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """The plate as a DeepCAD file."""
    path = tmp_path / "in" / "plate.json"
    path.parent.mkdir()
    path.write_text(json.dumps(to_deepcad_json(PLATE_WITH_HOLE)))
    return path


@pytest.mark.kernel
def test_every_format_is_written_and_says_the_same(plate: Path, tmp_path: Path) -> None:
    kernel = pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)
    out = tmp_path / "new" / "out"
    formats = ",".join(ExportFormat)
    found = runner.invoke(
        app, ["export", "-f", formats, "-o", str(out), "--views", "2", "-w", "1", "--json", str(plate)]
    )
    assert found.exit_code == 0, found.exception
    report = json.loads(found.stdout)
    names = [
        "plate.glb", "plate.json", "plate.npy", "plate.py", "plate.step", "plate.stl", "plate.txt", "plate_000.png",
        "plate_001.png",
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(report["designs"][0]["files"]) == [str(out / name) for name in names]
    volume = kernel.volume(kernel.build_solid(PLATE_WITH_HOLE))
    assert kernel.volume(kernel.read_step(out / "plate.step")) == pytest.approx(volume, rel=1e-6)
    assert read_stl(out / "plate.stl").volume == pytest.approx(volume * 1e9, rel=1e-2)
    assert Image.open(out / "plate_001.png").size == (512, 512)
    assert (out / "plate.txt").read_text() == f"{PLATE_TEXT}\n"
    assert "cadquery" in (out / "plate.py").read_text()


def test_vectors_are_those_of_the_writer(plate: Path, tmp_path: Path) -> None:
    export(file_sources([plate]), tmp_path / "out", ExportOptions(formats=parse_formats(LIGHT)))
    rows = np.load(tmp_path / "out" / "plate.npy", allow_pickle=False)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, to_vectors(read_deepcad_json(plate)))
    assert rows.shape[1] == 17


def test_real_vectors_are_those_of_the_published_files(shared_data: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    files = sorted((shared_data / "text2cad-random100/deepcad_cad_json").glob("*.json"))[::25]
    export(file_sources(files), tmp_path, ExportOptions(formats=(ExportFormat.DEEPCAD17,)))
    for path in files:
        with h5py.File(shared_data / f"text2cad-random100/deepcad_cad_vec/{path.stem}.h5") as published:
            np.testing.assert_array_equal(np.load(tmp_path / f"{path.stem}.npy"), published["vec"][:])


def test_a_design_is_read_the_same_from_text_vectors_and_json(plate: Path, tmp_path: Path) -> None:
    """One quantized design in every form that is read, each in a file."""
    options = ExportOptions(formats=parse_formats("text,deepcad17"), quantized=True)
    export(file_sources([plate]), tmp_path / "one", options)
    (tmp_path / "one/other.json").write_text(get_codec("json").encode(quantize(PLATE_WITH_HOLE)))
    (tmp_path / "one/rows.txt").write_text(get_codec("deepcad17").encode(quantize(PLATE_WITH_HOLE)))
    expected = dequantize(quantize(PLATE_WITH_HOLE))
    for source in file_sources(sorted((tmp_path / "one").iterdir())):
        assert read_source(source, quantized=False).sequence == expected, source.name


@pytest.mark.kernel
def test_sizes(plate: Path, tmp_path: Path) -> None:
    """A file has its own size, quantized too; a text is 100 mm long; --size overrides both."""

    pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)

    def length(source: Source, folder: str, **options: Any) -> float:
        # In this process: three pools would load the kernel three times.
        task = service._Task(source, ExportOptions(formats=(ExportFormat.STL,), **options), tmp_path / folder)
        service._make(task)
        bounds = read_stl(tmp_path / folder / f"{source.stem}.stl").bounds
        return float((bounds[1] - bounds[0]).max())

    (from_file,), (from_text,) = file_sources([plate]), text_sources([PLATE_TEXT])
    assert length(from_file, "a") == pytest.approx(100, rel=1e-5)
    assert length(from_file, "b", quantized=True) == pytest.approx(100, rel=0.02)
    assert length(from_text, "c") == pytest.approx(100, rel=0.02)
    assert length(from_file, "d", size_mm=25) == pytest.approx(25, rel=1e-5)


def test_a_dataset_gives_its_parts_by_id(synthetic: Path, tmp_path: Path) -> None:
    sources = dataset_sources(synthetic, ["synth-7/00000003"])
    export(sources, tmp_path, ExportOptions(formats=(ExportFormat.TEXT,)))
    text = (tmp_path / "synth-7_00000003.txt").read_text().strip()
    assert text == sources[0].text
    with pytest.raises(UsageError, match=r"2 of 3 ids are not in the dataset: nobody, no/one"):
        dataset_sources(synthetic, ["nobody", "synth-7/00000003", "no/one"])


def test_failures_are_listed_and_the_others_written(plate: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"entities": {}}')
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros((3, 17)))
    inputs = [str(path) for path in (broken, pickled, floats, tmp_path / "absent.json", plate)]
    out = tmp_path / "out"
    arguments = ["export", "-f", "text", "-o", str(out), "-w", "1", "--text", "Sa1", *inputs]
    found = runner.invoke(app, arguments)
    assert found.exit_code == 2
    assert [path.name for path in out.iterdir()] == ["plate.txt"]
    report = json.loads(runner.invoke(app, [*arguments, "--force", "--json"]).stdout)
    assert (report["files"], report["failed"]) == (1, 5)
    reasons = {Path(d["name"]).stem: d["failure"]["reason"] for d in report["designs"] if d["failure"]}
    assert "'sequence' is missing" in reasons["broken"]
    assert "is no .npy file of numbers" in reasons["pickled"]
    assert "float64 of shape (3, 17)" in reasons["floats"]
    assert "no such file" in reasons["absent"]
    assert "position 3" in reasons["sequence"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.h5", None, "absent.h5: no such file"),
        ("absent.npy", None, "absent.npy: no such file"),
        ("text.h5", b"text", "text.h5: is no HDF5 file"),
        ("text.npy", b"text", "text.npy: is no .npy file"),
        ("empty.npy", b"", "empty.npy: is no .npy file"),
        ("part.STEP", b"ISO-10303-21;", "part.STEP: STEP is no input format. Inputs are designs (.json)"),
        ("part.stl", b"solid", "part.stl: STL is no input format"),
    ],
)
def test_a_file_that_is_none_is_refused_in_plain_words(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("h5py")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(reason)):
        read_source(Source("a", path=tmp_path / name), quantized=False)


def test_a_fault_in_a_text_is_shown_with_what_stands_around_it() -> None:
    (source,) = text_sources(["Sa68,92,122,120C128,1x8,19ENO140."])
    with pytest.raises(GrammarError, match=r"after '.*C128,1' stands 'x8,19ENO140\.'"):
        read_source(source, quantized=False)
    with pytest.raises(GrammarError, match=r"after 'Sa1' the text ends"):
        read_source(text_sources(["Sa1"])[0], quantized=False)


def test_what_is_given_twice_is_told_as_such(plate: Path, synthetic: Path, tmp_path: Path) -> None:
    options = ExportOptions(formats=(ExportFormat.TEXT,))
    with pytest.raises(UsageError, match=r"1 input given twice:\n  .*plate.json\n?.* Name each file once"):
        export(file_sources([plate, plate.parent / "../in/plate.json"]), tmp_path / "out", options)
    with pytest.raises(UsageError, match="--id: given twice: a"):
        dataset_sources(synthetic, ["a", "b", "a"])


def test_the_report_keeps_paths_whole_and_counts(plate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    absent = [tmp_path / f"a-folder-with-a-long-name-{i}/another-folder-with-a-long-name/part.json" for i in range(2)]
    for path in absent:
        path.parent.mkdir(parents=True)
    others = [path.with_name(f"part{i}.json") for i, path in enumerate(absent)]
    arguments = ["export", "-f", "text", "-w", "1", "-o", str(tmp_path / "out"), *map(str, others)]
    shown = runner.invoke(app, arguments).stdout
    assert shown.startswith("0 files; 2 of 2 designs failed\n")
    for path in others:
        assert f"\n{path}: no such file.\n" in shown
    shown = runner.invoke(app, [*arguments, str(plate)]).stdout
    assert shown.startswith(f"1 file of 1 design in {tmp_path / 'out'}; 2 of 3 designs failed\n")


def test_nothing_is_written_where_names_clash(plate: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "plate.json"
    other.parent.mkdir()
    other.write_text(plate.read_text())
    out = tmp_path / "out"
    options = ExportOptions(formats=(ExportFormat.TEXT,))
    with pytest.raises(UsageError, match=r"written twice:\n  plate.txt: .*in/plate.json, .*other/plate.json"):
        export(file_sources([plate, other]), out, options)
    assert not out.exists()
    export(file_sources([plate]), out, options)
    (out / "plate.txt").write_text("mine")
    with pytest.raises(UsageError, match="1 file in the way"):
        export(file_sources([plate]), out, options)
    assert (out / "plate.txt").read_text() == "mine"
    export(file_sources([plate]), out, options, force=True)
    assert (out / "plate.txt").read_text() == f"{PLATE_TEXT}\n"
    before = hashlib.sha256(plate.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="inputs would be replaced"):
        export(file_sources([plate]), plate.parent, ExportOptions(formats=(ExportFormat.JSON,)), force=True)
    assert hashlib.sha256(plate.read_bytes()).hexdigest() == before


@pytest.mark.kernel
def test_a_design_out_of_time_leaves_nothing(shared_data: Path, plate: Path, tmp_path: Path) -> None:
    slow = next((shared_data / "omni-cad-test-subset/json").rglob("00010215_00015.json"))
    start = time.monotonic()
    options = ExportOptions(formats=parse_formats("text,stl"))
    summary = export(file_sources([slow, plate]), tmp_path / "out", options, time_limit_seconds=3)
    assert time.monotonic() - start < 60
    assert [(d.failure.kind if d.failure else None) for d in summary.designs] == ["time_limit", None]
    assert summary.exit_code == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plate.stl", "plate.txt"]


def test_a_file_that_cannot_be_moved_ends_with_the_reason(
    plate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service.os, "replace", full)
    with pytest.raises(Exception, match="No space left on device"):
        export(file_sources([plate]), tmp_path / "out", ExportOptions(formats=(ExportFormat.TEXT,)))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_worker_that_cannot_write_ends_the_export_with_the_reason(plate: Path, tmp_path: Path) -> None:
    options = ExportOptions(formats=(ExportFormat.DEEPCAD17, ExportFormat.JSON))
    task = service._Task(Source("y" * 300, path=plate), options, tmp_path / "out/staging/0")
    with pytest.raises(EnvironmentFault, match=r"out: cannot be written: .*too long") as found:
        service._make(task)
    assert found.value.exit_code == 3


@pytest.mark.kernel
def test_a_disk_that_is_full_for_the_kernel_is_told_as_such(
    plate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse(*_: object) -> None:
        raise GeometryError("step", "the kernel could not write")

    monkeypatch.setattr("cadtrain.geometry.write_step", refuse)
    task = service._Task(Source("a", path=plate), ExportOptions(formats=(ExportFormat.STEP,)), tmp_path / "out/s/0")
    with pytest.raises(GeometryError, match="could not write"):
        service._make(task)
    monkeypatch.setattr(service.tempfile, "TemporaryFile", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        service._make(dataclasses.replace(task, folder=tmp_path / "out/s/1"))


def test_what_killed_exports_left_is_removed(plate: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    kept = [f".export-{host}-{os.getpid()}-abc", f".export-{host}else-{dead.pid}-abc", ".export-mine"]
    for name in [*kept, f".export-{host}-{dead.pid}-ab_c"]:
        (tmp_path / "out" / name / "0").mkdir(parents=True)
    export(text_sources([PLATE_TEXT]), tmp_path / "out", ExportOptions(formats=(ExportFormat.TEXT,)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*kept, "sequence.txt"])


def test_sigterm_ends_an_export_with_a_word_and_leaves_nothing(plate: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(3000):
        (many / f"{number}.json").write_text(plate.read_text())
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cadtrain", "data", "export", "-f", "text", "-w", "1", "-o", str(out)]
    process = subprocess.Popen([*command, *map(str, many.iterdir())], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.txt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 143, told
    assert "Designs that were done are written" in told
    assert {path.suffix for path in out.iterdir()} == {".txt"}


@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_the_folders_place_is_wrong_usage(inside: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="folder with --out"):
        export(text_sources(["x"]), tmp_path / "taken" / inside, ExportOptions(formats=(ExportFormat.TEXT,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "step,obj,3mf"], "no format named obj, 3mf"),
        (["--format", ","], "no format is given"),
        (["--dataset", "somewhere"], "go together"),
        (["--id", "a"], "go together"),
        (["--size", "-1", "x.json"], "size of -1"),
        ([], "nothing to export"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], message: str) -> None:
    found = runner.invoke(app, ["export", *arguments])
    assert isinstance(found.exception, UsageError)
    assert message in str(found.exception)


@pytest.mark.parametrize("text", ["", "  \n", "x", "{}", "4\n", "Sa1,2,3,0C1,1,1ENO140."])
def test_a_text_that_is_none_is_refused_with_its_place(text: str) -> None:
    (source,) = text_sources([text])
    with pytest.raises(DataError, match=r"^sequence"):
        read_source(source, quantized=False)


def test_the_progress_counts_to_the_end(plate: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sources = [*file_sources([plate]), *text_sources([PLATE_TEXT])]
    export(sources, tmp_path / "out", ExportOptions(formats=(ExportFormat.TEXT,)), progress=lambda *x: told.append(x))
    assert told == [(1, 2), (2, 2)]


def test_a_view_is_a_picture() -> None:
    """`ExportOptions.names` and the writer must agree on the number of pictures."""
    options = ExportOptions(formats=(ExportFormat.PNG,), num_views=3)
    assert options.names("a") == ["a_000.png", "a_001.png", "a_002.png"]
    assert ExportOptions(formats=(ExportFormat.PNG,)).names("a") == ["a.png"]
