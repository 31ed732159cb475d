from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from schemas.errors import StorageError
from schemas.template import ThinkingMode
from training.evaluation_report import (
    MODE_NAMES,
    Figures,
    mean_over_benchmarks,
    plot_accuracy,
    plot_thinking_rate,
    render_table,
    write_plot,
)
from training.measures import Measures, Rate

AUTO, LONG, SHORT = ThinkingMode.AUTO, ThinkingMode.LONG, ThinkingMode.SHORT


def measures(right: int, thinking: int, tokens: int, *, asked: int = 100, without_reference: int = 0) -> Measures:
    return Measures(
        num_questions=asked,
        accuracy=Rate(right, asked - without_reference),
        thinking_rate=Rate(thinking, asked),
        truncated=Rate(2, asked),
        num_unscored={"truncated": 2, "empty": 1},
        num_without_reference=without_reference,
        num_output_tokens=tokens * asked,
    )


FIGURES = Figures(
    benchmarks={
        "OCR|Bench": {SHORT: measures(60, 0, 57), AUTO: measures(62, 2, 66), LONG: measures(61, 100, 394)},
        "WeMath": {SHORT: measures(30, 0, 408), AUTO: measures(50, 75, 1278), LONG: measures(52, 100, 1382)},
    },
    topics={"math": {AUTO: measures(40, 75, 1278, without_reference=20)}},
    overall={mode: measures(1, 1, 1) for mode in (AUTO, LONG, SHORT)},
)


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")] for line in lines]


def test_the_table_has_a_row_for_each_benchmark_and_mode_and_the_means() -> None:
    rows = rows_of(render_table(FIGURES))
    assert ["OCR/Bench", "auto", "100", "62.0% (52.2% to 70.9%)", "2.0%", "66.0", "2.0%", "3.0%"] in rows
    assert ["**mean of 2 benchmarks**", "auto", "", "56.0%", "38.5%", "672.0", "", ""] in rows
    assert [row[1] for row in rows if row[0] == "WeMath"] == ["short", "auto", "long"]
    assert next(row for row in rows if row[0] == "math")[:3] == ["math", "auto", "100 (20 without reference)"]


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    assert {len(row) for row in rows_of(render_table(FIGURES))} == {8}


def test_means_give_each_benchmark_the_same_weight() -> None:
    small, large = measures(1, 0, 10, asked=2), measures(900, 1000, 30, asked=1000)
    figures = Figures({"small": {AUTO: small}, "large": {AUTO: large}}, {}, {AUTO: large})
    mean = mean_over_benchmarks(figures, AUTO)
    assert (mean.accuracy, mean.thinking_rate, mean.output_tokens) == (0.7, 0.5, 20.0)


def test_a_benchmark_without_accuracy_has_empty_cells_and_does_not_pull_the_mean() -> None:
    without = measures(0, 50, 20, without_reference=100)
    figures = Figures({"a": {AUTO: without}, "b": {AUTO: measures(40, 0, 10)}}, {}, {AUTO: without})
    assert next(row for row in rows_of(render_table(figures)) if row[0] == "a")[3:5] == ["", "50.0%"]
    assert mean_over_benchmarks(figures, AUTO).accuracy == 0.4
    plot_accuracy(figures)


def test_both_plots_are_pictures_with_named_axes_and_every_benchmark_and_mode(tmp_path: Path) -> None:
    for name, figure in (("accuracy", plot_accuracy(FIGURES)), ("thinking_rate", plot_thinking_rate(FIGURES))):
        write_plot(figure, tmp_path, name)
        (axes,) = figure.axes
        assert axes.get_xlabel()
        assert axes.get_title(loc="left")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10  # not blank
        ElementTree.parse(tmp_path / f"{name}.svg")
    axes = plot_accuracy(FIGURES).axes[0]
    assert axes.get_ylabel().startswith("accuracy")
    assert axes.get_legend_handles_labels()[1] == ["short (never thinks)", "auto (chooses)", "long (always thinks)"]
    assert {text.get_text() for text in axes.texts} == {"OCR|Bench", "WeMath"}


def test_points_lie_at_tokens_and_accuracy() -> None:
    axes = plot_accuracy(FIGURES).axes[0]
    points = {(round(x, 6), round(y, 6)) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
    assert {(57, 0.6), (66, 0.62), (394, 0.61), (408, 0.3), (1278, 0.5), (1382, 0.52)} <= points
    assert ((57 + 408) / 2, 0.45) in points  # the mean of the mode short


def test_bars_of_thinking_are_sorted_and_as_long_as_their_rates() -> None:
    axes = plot_thinking_rate(FIGURES).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.02, 0.75]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["OCR|Bench", "WeMath"]


def test_names_are_left_out_where_there_are_too_many_to_read() -> None:
    many = {f"bench-{i}": {AUTO: measures(i, i, 10 + i)} for i in range(25)}
    figures = Figures(many, {}, {AUTO: measures(1, 1, 1)})
    assert len(plot_accuracy(figures).axes[0].texts) == 0
    assert len(plot_thinking_rate(figures).axes[0].patches) == 25


@pytest.mark.parametrize("modes", [[LONG], [SHORT, LONG]])
def test_plots_do_without_auto_mode(modes: list[ThinkingMode]) -> None:
    by_mode = {mode: measures(50, 100, 80) for mode in modes}
    figures = Figures({"a": by_mode}, {}, by_mode)
    plot_accuracy(figures)
    assert MODE_NAMES[modes[0]] in plot_thinking_rate(figures).axes[0].get_title(loc="left")


def test_the_same_figures_give_the_same_drawing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_plot(plot_accuracy(FIGURES), tmp_path, name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_plot(plot_thinking_rate(FIGURES), tmp_path / "file", "plot")
