from __future__ import annotations

import base64
import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from corpus.writer import write_corpus_shard, write_fates, write_shards
from judges.answers import reference_problem
from schemas.config import ImageLimits
from schemas.errors import SourceError
from schemas.rows import LabelledSample, labelled_table
from schemas.samples import AnswerType, ImageRef, Kind, Sample, Topic, sample_to_record
from schemas.verdicts import Decision, Heuristic, Mode
from sources import ImageStore
from training.benchmark_questions import Benchmark, BenchmarkConfig, _text_list, read_benchmark

Read = Callable[..., Benchmark]


def picture(colour: str, size: tuple[int, int] = (28, 28), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def base64_of(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


def write_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rows as pandas does: tabs, quotes only where needed, nothing for a null."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", ImageLimits(max_pixels=10_000))


@pytest.fixture
def read(store: ImageStore) -> Read:
    def read_path(path: Path, form: str, *, max_questions: int | None = None, seed: int = 0, **more: Any) -> Benchmark:
        config = BenchmarkConfig(name="bench", path=str(path), format=form, **more)  # type: ignore[arg-type]
        return read_benchmark(config, store=store, max_questions=max_questions, seed=seed)

    return read_path


@pytest.fixture
def read_tsv(read: Read, tmp_path: Path) -> Read:
    def read_rows(*rows: dict[str, Any], **more: Any) -> Benchmark:
        return read(write_tsv(tmp_path / "bench.tsv", rows), "vlmevalkit", **more)

    return read_rows


def colours_of(benchmark: Benchmark) -> list[list[str]]:
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
    return [[names[image.getpixel((0, 0))] for image in question.load_images()] for question in benchmark.questions]


# --- VLMEvalKit


def test_a_row_of_options_is_a_choice_with_its_letter(read_tsv: Read) -> None:
    row = {"index": 7, "image": base64_of("red"), "question": "Colour?", "A": "red", "B": "blue", "answer": "A"}
    benchmark = read_tsv({**row, "category": "colours"}, topic=Topic.GENERAL)
    (question,) = benchmark.questions
    assert question.sample.choices == ("red", "blue")
    assert (question.sample.answer, question.sample.source_id, question.sample.topic) == ("A", "7", Topic.GENERAL)
    assert question.category == "colours"
    assert colours_of(benchmark) == [["red"]]


def test_options_may_end_early_and_their_letters_stay_those_of_the_file(read_tsv: Read) -> None:
    rows = [
        {"index": 1, "image": base64_of("red"), "question": "q", "A": "a", "B": "b", "C": "c", "answer": "C"},
        {"index": 2, "image": base64_of("red"), "question": "q", "A": "a", "B": "b", "C": "", "answer": "B"},
        {"index": 3, "image": base64_of("red"), "question": "q", "A": "a", "B": "", "C": "c", "answer": "C"},
    ]
    samples = [question.sample for question in read_tsv(*rows).questions]
    assert [(sample.choices, sample.answer) for sample in samples] == [
        (("a", "b", "c"), "C"),
        (("a", "b"), "B"),
        (("a", "c"), "B"),  # shown to the model as A and B
    ]


def test_an_option_named_none_is_an_option_and_a_null_of_pandas_is_not(read_tsv: Read) -> None:
    row = {"index": 1, "image": base64_of("red"), "question": "q", "A": "3", "B": "None", "C": "nan", "answer": "B"}
    assert read_tsv(row).questions[0].sample.choices == ("3", "None")


def test_a_list_of_choices_serves_where_there_are_no_columns_of_options(read_tsv: Read) -> None:
    image = base64_of("red")
    rows = [
        {
            "index": 1,
            "image": image,
            "question": "q",
            "choices": "['2', '4']",
            "answer": "4",
            "answer_option": "B",
        },
        {"index": 2, "image": image, "question": "q", "choices": "[]", "answer": "4", "answer_option": ""},
    ]
    samples = [question.sample for question in read_tsv(*rows).questions]
    assert [(sample.choices, sample.answer) for sample in samples] == [(("2", "4"), "B"), ((), "4")]


def test_a_short_image_cell_names_the_row_whose_image_it_shares_before_or_behind_it(read_tsv: Read) -> None:
    rows = [
        {"index": 1, "image": "2", "question": "q", "answer": "yes"},
        {"index": 2, "image": base64_of("blue"), "question": "q", "answer": "yes"},
        {"index": 1000002, "image": "2", "question": "q", "answer": "no"},
    ]
    assert colours_of(read_tsv(*rows)) == [["blue"]] * 3


@pytest.mark.parametrize("target", ["9", "2", "3"], ids=["absent", "a reference itself", "unreadable"])
def test_a_reference_without_an_image_behind_it_is_quarantined(read_tsv: Read, target: str) -> None:
    rows = [
        {"index": 1, "image": target, "question": "q", "answer": "yes"},
        {"index": 2, "image": "1", "question": "q", "answer": "yes"},
        {"index": 3, "image": base64.b64encode(b"no picture at all" * 9).decode(), "question": "q", "answer": "yes"},
        {"index": 4, "image": base64_of("red"), "question": "q", "answer": "yes"},
    ]
    benchmark = read_tsv(*rows)
    assert [question.sample.source_id for question in benchmark.questions] == ["4"]
    assert [fate.origin for fate in benchmark.quarantined] == [f"bench:bench.tsv#{i}" for i in range(3)]


@pytest.mark.parametrize("written", [json.dumps, str], ids=["JSON", "Python"])
def test_a_row_may_hold_several_images(read_tsv: Read, written: Callable[[list[str]], str]) -> None:
    images = written([base64_of("red"), base64_of("green")])
    row = {"index": 1, "image": images, "image_path": "['a.jpg', 'b.jpg']", "question": "q", "answer": "yes"}
    assert colours_of(read_tsv(row)) == [["red", "green"]]


def test_paths_are_read_below_the_folder_of_images_and_never_outside(read: Read, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture("green"))
    (tmp_path / "secret.png").write_bytes(picture("red"))
    rows = [
        {"index": 1, "image_path": "a.png", "question": "q", "answer": "yes"},
        {"index": 2, "image_path": "../secret.png", "question": "q", "answer": "yes"},
        {"index": 3, "image_path": "missing.png", "question": "q", "answer": "yes"},
        {"index": 4, "image_path": "http://example.org/a.png", "question": "q", "answer": "yes"},
    ]
    path = write_tsv(tmp_path / "bench.tsv", rows)
    benchmark = read(path, "vlmevalkit", image_root=str(tmp_path / "images"))
    assert colours_of(benchmark) == [["green"]]
    assert benchmark.reasons == {"image_address_not_fetched": 1, "image_missing": 1, "image_outside_root": 1}


def test_a_cell_of_base64_is_never_taken_for_a_path(read: Read, tmp_path: Path) -> None:
    (tmp_path / ("a" * 70)).write_bytes(picture("red"))
    rows = [
        {"index": 1, "image": "a" * 70, "question": "q", "answer": "yes"},
        {"index": 2, "image": base64_of("blue"), "question": "q", "answer": "yes"},
    ]
    benchmark = read(write_tsv(tmp_path / "bench.tsv", rows), "vlmevalkit")
    assert (colours_of(benchmark), benchmark.reasons) == ([["blue"]], {"image_unreadable": 1})


def test_a_row_without_an_image_in_a_file_of_images_is_quarantined_and_a_file_without_any_is_text(
    read_tsv: Read,
) -> None:
    with_images = read_tsv(
        {"index": 1, "image": base64_of("red"), "question": "q", "answer": "yes"},
        {"index": 2, "image": "", "question": "q", "answer": "yes"},
    )
    assert with_images.reasons == {"image_missing": 1}
    text_only = read_tsv({"index": 1, "question": "q", "answer": "yes"})
    assert [question.sample.images for question in text_only.questions] == [()]


def test_a_hint_stands_before_the_question(read_tsv: Read) -> None:
    row = {"index": 1, "image": base64_of("red"), "hint": "It is warm.", "question": "Colour?", "answer": "red"}
    assert read_tsv(row).questions[0].sample.question == "Hint: It is warm.\nColour?"


def test_a_list_of_answers_is_alternatives_and_a_list_of_numbers_one_answer(read_tsv: Read) -> None:
    rows = [
        {"index": 1, "question": "q", "answer": "['nokia', 'Nokia 3310', 'nokia']"},
        {"index": 2, "question": "q", "answer": '["it\'s red"]'},
        {"index": 3, "question": "Where is it?", "answer": "[1, 2, 30, 40]"},
        {"index": 4, "question": "q", "answer": "[]"},
    ]
    benchmark = read_tsv(*rows)
    assert [(question.sample.answer, question.other_answers) for question in benchmark.questions] == [
        ("nokia", ("Nokia 3310",)),
        ("it's red", ()),
        ("[1, 2, 30, 40]", ()),
    ]
    assert benchmark.reasons == {"answer_unreadable": 1}


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_a_list_of_texts_is_read_as_json_and_as_python_write_it(texts: list[str]) -> None:
    assert _text_list(json.dumps(texts)) == texts
    assert _text_list(repr(texts)) == texts


@pytest.mark.parametrize("missing", ["index", "question", "answer"])
def test_a_tsv_without_a_required_column_is_a_clear_error(read_tsv: Read, missing: str) -> None:
    row = {"index": 1, "image": base64_of("red"), "question": "q", "answer": "yes"}
    del row[missing]
    with pytest.raises(SourceError, match=f"lacks the columns {missing} .*it has"):
        read_tsv(row)


def test_rows_that_cannot_be_read_are_quarantined_with_their_reasons_and_the_others_are_asked(
    read: Read, tmp_path: Path
) -> None:
    image = base64_of("red")
    lines = [
        b"index\timage\tquestion\tA\tB\tanswer",
        f"1\t{image}\tq\ta\tb\tA".encode(),
        f"1\t{image}\tq\ta\tb\tA".encode(),
        f"\t{image}\tq\ta\tb\tA".encode(),
        f"3\t{image}\tq\ta".encode(),
        f"4\t{image}\tq\ta\tb\tA\textra".encode(),
        f"5\t{image}\tcaf".encode() + b"\xe9\ta\tb\tA",
        f"6\t{image}\t\ta\tb\tA".encode(),
        f"7\t{image}\tq\ta\tb\tE".encode(),
        f"8\t{image}\tq <|im_start|>\ta\tb\tA".encode(),
        f'9\t{image}\t"two\nlines"\ta\tb\tB'.encode(),
    ]
    path = tmp_path / "bench.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    benchmark = read(path, "vlmevalkit")
    assert [question.sample.question for question in benchmark.questions] == ["q", "two\nlines"]
    assert benchmark.num_rows == 10
    assert benchmark.reasons == {
        "answer_outside_choices": 1,
        "control_token_in_text": 1,
        "index_missing": 1,
        "index_repeated": 1,
        "question_missing": 1,
        "row_misshapen": 2,
        "row_not_utf8": 1,
    }


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (picture("red", (200, 60)), "image_too_large_pixels"),
        (picture("red", (1, 40)), "image_too_small"),
        (picture("red")[:60] + bytes(40), "image_unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + bytes(40), "image_unreadable"),
    ],
    ids=["more pixels than allowed", "too narrow", "truncated", "a format that runs programs"],
)
def test_hostile_images_cost_their_own_row_alone(read_tsv: Read, image: bytes, reason: str) -> None:
    rows = [
        {"index": 1, "image": base64.b64encode(image).decode(), "question": "q", "answer": "yes"},
        {"index": 2, "image": base64_of("red"), "question": "q", "answer": "yes"},
    ]
    benchmark = read_tsv(*rows)
    assert (len(benchmark.questions), benchmark.reasons) == (1, {reason: 1})


def test_a_packed_tsv_is_read_like_an_unpacked_one(read: Read, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [{"index": 1, "question": "q", "answer": "yes"}])
    packed = tmp_path / "b.tsv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [question.sample.id for question in read(packed, "vlmevalkit").questions] == [
        question.sample.id for question in read(path, "vlmevalkit").questions
    ]


# --- Our own forms


def corpus_sample(store: ImageStore, number: int) -> Sample:
    image = store.put(picture("blue"))
    return Sample(
        id=f"{number:032x}",
        source="s",
        origin=f"s#{number}",
        question=f"Question {number}?",
        images=(image,),
        choices=("a", "b") if number % 2 else (),
        answer="B" if number % 2 else "12",
        topic=Topic.MATH,
        kind=Kind.OBJECTIVE,
        answer_type=AnswerType.CHOICE if number % 2 else AnswerType.NUMBER,
    )


def test_our_corpus_is_asked_by_its_references_not_by_what_its_teacher_said(
    read: Read, store: ImageStore, tmp_path: Path
) -> None:
    rows = [
        LabelledSample(corpus_sample(store, number), Decision(Mode.DIRECT, Heuristic.PERFORMANCE), "", "B")
        for number in range(3)
    ]
    rows.append(
        LabelledSample(
            Sample("f" * 32, "s", "s#9", "Describe it.", kind=Kind.SUBJECTIVE, answer_type=AnswerType.OPEN),
            Decision(Mode.DIRECT, Heuristic.DIFFICULTY),
            "",
            "A blue square.",
        )
    )
    write_corpus_shard(labelled_table(rows), tmp_path / "rows.parquet", read_image=store.read, recipe="r")
    benchmark = read(tmp_path / "rows.parquet", "corpus")
    samples = [question.sample for question in benchmark.questions]
    assert [sample.answer for sample in samples] == ["12", "B", "12", None]
    assert [sample.choices for sample in samples] == [(), ("a", "b"), (), ()]
    assert {sample.topic for sample in samples[:3]} == {Topic.MATH}
    assert colours_of(benchmark) == [["blue"]] * 3 + [[]]


def test_the_folder_of_a_corpus_version_stands_for_its_rows(read: Read, store: ImageStore, tmp_path: Path) -> None:
    row = LabelledSample(corpus_sample(store, 1), Decision(Mode.DIRECT, Heuristic.PERFORMANCE), "", "B")
    write_shards([labelled_table([row])], tmp_path / "v0001", shard_rows=10, read_image=store.read, recipe="r")
    write_fates([], tmp_path / "v0001" / "fates.parquet")
    (tmp_path / "latest").symlink_to("v0001")
    assert len(read(tmp_path / "latest", "corpus").questions) == 1


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_samples_may_refer_to_an_image_store(read: Read, store: ImageStore, tmp_path: Path, form: str) -> None:
    records = [sample_to_record(corpus_sample(store, number)) for number in range(2)]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    benchmark = read(path, "samples", image_root=str(store.root))
    assert colours_of(benchmark) == [["blue"], ["blue"]]
    assert [question.sample.source_id for question in benchmark.questions] == [f"{number:032x}" for number in range(2)]


def test_samples_may_have_image_bytes_and_no_more_columns_than_question_and_answer(read: Read, tmp_path: Path) -> None:
    rows = [{"question": "Colour?", "answer": "red", "images": [{"bytes": picture("red")}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    benchmark = read(tmp_path / "rows.parquet", "samples", topic=Topic.OCR, answer_type=AnswerType.OCR)
    assert colours_of(benchmark) == [["red"]]
    assert benchmark.questions[0].sample.answer_type is AnswerType.OCR


def test_a_reference_out_of_the_store_is_quarantined(read: Read, store: ImageStore, tmp_path: Path) -> None:
    record = sample_to_record(corpus_sample(store, 0))
    outside = {**record, "images": [{"sha256": "../../../../etc/passwd", "width": 1, "height": 1}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (record, outside)), encoding="utf-8")
    benchmark = read(path, "samples", image_root=str(store.root))
    assert len(benchmark.questions) == 1
    assert set(benchmark.reasons) <= {"image_outside_root", "image_missing"}


def test_a_line_that_is_no_json_is_quarantined(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "yes"}\n{"question": \n[1]\n', encoding="utf-8")
    benchmark = read(path, "samples")
    assert (len(benchmark.questions), benchmark.reasons) == (1, {"row_not_json": 1, "row_not_object": 1})


@pytest.mark.parametrize(("form", "missing"), [("corpus", "reference"), ("samples", "answer")])
def test_a_file_without_its_required_columns_is_a_clear_error(
    read: Read, tmp_path: Path, form: str, missing: str
) -> None:
    pq.write_table(pa.Table.from_pylist([{"question": "q"}]), tmp_path / "rows.parquet")
    with pytest.raises(SourceError, match=f"lacks the columns {missing}"):
        read(tmp_path / "rows.parquet", form)


# --- All forms


def test_an_empty_benchmark_is_a_clear_error(read: Read, tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_bytes(b"")
    with pytest.raises(SourceError, match="is empty"):
        read(tmp_path / "empty.tsv", "vlmevalkit")
    (tmp_path / "header.tsv").write_bytes(b"index\tquestion\tanswer\n")
    with pytest.raises(SourceError, match="it has no rows"):
        read(tmp_path / "header.tsv", "vlmevalkit")
    no_rows = {name: pa.array([], pa.string()) for name in ("question", "answer")}
    pq.write_table(pa.table(no_rows), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="it has no rows"):
        read(tmp_path / "a.parquet", "samples")


def test_a_benchmark_of_bad_rows_alone_is_an_error_that_counts_them(read_tsv: Read) -> None:
    with pytest.raises(SourceError, match="no question that can be asked: 2 image_unreadable"):
        read_tsv(*({"index": i, "image": "A" * 80, "question": "q", "answer": "yes"} for i in range(2)))


def test_a_missing_file_is_a_clear_error(read: Read, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        read(tmp_path / "none.tsv", "vlmevalkit")


def test_a_file_that_is_no_parquet_is_a_clear_error(read: Read, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(SourceError, match="no sound Parquet"):
        read(tmp_path / "a.parquet", "corpus")


def test_an_unknown_format_is_a_clear_error() -> None:
    with pytest.raises(ValidationError, match="'corpus', 'samples' or 'vlmevalkit'"):
        BenchmarkConfig(name="b", path="p", format="excel")  # type: ignore[arg-type]


def test_a_draw_depends_on_the_seed_alone_and_a_larger_one_holds_a_smaller(read_tsv: Read) -> None:
    rows = [{"index": i, "question": f"Question {i}?", "answer": "yes"} for i in range(60)]
    draws = [
        {question.sample.source_id for question in read_tsv(*rows, max_questions=size, seed=seed).questions}
        for size, seed in ((10, 0), (10, 0), (30, 0), (10, 1), (100, 0))
    ]
    assert draws[0] == draws[1]
    assert draws[0] < draws[2]
    assert draws[0] != draws[3]
    assert [len(draw) for draw in draws] == [10, 10, 30, 10, 60]


def test_rows_that_are_not_drawn_are_counted_and_not_read(read_tsv: Read) -> None:
    rows: list[dict[str, Any]] = [{"index": i, "image": "A" * 80, "question": "q", "answer": "yes"} for i in range(8)]
    rows += [{"index": i, "image": base64_of("red"), "question": "q", "answer": "yes"} for i in range(8, 30)]
    benchmark = read_tsv(*rows, max_questions=12)
    assert benchmark.num_not_drawn == 18
    assert len(benchmark.questions) + len(benchmark.quarantined) == 12
    assert 0 < len(benchmark.quarantined) < 8


def test_rows_of_several_files_keep_their_own_places(read: Read, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tsv(tmp_path / f"{name}.tsv", [{"index": i, "question": "q", "answer": "yes"} for i in range(2)])
    origins = [question.sample.origin for question in read(tmp_path, "vlmevalkit").questions]
    assert origins == ["bench:a.tsv#0", "bench:a.tsv#1", "bench:b.tsv#0", "bench:b.tsv#1"]


def test_images_are_read_when_they_are_wanted(read_tsv: Read, store: ImageStore) -> None:
    benchmark = read_tsv({"index": 1, "image": base64_of("red"), "question": "q", "answer": "yes"})
    ref = benchmark.questions[0].sample.images[0]
    assert ref == ImageRef(ref.sha256, 28, 28)
    assert store.read(ref.sha256) == picture("red")


# --- Real data


def test_mathvision_in_vlmevalkits_form_is_asked_whole(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "mathvision"
    if not folder.exists():
        pytest.skip(f"NOT TESTED on real data: {folder} is not there")
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "index": problem["id"],
            "image": base64.b64encode((folder / problem["image"]).read_bytes()).decode(),
            "question": problem["question"],
            "choices": str(problem["options"]),
            "answer": problem["answer"],
            "category": problem["subject"],
        }
        for problem in problems
    ]
    large = ImageStore(tmp_path / "large", ImageLimits())
    path = write_tsv(tmp_path / "MathVision_MINI.tsv", rows)
    config = BenchmarkConfig(name="mathvision", path=str(path), format="vlmevalkit", topic=Topic.MATH)
    benchmark = read_benchmark(config, store=large)
    assert (benchmark.num_rows, len(benchmark.questions), benchmark.quarantined) == (304, 304, ())
    samples = [question.sample for question in benchmark.questions]
    assert sum(bool(sample.choices) for sample in samples) == 190
    assert all(len(sample.images) == 1 for sample in samples)
    assert sum(reference_problem(sample) is None for sample in samples) == 304
    assert len({question.category for question in benchmark.questions}) > 10
